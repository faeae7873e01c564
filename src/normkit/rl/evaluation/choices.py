"""Questions with given choices: shuffling, reading answers, voting."""

from __future__ import annotations

import json
import random
import re
import string
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

LETTERS = string.ascii_uppercase

_OBJECT = re.compile(r"\{[^{}]*\}")
_LETTER = re.compile(r"\(?([A-Z])(?:\s*[).:,、）：]\s*(.*))?", re.DOTALL | re.IGNORECASE)
_DRESS = " \t\r\n*_`\"'“”"
"""What models dress their answers in."""


@dataclass(frozen=True)
class Question:
    """A question with one right choice.

    Attributes:
        key: its name in an answer.
        choices: the texts to choose from, in the file's order; they differ.
        label: index of the right one.
    """

    key: str
    choices: tuple[str, ...]
    label: int

    def shuffled(self, seed: str) -> tuple[int, ...]:
        """Return the indices of the choices in the order to show them, the same for a seed."""
        # Seeded by text, which random hashes the same way everywhere.
        return tuple(random.Random(seed).sample(range(len(self.choices)), len(self.choices)))

    def listed(self, order: Sequence[int]) -> str:
        """Return the choices in an order, one a line, behind letters."""
        lines = [f"{LETTERS[i]}) {self.choices[j]}" for i, j in enumerate(order)]
        return "\n".join(lines)

    def read(self, text: str, order: Sequence[int]) -> int | None:
        """Return the index of the choice that a text names, or None where it names none.

        A choice is named by its letter, by its text, or by both if they agree. Case, punctuation
        and the asterisks or quotation marks around do not matter; any other word does.

        Args:
            text: what stands for the answer to this question.
            order: the order in which the choices were shown.
        """
        text = text.strip(_DRESS)
        same = [j for j in order if _plain(self.choices[j]) == _plain(text)]
        if len(same) == 1:
            return same[0]
        found = _LETTER.fullmatch(text)
        if found is None:
            return None
        position = LETTERS.index(found[1].upper())
        if position >= len(order):
            return None
        beside, chosen = _plain(found[2] or ""), order[position]
        return chosen if beside in ("", _plain(self.choices[chosen])) else None


def read_answers(
    text: str, questions: Sequence[Question], orders: Sequence[Sequence[int]]
) -> tuple[int | None, ...]:
    """Read the answers to one or several questions out of a model's reply.

    The reply holds a JSON object with the questions' keys (prose and code fences around it are let
    through), or lines ``key: answer``, or, where there is one question, nothing but the answer.
    Objects or lines that contradict each other are no answer.

    Args:
        text: the reply.
        questions: the questions, in order.
        orders: the order in which each question's choices were shown.

    Returns:
        Index of the chosen choice per question; None where there is no readable answer.
    """
    objects = _objects(text)
    answers = []
    for question, order in zip(questions, orders, strict=True):
        said = [found[question.key] for found in objects if question.key in found]
        if not said:
            line = rf"^[\s*_-]*{question.key}[\s*_]*[:：](.+)$"
            said = re.findall(line, text, re.IGNORECASE | re.MULTILINE)
        if not said and len(questions) == 1:
            said = [text]
        named = {question.read(answer, order) for answer in said}
        answers.append(named.pop() if len(named) == 1 else None)
    return tuple(answers)


def vote(answers: Sequence[int | None]) -> int | None:
    """Return the answer given most often; the earliest of those that tie; None if there is none."""
    given = Counter(answer for answer in answers if answer is not None)
    # Counter keeps the order of first appearance among equal counts.
    return given.most_common(1)[0][0] if given else None


def _objects(text: str) -> list[Mapping[str, str]]:
    """The JSON objects of a reply as texts by lower-case key; nested ones are not looked into."""
    objects: list[Mapping[str, str]] = []
    for part in _OBJECT.findall(text):
        try:
            found = json.loads(part)
        except ValueError:
            continue
        objects.append({key.strip().lower(): str(value) for key, value in found.items()})
    return objects


def _plain(text: str) -> str:
    return " ".join(re.findall(r"\w+", text.casefold()))
