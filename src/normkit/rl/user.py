"""The simulated user: what the person says next, given what the last reply did."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from normkit.rl.environments.scenario import Scenario
from normkit.rl.judge import Failed
from normkit.rl.rubric import Progress


@dataclass(frozen=True)
class UserRequest:
    """What the simulator knows when it speaks.

    Attributes:
        scenario: who the user is and what happened.
        history: ``(user message, reply)`` of all turns so far, the latest included.
        initial: initial deficit per axis, cognitive / affective / proactive (points, <= 0).
        state: deficit per axis now.
        progress: the filled rubric of the latest reply; None where the judge failed.
        seed: seed of the session.
    """

    scenario: Scenario
    history: tuple[tuple[str, str], ...]
    initial: tuple[float, float, float]
    state: tuple[float, float, float]
    progress: Progress | None
    seed: int


class UserSimulator(Protocol):
    """Speaks for the user, a batch of sessions at a time."""

    def respond(self, requests: Sequence[UserRequest]) -> Sequence[str | Failed]:
        """Return the next message of each session, in order."""
