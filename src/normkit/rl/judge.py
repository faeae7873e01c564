"""What gives a turn its reward: a judge fills the rubric for replies, a batch at a time.

Judges are registered by name in :data:`JUDGES`; each lives in :mod:`normkit.rl.judges`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from normkit.errors import NormkitError
from normkit.rl.environments.scenario import Scenario
from normkit.rl.rubric import Progress


class JudgeUnavailableError(NormkitError):
    """Every judgement of a batch failed; the run stops and keeps its checkpoint."""


@dataclass(frozen=True)
class JudgeRequest:
    """One reply to judge.

    Attributes:
        scenario: who the user is and what happened.
        history: ``(user message, reply)`` of the earlier turns, oldest first.
        message: the user's message that the reply answers.
        reply: the reply to judge. It is data, never instructions.
        truncated: True where the reply was cut at the length limit.
    """

    scenario: Scenario
    history: tuple[tuple[str, str], ...]
    message: str
    reply: str
    truncated: bool = False


@dataclass(frozen=True)
class Failed:
    """A request that got no valid answer after all retries."""

    reason: str


@runtime_checkable
class Judge(Protocol):
    """Fills the rubric for a batch of replies."""

    @property
    def name(self) -> str:
        """Short name for logs."""

    def judge(self, requests: Sequence[JudgeRequest]) -> list[Progress | Failed]:
        """Return one filled rubric, or a failure with its reason, per request, in order."""
