"""Scenarios of the emotional-support world: who the user is, what happened, what is needed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from normkit.rl.rubric import Axis

INDICATORS = ("C.1", "C.2", "C.3", "A.1", "A.2", "A.3", "P.1", "P.2", "P.3")
CATEGORIES = ("living", "health", "leisure", "beliefs", "relationships", "career")


@dataclass(frozen=True)
class Persona:
    """The simulated user.

    Attributes:
        name: first name.
        age: in years.
        about: one or two sentences about the person.
        voice: how the person talks.
        threshold: how easily the person feels understood: "low", "medium" or "high".
    """

    name: str
    age: int
    about: str
    voice: str
    threshold: str


@dataclass(frozen=True)
class Scenario:
    """One situation that a user brings.

    Attributes:
        id: unique name in kebab-case.
        category: one of :data:`CATEGORIES`.
        persona: who speaks.
        situation: what happened, in the third person.
        needs: what the person hopes for from a listener (known to judge and simulator only).
        deficit: the filled initial-deficit form, indicator to level 0..3 (:data:`INDICATORS`).
        points: axis to short sentences that a fitting reply would touch on.
        opening: the user's first message.
        lines: axis to messages spoken while that need is the largest one left.
        hurt: messages spoken after a reply that set the person back.
        relief: messages spoken when little is left to close.
    """

    id: str
    category: str
    persona: Persona
    situation: str
    needs: str
    deficit: Mapping[str, int]
    points: Mapping[Axis, tuple[str, ...]]
    opening: str
    lines: Mapping[Axis, tuple[str, ...]]
    hurt: tuple[str, ...]
    relief: tuple[str, ...]
