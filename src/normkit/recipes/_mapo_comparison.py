"""All estimators side by side in the tabular world, and how far each estimate is from the truth.

Every estimator gets the same: 64 dialogues an update, the same starts and luck by seed, the same
grid of learning rates. Its own best rate is chosen on seeds that are used for nothing else; both
comparisons, at the best rate of each and at one rate for all, are made. Discounts and constants are
the estimators' defaults, that is, their papers' or their authors' scripts'.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from normkit.recipes._trials import ComparisonPlan, best_rate
from normkit.rl.environments.tabular import TabularWorld
from normkit.rl.tabular import Probe, ascend, probe, train

Choice = Literal["own", "equal"]
Options = Mapping[str, Mapping[str, Any]]

NAMES = (
    "mapo",
    "turn",
    "batch",
    "batch-returns",
    "grpo",
    "rloo",
    "reinforce",
    "reinforce++",
    "gigpo",
    "turn-baseline",
    "grpo-turn",
    "ppo",
)


@dataclass(frozen=True)
class Plan(ComparisonPlan):
    """What is compared.

    With 8 tuning seeds the choice of rates was a matter of luck: neighbouring rates differ by less
    than the error of the mean.

    Attributes:
        names: estimators.
        horizons: dialogue lengths.
        group_sizes: dialogues per start; rates are tuned, and compared at one rate, at the first.
        equal_rate: the rate of the comparison at one rate for all.
        share: of the way to the optimum, where estimates are compared with the truth.
    """

    seeds: int = 32
    tuning_seeds: int = 32
    updates: int = 40
    rates: tuple[float, ...] = (0.1, 0.2, 0.4, 0.8, 1.6)
    names: Sequence[str] = NAMES
    horizons: Sequence[int] = (2, 5, 10, 20)
    group_sizes: Sequence[int] = (4, 8, 16)
    equal_rate: float = 0.4
    share: float = 0.5

    @property
    def trials(self) -> int:
        """Estimators by horizons by group sizes, the first of which has two choices of rate."""
        return len(self.names) * len(self.horizons) * (len(self.group_sizes) + 1)


@dataclass(frozen=True)
class Trial:
    """One estimator at one horizon, group size and choice of learning rate.

    Values are shares of the optimal return; lists have one element per seed, and seed i of one
    estimator had the starts and luck of seed i of another.

    Attributes:
        name: the estimator.
        horizon: turns at most.
        group_size: dialogues per start.
        choice: "own" best rate or the "equal" one.
        rate: the learning rate.
        final: exact value of the trained policy.
        success: exact probability of success of the trained policy.
        area: mean over the updates of the dialogues' return.
        grad_norm: largest gradient norm of the run.
        curve: return of the dialogues by update, a list of seeds each.
        correlation: of the estimated with the exact advantage, per batch of dialogues.
        cosine: of the estimated with the exact gradient, per batch of dialogues.
    """

    name: str
    horizon: int
    group_size: int
    choice: Choice
    rate: float
    final: list[float]
    success: list[float]
    area: list[float]
    grad_norm: list[float]
    curve: list[list[float]]
    correlation: list[float]
    cosine: list[float]

    @property
    def spread(self) -> float:
        """Standard deviation of ``final`` over the seeds."""
        return float(torch.tensor(self.final, dtype=torch.float64).std(correction=0))


@dataclass(frozen=True)
class Facts:
    """What is known of the world at one horizon: returns in points, survivors by turn."""

    horizon: int
    states: int
    optimum: float
    myopic: float
    uniform: float
    survivors: list[float]


def compare(plan: Plan, options: Options, seed: int = 0) -> Iterator[Facts | Trial]:
    """Train and probe all estimators; yields the facts of a horizon, then its trials one by one.

    Args:
        plan: what to compare.
        options: of the estimators.
        seed: of everything.
    """
    for horizon in plan.horizons:
        world = TabularWorld(horizon)
        halfway = ascend(world, plan.share)
        best: dict[str, float] = {}
        for group_size in plan.group_sizes:
            # Four streams of random numbers, apart for every seed, horizon and group size.
            stream = 4 * (seed * 1_000_000 + horizon * 1000 + group_size)
            probes = probe(
                world, halfway, plan.names, plan.seeds, group_size, stream, options=options
            )
            if not best:
                yield _facts(world, probes[plan.names[0]])
            for name in plan.names:
                own = options.get(name, {})
                if name not in best:
                    best[name] = _tune(world, name, plan, group_size, stream + 1, own)
                    choices = {"own": best[name], "equal": plan.equal_rate}
                else:
                    choices = {"own": best[name]}
                yield from _trials(
                    world, name, choices, plan, group_size, stream + 2, own, probes[name]
                )


def _facts(world: TabularWorld, found: Probe) -> Facts:
    uniform = torch.full((1, world.situations, world.replies), 1 / world.replies)
    return Facts(
        world.horizon,
        world.states,
        _optimum(world),
        float(world.start @ world.plan(myopic=True)),
        float(world.outcome(uniform)[0]),
        found.survivors.tolist(),
    )


def _optimum(world: TabularWorld) -> float:
    return float(world.start @ world.plan())


def _tune(
    world: TabularWorld, name: str, plan: Plan, group_size: int, seed: int, own: Mapping[str, Any]
) -> float:
    """The rate of the grid with the best mean final return over the tuning seeds."""
    rates = torch.tensor(plan.rates, dtype=torch.float64).repeat_interleave(plan.tuning_seeds)
    found = train(world, name, rates, plan.updates, group_size, seed, options=own)
    final, _ = world.outcome(found.policy)
    return best_rate(plan.rates, final)


def _trials(
    world: TabularWorld,
    name: str,
    choices: Mapping[str, float],
    plan: Plan,
    group_size: int,
    seed: int,
    own: Mapping[str, Any],
    found: Probe,
) -> list[Trial]:
    rates = torch.tensor(list(choices.values()), dtype=torch.float64)
    history = train(
        world,
        name,
        rates.repeat_interleave(plan.seeds),
        plan.updates,
        group_size,
        seed,
        options=own,
    )
    best = _optimum(world)
    final, success = world.outcome(history.policy)
    curve = history.gain.double() / best

    def seeds(values: Tensor, place: int) -> Any:
        return values[..., place * plan.seeds : (place + 1) * plan.seeds].tolist()

    return [
        Trial(
            name=name,
            horizon=world.horizon,
            group_size=group_size,
            choice=choice,  # type: ignore[arg-type]
            rate=rate,
            final=seeds(final / best, i),
            success=seeds(success, i),
            area=seeds(curve.mean(0), i),
            grad_norm=seeds(history.grad_norm.amax(0), i),
            curve=seeds(curve, i),
            correlation=found.correlation.tolist(),
            cosine=found.cosine.tolist(),
        )
        for i, (choice, rate) in enumerate(choices.items())
    ]
