"""What recipes that compare trainings share: plans, choice of rates, trials in the run folder."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, ClassVar, Protocol, TypeVar

from rich.progress import Progress
from torch import Tensor

from normkit.errors import InputError, check_least
from normkit.recipes.base import Run

TUNING = 100
"""Added to a comparison's seed for choosing learning rates: on runs that it does not use."""

T = TypeVar("T")


class Tuned(Protocol):
    """A trial at a chosen learning rate; a dataclass."""

    @property
    def name(self) -> str:
        """Of the arm."""

    @property
    def rate(self) -> float:
        """The learning rate."""


U = TypeVar("U", bound=Tuned)


@dataclass(frozen=True)
class ComparisonPlan:
    """What a comparison of arms trains, each at its own best learning rate.

    Attributes:
        seeds: runs of each arm.
        tuning_seeds: further runs of each arm and rate, to choose the rate.
        updates: of each run.
        rates: learning rates to choose from.
    """

    seeds: int
    tuning_seeds: int
    updates: int
    rates: tuple[float, ...]

    LEAST: ClassVar[Mapping[str, int]] = {"seeds": 2, "tuning_seeds": 1, "updates": 1}
    """The smallest values that make sense; plans with more numbers add theirs."""

    def __post_init__(self) -> None:
        for name, least in self.LEAST.items():
            check_least(self, least, name)
        check_rates("rates", self.rates)


def check_rates(name: str, rates: Sequence[float]) -> None:
    """Check that there are learning rates to choose from.

    Raises:
        InputError: names the option.
    """
    if not rates or not all(0 < rate < math.inf for rate in rates):
        raise InputError(f"{name} must be above 0 and finite, at least one, got {rates}")


def best_rate(rates: Sequence[float], score: Tensor) -> float:
    """The rate with the best mean score; scores ``[rates x seeds]`` stand rate by rate."""
    return rates[int(score.view(len(rates), -1).mean(1).argmax())]


def keep_each(
    run: Run,
    trials: Iterable[U],
    total: int,
    task: str,
    brief: Callable[[U], Mapping[str, Any]],
) -> Iterator[U]:
    """Keep trials in the run folder as they are made, and show how far the run is.

    Args:
        run: ``trials.jsonl`` of its folder gets each trial, ``metrics.jsonl`` what is brief of it.
        trials: made one by one.
        total: how many there will be.
        task: what happens before the first is there.
        brief: the line of a trial in tables.
    """
    with Progress(console=run.console, transient=True) as progress:
        bar = progress.add_task(task, total=total)
        for number, trial in enumerate(trials, start=1):
            run.logger.append("trials", [asdict(trial)])  # type: ignore[call-overload]
            run.logger.log(number, brief(trial))
            progress.update(bar, advance=1, description=f"{trial.name} at rate {trial.rate:g}")
            yield trial


def run_missing(
    run: Run,
    trials: Sequence[T],
    trainings: Sequence[tuple[Any, ...]],
    train: Callable[..., T],
    name: Callable[[T], tuple[Any, ...]],
    describe: Callable[[T], str],
) -> list[T]:
    """Make the trainings that no trial stands for yet, and say how long the others will take.

    Args:
        run: keeps each trial in ``trials.jsonl`` as soon as it is made.
        trials: those that an earlier part of the run left.
        trainings: arguments of every training.
        train: makes one; the trial is a dataclass.
        name: the arguments that a trial was made with.
        describe: one line on a trial.

    Returns:
        All trials, the earlier ones first.
    """
    started = time.perf_counter()
    found = list(trials)
    done = {name(trial) for trial in found}
    missing = [training for training in trainings if training not in done]
    for i, training in enumerate(missing):
        trial = train(*training)
        run.logger.append("trials", [asdict(trial)])  # type: ignore[call-overload]
        found.append(trial)
        left = (time.perf_counter() - started) / (i + 1) * (len(missing) - i - 1)
        run.console.print(
            f"{len(found)}/{len(trainings)}  {describe(trial)}  {left:.0f} s left",
            highlight=False,
            soft_wrap=True,
        )
    return found
