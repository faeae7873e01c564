"""Measured claims of ST-PPO: every seed, mean, interval, verdict as it falls.

Two experiments. In the chain of hops each update is taken apart into the terms of Lemma 4.2. In the
search world recurrent policies are trained at four stalenesses: all methods play the same number
of dialogues and take the same number of updates. Each method trains at its own best learning rate
at each staleness, chosen by its end on seeds that the comparison does not use, and once more, where
the data are stalest, at one rate for all, which is too large for most. Differences are paired by
seed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from normkit.errors import InputError
from normkit.recipes import _st_ppo_recurrent as recurrent
from normkit.recipes import _st_ppo_tabular as tabular
from normkit.recipes._st_ppo_arms import ARMS
from normkit.recipes._st_ppo_tabular import Schedule
from normkit.recipes.base import Claim, Finding, verdict_of
from normkit.statistics import bootstrap_interval

SEED = 1
"""Of the claims; the recipe's default is another."""
_TUNING = 100
"""Added to the seed for choosing rates."""

Values = NDArray[np.float64]


@dataclass(frozen=True)
class Plan:
    """What is compared.

    Attributes:
        seeds: runs of each method.
        tuning_seeds: runs of each method and rate, to choose the rate.
        updates: of each run.
        dialogues: of each update.
        rates: learning rates to choose from.
        staleness: updates per batch of dialogues, each compared by itself.
        hot: the rate at which all methods train once more, at the last staleness; None for not.
    """

    seeds: int
    tuning_seeds: int
    updates: int
    dialogues: int
    rates: tuple[float, ...]
    staleness: tuple[int, ...]
    hot: float | None = None

    def __post_init__(self) -> None:
        for name in ("seeds", "tuning_seeds", "updates"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not self.rates or not all(rate > 0 for rate in self.rates):
            raise InputError(f"rates must be above 0, at least one, got {self.rates}")
        if not self.staleness or not all(s >= 1 and self.updates % s == 0 for s in self.staleness):
            raise InputError(
                f"staleness must divide {self.updates} updates, at least one, got {self.staleness}"
            )

    def schedule(self, staleness: int) -> Schedule:
        """How much is sampled and updated at a staleness."""
        return Schedule(self.updates, staleness, self.dialogues)


CHAIN = Plan(32, 6, 512, 32, (0.02, 0.05, 0.1, 0.2), (64,))
SEARCH = Plan(10, 8, 256, 16, (0.001, 0.003, 0.01), (1, 4, 16, 64), hot=0.01)


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
        tuned = tabular.train(arm, rates, schedule, seed + _TUNING).value[-1]
        best, tuning = _best(plan, tuned)
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
        seed + _TUNING,
    )
    chosen = [_best(plan, part) for part in tried.match[-1].chunk(len(names))]
    return _compared(plan, staleness, seed, *zip(*chosen, strict=True))


def untuned(plan: Plan, staleness: int, rate: float, seed: int) -> list[Trial]:
    """Train every method in the search world at the same rate."""
    return _compared(plan, staleness, seed, [rate] * len(ARMS), [{} for _ in ARMS])


_LAGS = ("bias", "gradient", "clipped")
_TERMS = ("true", "luck", "critic", "value_error")


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


def _best(plan: Plan, tuned: Tensor) -> tuple[float, dict[str, list[float]]]:
    """The rate with the best mean, and all ends by rate; ``tuned`` is by rate, then seed."""
    ends = tuned.view(len(plan.rates), -1)
    by_rate = {f"{rate:g}": row.tolist() for rate, row in zip(plan.rates, ends, strict=True)}
    return plan.rates[int(ends.mean(1).argmax())], by_rate


def _by_lag(x: Tensor, staleness: int) -> list[list[float]]:
    rows: list[list[float]] = x.view(-1, staleness, x.shape[1]).mean(0).tolist()
    return rows


def _by_batch(x: Tensor, staleness: int) -> list[list[float]]:
    rows: list[list[float]] = x.view(-1, staleness, x.shape[1]).mean(1).tolist()
    return rows


# --------------------------------------------------------------------- verdicts


def difference(more: Trial, less: Trial, metric: str) -> Finding:
    """The metric of one trial minus another's, paired by seed."""
    a, b = more.values(metric), less.values(metric)
    gain = bootstrap_interval((a - b).tolist())
    details = {f"{t.name} at {t.rate:g}": t.values(metric).tolist() for t in (more, less)}
    measured = f"{a.mean():.3f} against {b.mean():.3f}, difference {gain}"
    return Finding(verdict_of(gain), measured, details)


@dataclass(frozen=True)
class Growth:
    """How well two laws fit the clipping bias while it grows, by seed.

    Attributes:
        until: updates since sampling after which the mean over seeds is at nine tenths of its peak.
        exponential: share of the variance of log |C| that a line in the lag explains, until then.
        power: that a line in the logarithm of the lag explains.
        doubling: updates in which |C| doubles, by the first law.
    """

    until: int
    exponential: Values
    power: Values
    doubling: Values


