"""A simulated user who speaks the scenario's own lines, chosen by the state.

No model is needed, and the same dialogue always goes on in the same way: what is said next is a
function of scenario, seed, history and state.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence

from normkit.errors import InputError
from normkit.rl.rubric import AXES, Axis
from normkit.rl.user import UserRequest


class ScriptedUser:
    """Chooses the next line by what the last reply did and by what is still unmet.

    The *hurt* lines come first after a reply that set the person back on any axis. With little left
    to close, ``|min(P, 0)| <= relief |P_0|``, the *relief* lines come first. Then, and otherwise,
    the lines of the axes, the one with the largest share of its need unmet before the others. The
    first line in this order that was not said yet is spoken; where all were, the one said longest
    ago. The order within a bank of lines is drawn from scenario and seed.

    Args:
        relief: share of the initial deficit at which relief begins.

    Raises:
        InputError: where ``relief`` is not in [0, 1].
    """

    def __init__(self, relief: float = 0.3) -> None:
        if not 0 <= relief <= 1:
            raise InputError(f"relief must be in [0, 1], got {relief}")
        self.relief = relief

    def respond(self, requests: Sequence[UserRequest]) -> list[str]:
        """Return the next message of each session, in order."""
        return [self._next(request) for request in requests]

    def _next(self, request: UserRequest) -> str:
        last_use = {message: turn for turn, (message, _) in enumerate(request.history)}
        lines = [line for name in self._banks(request) for line in _shuffled(name, request)]
        # The minimum is the first of equals: of the unused lines that of the most fitting bank.
        return min(lines, key=lambda line: last_use.get(line, -1))

    def _banks(self, request: UserRequest) -> list[str]:
        """Names of the banks that fit, the most fitting first."""
        by_need = _by_need(request)
        progress = request.progress
        if progress is not None and any(progress[axis].setback < 0 for axis in AXES):
            return ["hurt", *by_need]
        unmet = math.hypot(*(min(p, 0.0) for p in request.state))
        if unmet <= self.relief * math.hypot(*request.initial):
            return ["relief", *by_need]
        return [*by_need]


def _by_need(request: UserRequest) -> list[Axis]:
    """Axes by the share of their initial need that is unmet, the largest first."""
    whole = math.hypot(*request.initial)
    share = {
        # An axis that needed nothing at first has no share of its own, but can be hurt later.
        axis: -now / (-start or whole or 1.0)
        for axis, start, now in zip(AXES, request.initial, request.state, strict=True)
    }
    return sorted(AXES, key=lambda axis: share[axis], reverse=True)


def _shuffled(name: str, request: UserRequest) -> list[str]:
    """Lines of the bank ``"hurt"``, ``"relief"`` or of an axis, in the order of this session."""
    scenario = request.scenario
    banks: dict[str, Sequence[str]] = {"hurt": scenario.hurt, "relief": scenario.relief}
    banks.update({axis: scenario.lines[axis] for axis in AXES})
    # Seeded by text, which is the same on every machine, whatever the sign or size of the seed.
    order = random.Random(f"{scenario.id}/{request.seed}/{name}")
    return order.sample(banks[name], len(banks[name]))
