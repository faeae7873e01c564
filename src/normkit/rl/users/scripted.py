"""A simulated user who speaks the scenario's own lines, chosen by the state."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from normkit.rl.environments.scenario import Scenario
from normkit.rl.rubric import AXES
from normkit.rl.user import UserRequest


class ScriptedUser:
    """Chooses the next line by what the last reply did and by what is still unmet.

    After a setback the person says one of the ``hurt`` lines. With little left to close
    (``|P| <= relief |P_0|``) one of ``relief``. Otherwise a line of the axis whose need is the
    largest share of its initial size. Lines are not repeated while any is unused; then the one
    used longest ago comes back. The same request always gets the same answer.

    Args:
        relief: share of the initial deficit at which relief begins.
    """

    def __init__(self, relief: float = 0.3) -> None:
        self.relief = relief

    def respond(self, requests: Sequence[UserRequest]) -> list[str]:
        """Return the next message of each session, in order."""
        return [self._next(request) for request in requests]

    def _next(self, request: UserRequest) -> str:
        scenario, said = request.scenario, [message for message, _ in request.history]
        for bank in self._banks(request):
            order = np.random.default_rng([request.seed, len(bank)]).permutation(len(bank))
            for line in (bank[int(i)] for i in order):
                if line not in said:
                    return line
        return min(_all_lines(scenario), key=lambda line: _last_use(line, said))

    def _banks(self, request: UserRequest) -> list[tuple[str, ...]]:
        scenario, progress = request.scenario, request.progress
        left = [
            min(p, 0.0) / p0 if p0 else 0.0
            for p, p0 in zip(request.state, request.initial, strict=True)
        ]
        by_need = [
            scenario.lines[AXES[i]] for i in sorted(range(3), key=lambda i: left[i], reverse=True)
        ]
        if progress is not None and any(progress[axis].setback < 0 for axis in AXES):
            return [scenario.hurt, *by_need]
        unmet = math.hypot(*(min(p, 0.0) for p in request.state))
        if unmet <= self.relief * math.hypot(*request.initial):
            return [scenario.relief, *by_need]
        return by_need


def _all_lines(scenario: Scenario) -> list[str]:
    return [line for axis in AXES for line in scenario.lines[axis]]


def _last_use(line: str, said: Sequence[str]) -> int:
    return max(i for i, message in enumerate(said) if message == line)
