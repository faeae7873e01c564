"""The rubric that every judge fills: what one reply did for the user, axis by axis.

Three axes of need, from the Empathy Potential Model (EMPA, arXiv 2603.00552); the wording of the
levels is our own.

============  =========================================  ===========================================
axis          progress 1 / 2                             setback -1 / -2
============  =========================================  ===========================================
cognitive     grasps the facts of the situation, or      misses the point, advises before
(understood)  asks a fitting question about them /       understanding, interrogates /
              names what it means to this person         misreads, lectures, makes it about itself
affective     names or accepts the feeling /             passes over the feeling, cheers up with a
(felt with)   names it precisely, with its reason,       platitude / dismisses, blames, mocks
              and stays with it
proactive     affirms effort or strength, or asks what   hands out a generic list, pushes /
(able to      the person wants / joins a value or        takes over, orders, spreads hopelessness
act)          strength of theirs to a step they own
============  =========================================  ===========================================
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from normkit.errors import InputError

Axis = Literal["cognitive", "affective", "proactive"]
AXES: tuple[Axis, ...] = ("cognitive", "affective", "proactive")


@dataclass(frozen=True)
class AxisLevels:
    """Levels of one axis in one turn.

    Attributes:
        progress: 0, 1 or 2.
        setback: 0, -1 or -2.
        evidence: the words of the reply that the levels rest on.
    """

    progress: int = 0
    setback: int = 0
    evidence: str = ""

    def __post_init__(self) -> None:
        if self.progress not in (0, 1, 2):
            raise InputError(f"progress must be 0, 1 or 2, got {self.progress!r}")
        if self.setback not in (0, -1, -2):
            raise InputError(f"setback must be 0, -1 or -2, got {self.setback!r}")


@dataclass(frozen=True)
class Progress:
    """The filled rubric of one turn."""

    cognitive: AxisLevels = AxisLevels()
    affective: AxisLevels = AxisLevels()
    proactive: AxisLevels = AxisLevels()

    def __getitem__(self, axis: Axis) -> AxisLevels:
        levels: AxisLevels = getattr(self, axis)
        return levels

    def to_json(self) -> dict[str, dict[str, Any]]:
        """Return ``{axis: {"progress", "setback", "evidence"}}``."""
        return {
            axis: {
                "progress": self[axis].progress,
                "setback": self[axis].setback,
                "evidence": self[axis].evidence,
            }
            for axis in AXES
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Progress:
        """Build a filled rubric from :meth:`to_json`'s form, checking every level.

        Raises:
            InputError: when an axis or level is missing or out of range; the message names it.
        """
        axes: dict[str, AxisLevels] = {}
        for axis in AXES:
            form = data.get(axis)
            if not isinstance(form, Mapping):
                raise InputError(f"rubric: axis {axis!r} is missing or not an object")
            levels: dict[str, int] = {}
            for level in ("progress", "setback"):
                value = form.get(level)
                if isinstance(value, bool) or not isinstance(value, int):
                    raise InputError(f"rubric: {axis}.{level} must be an integer, got {value!r}")
                levels[level] = value
            try:
                axes[axis] = AxisLevels(**levels, evidence=str(form.get("evidence", "")))
            except InputError as error:
                raise InputError(f"rubric: {axis}: {error}") from None
        return cls(**axes)
