"""Figures of a benchmark: one value per item, from which means and paired differences follow."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from normkit.errors import NormkitError
from normkit.rl.chat import ChatModel, Message
from normkit.rl.judge import Failed
from normkit.statistics import Interval, bootstrap_interval

Report: TypeAlias = Callable[[int, int], None]
"""Called with the pieces of work done and all there are."""

_CHUNK = 32
"""Conversations that a model is given at once: between two chunks, progress is reported."""


@dataclass(frozen=True)
class Measure:
    """One figure of a benchmark.

    Attributes:
        name: what is measured, such as ``"EmoBench EA en"``.
        values: value of each item by its name; NaN where it has none, which is then left out.
    """

    name: str
    values: Mapping[str, float]

    def interval(self) -> Interval | None:
        """Mean over the items with a 95% bootstrap interval; None where no item has a value."""
        return _interval(list(self.values.values()))

    def gain_over(self, other: Measure) -> Interval | None:
        """Mean paired difference to another model's, over the items that both have a value of."""
        shared = self.values.keys() & other.values.keys()
        return _interval([self.values[item] - other.values[item] for item in sorted(shared)])


@dataclass(frozen=True)
class Outcome:
    """What one benchmark found about one model.

    Attributes:
        measures: its figures, the headline first.
        counts: how many answers were asked for, were unreadable, and so on.
        notes: sentences that whoever reads the figures must know.
        records: every item with what was said, JSON-ready.
    """

    measures: tuple[Measure, ...]
    counts: Mapping[str, int]
    notes: tuple[str, ...]
    records: tuple[Mapping[str, Any], ...]


def complete_all(
    chat: ChatModel, conversations: Sequence[Sequence[Message]], report: Report | None = None
) -> list[str | Failed]:
    """Ask a model for the answer to every conversation, and report how far it is.

    Args:
        chat: the model.
        conversations: what to answer, each ending with the user's message.
        report: told how many answers have come, of how many.

    Returns:
        The answer, or the failure with its reason, per conversation, in order.

    Raises:
        NormkitError: where no conversation got an answer.
    """
    answers: list[str | Failed] = []
    for start in range(0, len(conversations), _CHUNK):
        answers += chat.complete(conversations[start : start + _CHUNK])
        if report is not None:
            report(len(answers), len(conversations))
    check_answered(chat.name, answers)
    return answers


def check_answered(name: str, answers: Sequence[object]) -> None:
    """Stop where every answer failed.

    Raises:
        NormkitError: with the reason of the last failure.
    """
    failures = [answer for answer in answers if isinstance(answer, Failed)]
    if failures and len(failures) == len(answers):
        raise NormkitError(f"{name} answered nothing; the last reason: {failures[-1].reason}")


def _interval(values: Sequence[float]) -> Interval | None:
    known = [value for value in values if math.isfinite(value)]
    return bootstrap_interval(known) if known else None