def growth(trial: Trial) -> Growth:
    """Fit |C| as a function of the updates since sampling, where it is above 0."""
    bias = trial.lag("bias")
    mean = bias.mean(1)
    until = int(np.argmax(mean >= 0.9 * mean.max()))
    rows = []
    for rising in bias[: until + 1].T:
        lag: Values = np.flatnonzero(rising > 0).astype(np.float64)
        log: Values = np.log(rising[rising > 0])
        if len(lag) > 2:
            slope = np.polyfit(lag, log, 1)[0]
            rows.append((_explained(lag, log), _explained(np.log(lag), log), np.log(2) / slope))
    return Growth(until, *np.asarray(rows, dtype=np.float64).reshape(-1, 3).T)


def _explained(x: Values, y: Values) -> float:
    return float(np.corrcoef(x, y)[0, 1] ** 2)


def exponential_growth(trial: Trial) -> Finding:
    """Whether an exponential fits the growth of |C| better than a power of the lag."""
    found = growth(trial)
    if not len(found.power):
        return Finding("not shown", "it grows in too few updates to tell laws apart")
    gain = bootstrap_interval((found.exponential - found.power).tolist())
    measured = (
        f"R2 {found.exponential.mean():.3f} exponential, {found.power.mean():.3f} power, "
        f"difference {gain}; doubles in {np.median(found.doubling):.1f} updates and is flat after "
        f"{found.until}"
    )
    details = {
        "exponential": found.exponential.tolist(),
        "power": found.power.tolist(),
        "doubling": found.doubling.tolist(),
        "until": found.until,
    }
    return Finding(verdict_of(gain), measured, details)


def over_training(trial: Trial) -> Finding:
    """Mean |C| of the last batch of dialogues over that of the first, as a logarithm."""
    batches = np.asarray(trial.by_batch)
    gain = bootstrap_interval(np.log(batches[-1] / batches[0]).tolist())
    means = ", ".join(f"{x:.4f}" for x in batches.mean(1))
    measured = f"mean |C| by batch {means}; log of last over first {gain}"
    return Finding(verdict_of(gain), measured, {"by batch": batches.tolist()})


