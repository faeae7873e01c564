"""What surgery did to a model, layer by layer, and what it left alone and why."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Line:
    """One layer.

    Attributes:
        name: its path in the model.
        done: whether it was changed.
        what: what was done to it, or why nothing was.
    """

    name: str
    done: bool
    what: str


@dataclass
class Report:
    """The lines of one operation.

    Attributes:
        title: the operation.
        lines: what happened to each layer it looked at.
        notes: what the user should know about the result.
        numbers: measured values, such as the largest difference on the sample input.
    """

    title: str
    lines: list[Line] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    numbers: dict[str, float] = field(default_factory=dict)

    def did(self, name: str, what: str) -> None:
        """Add a layer that was changed."""
        self.lines.append(Line(name, True, what))

    def left(self, name: str, why: str) -> None:
        """Add a layer that was left as it was."""
        self.lines.append(Line(name, False, why))

    @property
    def changed(self) -> list[Line]:
        """The layers that were changed."""
        return [line for line in self.lines if line.done]

    @property
    def skipped(self) -> list[Line]:
        """The layers that were left, with the reason in ``what``."""
        return [line for line in self.lines if not line.done]

    def as_dict(self) -> dict[str, Any]:
        """Return the report as JSON-ready values."""
        lines = [{"name": n.name, "done": n.done, "what": n.what} for n in self.lines]
        return {"title": self.title, "lines": lines, "notes": self.notes, "numbers": self.numbers}

    def __str__(self) -> str:
        head = f"{self.title}: {len(self.changed)} layers changed, {len(self.skipped)} left"
        numbers = [f"  {name} = {value:.3g}" for name, value in self.numbers.items()]
        lines = [f"  {'+' if n.done else '-'} {n.name or '(model)'}: {n.what}" for n in self.lines]
        return "\n".join([head, *numbers, *lines, *(f"  note: {note}" for note in self.notes)])
