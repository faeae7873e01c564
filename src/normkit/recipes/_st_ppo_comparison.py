"""The trainings that ST-PPO's experiments compare, as JSON-ready trials.

In the chain of hops each update is taken apart into the terms of Lemma 4.2. In the search world
recurrent policies are trained at several stalenesses: all methods play the same number of dialogues
and take the same number of updates. Each method trains at its own best learning rate at each
staleness, chosen by its end on seeds that the comparison does not use, and once more, where the
data are stalest, at one rate for all, which is too large for most.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from normkit.errors import InputError
from normkit.recipes import _st_ppo_recurrent as recurrent
from normkit.recipes import _st_ppo_tabular as tabular
from normkit.recipes._st_ppo_arms import ARMS
from normkit.recipes._st_ppo_tabular import Schedule
from normkit.recipes._trials import TUNING, ComparisonPlan, best_rate

_LAGS = ("bias", "gradient", "clipped")
_TERMS = ("true", "luck", "critic", "value_error")

Values = NDArray[np.float64]


@dataclass(frozen=True)
class Plan(ComparisonPlan):
    """What is compared.

    Attributes:
        dialogues: of each update.
        staleness: updates per batch of dialogues, each compared by itself.
        hot: the rate at which all methods train once more, at the last staleness; None for not.
    """

    dialogues: int
    staleness: tuple[int, ...]
    hot: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.staleness or not all(s >= 1 and self.updates % s == 0 for s in self.staleness):
            raise InputError(
                f"staleness must divide {self.updates} updates, at least one, got {self.staleness}"
            )

    def schedule(self, staleness: int) -> Schedule:
        """How much is sampled and updated at a staleness."""
        return Schedule(self.updates, staleness, self.dialogues)


CHAIN = Plan(32, 6, 512, (0.02, 0.05, 0.1, 0.2), dialogues=32, staleness=(64,))
SEARCH = Plan(10, 8, 256, (0.001, 0.003, 0.01), dialogues=16, staleness=(1, 4, 16, 64), hot=0.01)


@dataclass(frozen=True)
class Trial:
    """A method's runs at one staleness and rate, JSON-ready.

    Attributes:
        name: of the method.
        staleness: updates per batch.
        rate: the learning rate.
        tuning: success at the end by rate and tuning seed; empty where no rate was chosen.
        curve: success by evaluation and seed: exact expected reward in the chain, after every
            update; exact match on held-out questions in the search world.
        by_lag: means over the batches, by updates since sampling and seed, of "bias", "gradient"
            and "clipped"; in the chain also of the terms of the lemma.
        by_batch: mean of the clipping bias's norm by batch of dialogues and seed.
        tail: 99th percentile of the gradient's norm by seed.
    """

    name: str
    staleness: int
    rate: float
    tuning: dict[str, list[float]]
    curve: list[list[float]]
    by_lag: dict[str, list[list[float]]]
    by_batch: list[list[float]]
    tail: list[float]

    def values(self, metric: str) -> Values:
        """A metric by seed.

        Args:
            metric: "final", "mean" (over the course), "drop" (largest fall below the best so far),
                "tail", or a key of ``by_lag``, in the mean over lags.
        """
        curve = np.asarray(self.curve, dtype=np.float64)
        if metric == "tail":
            found = np.asarray(self.tail)
        elif metric in self.by_lag:
            found = self.lag(metric).mean(0)
        elif metric == "drop":
            found = (np.maximum.accumulate(curve) - curve).max(0)
        else:
            found = curve[-1] if metric == "final" else curve.mean(0)
        return np.asarray(found, dtype=np.float64)

    def lag(self, name: str) -> Values:
        """A key of ``by_lag`` by updates since sampling and seed ``[S, seeds]``."""
        return np.asarray(self.by_lag[name], dtype=np.float64)


def chain(plan: Plan, seed: int) -> Iterator[Trial]:
    """Train every method in the chain; yields them one by one."""
    (staleness,) = plan.staleness
    schedule = plan.schedule(staleness)
    for name, arm in ARMS.items():
        rates = torch.tensor(plan.rates).repeat_interleave(plan.tuning_seeds)
        tried = tabular.train(arm, rates, schedule, seed + TUNING)
        best, tuning = _best(plan, tried.value[-1])
        done = tabular.train(arm, torch.full((plan.seeds,), best), schedule, seed, lemma=True)
        keys = (*_LAGS, "cosine", *(_TERMS if arm.critic else ()))
        lags = {key: _by_lag(getattr(done, key), staleness) for key in keys}
        batches = _by_batch(done.bias, staleness)
        tail = done.gradient.quantile(0.99, 0).tolist()
        yield Trial(name, staleness, best, tuning, done.value.tolist(), lags, batches, tail)


def search(plan: Plan, seed: int) -> Iterator[list[Trial]]:
    """Train every method in the search world; yields those of a staleness together.

    Last come the trainings at the common rate, where the plan has one.
    """
    for staleness in plan.staleness:
        yield tuned(plan, staleness, seed)
    if plan.hot is not None:
        yield untuned(plan, plan.staleness[-1], plan.hot, seed)


def tuned(plan: Plan, staleness: int, seed: int) -> list[Trial]:
    """Train every method in the search world at its own best rate."""
    names = list(ARMS)
    tried = recurrent.train(
        [name for name in names for _ in plan.rates],
        list(plan.rates) * len(names),
        plan.tuning_seeds,
        plan.schedule(staleness),
        seed + TUNING,
    )
    chosen = [_best(plan, part) for part in tried.match[-1].chunk(len(names))]
    return _compared(plan, staleness, seed, *zip(*chosen, strict=True))


def untuned(plan: Plan, staleness: int, rate: float, seed: int) -> list[Trial]:
    """Train every method in the search world at the same rate."""
    return _compared(plan, staleness, seed, [rate] * len(ARMS), [{} for _ in ARMS])


def _compared(
    plan: Plan,
    staleness: int,
    seed: int,
    rates: Sequence[float],
    tuning: Sequence[dict[str, list[float]]],
) -> list[Trial]:
    names = list(ARMS)
    done = recurrent.train(names, rates, plan.seeds, plan.schedule(staleness), seed)
    trials = []
    for i, (name, rate) in enumerate(zip(names, rates, strict=True)):
        mine = slice(i * plan.seeds, (i + 1) * plan.seeds)
        lags = {key: _by_lag(getattr(done, key)[:, mine], staleness) for key in _LAGS}
        tail = done.gradient[:, mine].quantile(0.99, 0).tolist()
        batches = _by_batch(done.bias[:, mine], staleness)
        curve = done.match[:, mine].tolist()
        trials.append(Trial(name, staleness, rate, tuning[i], curve, lags, batches, tail))
    return trials


def _best(plan: Plan, success: Tensor) -> tuple[float, dict[str, list[float]]]:
    """The rate with the best mean, and success by rate; it is given by rate, then seed."""
    ends = success.view(len(plan.rates), -1)
    by_rate = {f"{rate:g}": row.tolist() for rate, row in zip(plan.rates, ends, strict=True)}
    return best_rate(plan.rates, success), by_rate


def _by_lag(x: Tensor, staleness: int) -> list[list[float]]:
    rows: list[list[float]] = x.view(-1, staleness, x.shape[1]).mean(0).tolist()
    return rows


def _by_batch(x: Tensor, staleness: int) -> list[list[float]]:
    rows: list[list[float]] = x.view(-1, staleness, x.shape[1]).mean(1).tolist()
    return rows