def falls(trial: Trial, name: str, sign: int = 1) -> Finding:
    """The first lags' value minus the last's, a sixteenth of the lags each; negated by ``sign``."""
    lags = trial.lag(name)
    part = max(1, len(lags) // 16)
    first, last = lags[:part].mean(0), lags[-part:].mean(0)
    gain = bootstrap_interval((sign * (first - last)).tolist())
    measured = f"{first.mean():.4f} at first, {last.mean():.4f} at last, change {gain}"
    return Finding(verdict_of(gain), measured, {"first": first.tolist(), "last": last.tolist()})


def tracks(trial: Trial) -> Finding:
    """Correlation over lags of |C| with the critic's part of the gradient's error, by seed."""
    pairs = zip(trial.lag("bias").T, trial.lag("critic").T, strict=True)
    found = [float(np.corrcoef(bias, critic)[0, 1]) for bias, critic in pairs]
    gain = bootstrap_interval(found)
    return Finding(verdict_of(gain), f"correlation {gain}", {"correlation": found})


def same_at_one(trials: Mapping[str, Trial]) -> Finding:
    """On-policy the corrections change nothing: differences at the same rate must be zero."""
    pairs = [("S-PPO", "PPO"), ("ST-PPO", "Turn-PPO")]
    gaps = {
        f"{a} and {b}": float(np.abs(np.subtract(trials[a].curve, trials[b].curve)).max())
        for a, b in pairs
        if trials[a].rate == trials[b].rate
    }
    measured = "; ".join(f"{pair} differ by {gap:.3f}" for pair, gap in gaps.items())
    holds = len(gaps) == len(pairs) and max(gaps.values()) == 0
    return Finding("holds" if holds else "contradicted", measured, gaps)


def robust(trials: Mapping[str, Trial], more: str, less: str) -> Finding:
    """Success at the end in the mean over all rates that were tried, by tuning seed."""
    a, b = (np.mean(list(trials[name].tuning.values()), 0) for name in (more, less))
    gain = bootstrap_interval((a - b).tolist())
    measured = f"{a.mean():.3f} against {b.mean():.3f}, difference {gain}"
    return Finding(verdict_of(gain), measured, {more: a.tolist(), less: b.tolist()})


# ----------------------------------------------------------------------- claims


@cache
def _chain() -> dict[str, Trial]:
    return {trial.name: trial for trial in chain(CHAIN, SEED)}


@cache
def _search(staleness: int, hot: bool = False) -> dict[str, Trial]:
    if hot and SEARCH.hot is not None:
        trials = untuned(SEARCH, staleness, SEARCH.hot, SEED)
    else:
        trials = tuned(SEARCH, staleness, SEED)
    return {trial.name: trial for trial in trials}


def _in_chain(more: str, less: str, metric: str) -> Finding:
    return difference(_chain()[more], _chain()[less], metric)


def _stale(more: str, less: str, metric: str, staleness: int = 64, hot: bool = False) -> Finding:
    found = _search(staleness, hot)
    return difference(found[more], found[less], metric)


def _measured(
    name: str, statement: str, check: Callable[[], Finding], published: str = "expected (ours)"
) -> Claim:
    return Claim(name, statement, published, "measured", check)


def _claims() -> Iterator[Claim]:
    yield _measured(
        "bias-grows",
        "the clipping bias grows with the updates since sampling (PPO, chain)",
        lambda: falls(_chain()["PPO"], "bias", -1),
        "grows before collapse",
    )
    yield _measured(
        "bias-grows-exponentially",
        "an exponential fits that growth better than a power of the updates",
        lambda: exponential_growth(_chain()["PPO"]),
        "roughly exponential",
    )
    yield _measured(
        "bias-grows-in-training",
        "it also grows from the first batch to the last (PPO, search, staleness 64, a rate too "
        "large)",
        lambda: over_training(_search(64, hot=True)["PPO"]),
        "grows before collapse",
    )
    yield _measured(
        "critic-error-grows",
        "so does the critic's part of the gradient's error",
        lambda: falls(_chain()["PPO"], "critic", -1),
        "grows before collapse",
    )
    yield _measured(
        "bias-tracks-critic-error",
        "clipping bias and critic's error rise together over the updates since sampling",
        lambda: tracks(_chain()["PPO"]),
        "tracks it",
    )
    yield _measured(
        "direction-is-lost",
        "the gradient points less and less along the exact one, the updates since sampling growing",
        lambda: falls(_chain()["PPO"], "cosine"),
    )
    for name, base in (("S-PPO", "PPO"), ("ST-PPO", "Turn-PPO")):
        yield _measured(
            f"chain-{name.lower()}",
            f"in the chain {name} is above {base} in the mean over the course",
            partial(_in_chain, name, base, "mean"),
        )
    yield _measured(
        "same-on-policy",
        "at staleness 1 corrected and uncorrected methods are the same",
        lambda: same_at_one(_search(1)),
    )
    for name in ("S-PPO", "ST-PPO"):
        for staleness in (4, 16, 64):
            yield _measured(
                f"{name.lower()}-final-{staleness}",
                f"at staleness {staleness}, own best rates, {name} ends higher than PPO",
                partial(_stale, name, "PPO", "final", staleness),
                "ends higher",
            )
        yield _measured(
            f"{name.lower()}-mean-64",
            f"at staleness 64, own best rates, {name} is above PPO in the mean over the course",
            partial(_stale, name, "PPO", "mean"),
            "ends higher",
        )
        for hot, words in ((False, "own best rates"), (True, "a rate too large")):
            yield _measured(
                f"{name.lower()}-drop-{'hot' if hot else 'own'}",
                f"at staleness 64, {words}, PPO falls deeper below its best than {name}",
                partial(_stale, "PPO", name, "drop", hot=hot),
                "prevents collapse",
            )
        yield _measured(
            f"{name.lower()}-clip",
            f"at staleness 64, a rate too large, PPO clips a larger share of tokens than {name}",
            partial(_stale, "PPO", name, "clipped", hot=True),
            "lower clip ratios throughout",
        )
        yield _measured(
            f"{name.lower()}-tail",
            f"at staleness 64, a rate too large, PPO has larger gradients (99th percentile) than "
            f"{name}",
            partial(_stale, "PPO", name, "tail", hot=True),
        )
    yield _measured(
        "st-ppo-over-all-rates",
        "at staleness 64, in the mean over all rates, ST-PPO ends higher than PPO (8 tuning seeds)",
        lambda: robust(_search(64), "ST-PPO", "PPO"),
    )
    for more, less, words in (
        ("Turn-PPO", "PPO", "barely (reviews)"),
        ("ST-PPO", "S-PPO", "no gap (reviews)"),
        ("ST-PPO", "Turn-PPO", "the correction is the active part (reviews)"),
        ("ST-PPO", "ST-PPO (8)", "not stated"),
        ("ST-PPO", "GRPO", "not shown in the paper"),
        ("ST-PPO", "GSPO", "not shown in the paper"),
    ):
        yield _measured(
            f"{more.lower()}-over-{less.lower().replace(' (', '-').rstrip(')')}",
            f"at staleness 64, own best rates, {more} ends higher than {less}",
            partial(_stale, more, less, "final"),
            words,
        )


MEASURED: tuple[Claim, ...] = tuple(_claims())
