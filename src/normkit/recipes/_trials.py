"""Trainings of a recipe one after the other, each kept as a line of the run folder."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any, TypeVar

from rich.console import Console

from normkit.runs import RunLogger

T = TypeVar("T")


def run_missing(
    trials: Sequence[T],
    trainings: Sequence[tuple[Any, ...]],
    train: Callable[..., T],
    name: Callable[[T], tuple[Any, ...]],
    describe: Callable[[T], str],
    logger: RunLogger,
    console: Console,
) -> list[T]:
    """Make the trainings that no trial stands for yet, and say how long the others will take.

    Args:
        trials: those that an earlier part of the run left.
        trainings: arguments of every training.
        train: makes one; the trial is a dataclass.
        name: the arguments that a trial was made with.
        describe: one line on a trial.
        logger: keeps each trial in ``trials.jsonl`` as soon as it is made.
        console: where progress goes.

    Returns:
        All trials, the earlier ones first.
    """
    started = time.perf_counter()
    found = list(trials)
    done = {name(trial) for trial in found}
    missing = [training for training in trainings if training not in done]
    for i, training in enumerate(missing):
        trial = train(*training)
        logger.append("trials", [asdict(trial)])  # type: ignore[call-overload]
        found.append(trial)
        left = (time.perf_counter() - started) / (i + 1) * (len(missing) - i - 1)
        console.print(
            f"{len(found)}/{len(trainings)}  {describe(trial)}  {left:.0f} s left",
            highlight=False,
            soft_wrap=True,
        )
    return found
