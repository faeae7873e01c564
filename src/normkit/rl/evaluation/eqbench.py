r"""EQ-Bench, version 2: how strongly does a character of a dialogue feel each of four emotions?

EQ-Bench: An Emotional Intelligence Benchmark for Large Language Models (Paech, 2023), arXiv
2312.06281; 171 questions with the full-scale scoring of version 2. EQ-Bench 3 (role-play, judged)
is another benchmark. Question files are read from a user's copy; none is part of normkit.

An answer has four ratings of 0 to 10. With d the distance of one to its reference,

    f(d) = 0 for d = 0;  6.5 / (1 + exp(-1.2 (d - 4))) for d <= 5;  d above
    score = 100 - 7.477 sum f(d)   (percent; about 0 for random answers, below 0 for worse ones)

Answers are read as the official scorer does: whole numbers behind ``name:``, the last one where a
name comes twice, and exactly the four names of the reference. Questions without such an answer are
left out of the mean and counted. Differences: the headings may be written in any case, and an
unreadable answer is not asked for again.
"""

from __future__ import annotations

import ast
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from normkit.errors import InputError
from normkit.rl.chat import ChatModel
from normkit.rl.evaluation.measure import Measure, Outcome, Report, complete_all
from normkit.rl.json_fields import Field, read_json, read_json_lines
from normkit.rl.judge import Failed

VERSION = "EQ-Bench v2"
LEAST_PARSED = 0.8333
"""Share of readable answers below which the official run counts as failed."""

_ADJUSTMENT = 0.7477
_LONGEST = 10_000
_FIRST = re.compile(r"first pass scores:(.*?)revised scores:", re.DOTALL | re.IGNORECASE)
_REVISED = re.compile(r"revised scores:(.*)", re.DOTALL | re.IGNORECASE)


@dataclass(frozen=True)
class Item:
    """One question.

    Attributes:
        qid: its name.
        prompt: what the model is asked, as the file has it.
        reference: intensity of each of the four emotions, 0 to 10.
    """

    qid: str
    prompt: str
    reference: Mapping[str, float]

    @property
    def revises(self) -> bool:
        """Whether the prompt asks for a first pass, a critique and revised scores."""
        return "revised scores:" in self.prompt.lower()


def read_eqbench(path: str | Path) -> list[Item]:
    """Read a question file.

    It is a JSON object of questions by name (the official form), a JSON list, or JSON lines (the
    harness form); a question has ``prompt`` and ``reference_answer_fullscale``, which is an object
    or a text that spells one as a Python literal.

    Raises:
        InputError: with the file, line and field that is wrong.
    """
    path = Path(path)
    if path.suffix == ".jsonl":
        rows = list(enumerate(read_json_lines(path), start=1))
        questions = {str(i): row for i, row in rows}
    else:
        whole = read_json(path)
        if isinstance(whole.value, list):
            questions = {str(i): row for i, row in enumerate(whole, start=1)}
        else:
            questions = {name: whole[name] for name in whole.mapping()}
    if not questions:
        raise InputError(f"{path} must hold at least one question, got none")
    return [_item(name, row) for name, row in questions.items()]


def _item(qid: str, row: Field) -> Item:
    answer = _literal(row["reference_answer_fullscale"])
    reference = {}
    for i in range(1, 5):
        score = answer[f"emotion{i}_score"]
        value = _number(score)
        if not 0 <= value <= 10:
            raise score.wrong("a number from 0 to 10")
        name = answer[f"emotion{i}"]
        if not re.fullmatch(r"\w+", name.text()):
            raise name.wrong("one word")
        reference[name.value] = value
    if len(reference) < 4:
        raise answer.wrong("an object with four different emotions")
    return Item(qid, row["prompt"].text(), reference)


def _literal(field: Field) -> Field:
    """The mapping that a field holds, or spells as a Python literal; nothing is evaluated."""
    if not isinstance(field.value, str):
        field.mapping()
        return field
    try:
        if len(field.value) > _LONGEST:
            raise ValueError
        value = ast.literal_eval(field.value.strip())
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        raise field.wrong("an object, or a text that spells one") from None
    if not isinstance(value, dict):
        raise field.wrong("an object, or a text that spells one")
    return Field(value, field.file, field.name)


def _number(field: Field) -> float:
    # The official file has some references as texts.
    if isinstance(field.value, str) and re.fullmatch(r"\d+(\.\d+)?", field.value.strip()):
        return float(field.value)
    return field.number()


# ---------------------------------------------------------------------- scoring


def read_ratings(text: str, item: Item) -> tuple[dict[str, float] | None, dict[str, float] | None]:
    """Read the ratings of a reply.

    Args:
        text: the reply.
        item: the question, which says whether revised ratings are asked for.

    Returns:
        The first and the revised ratings by emotion; None for each that cannot be read, and for the
        revised ones where they are not asked for.
    """
    if not item.revises:
        return _ratings(text, item), None
    first, revised = _FIRST.search(text), _REVISED.search(text)
    return (
        _ratings(first[1], item) if first else None,
        _ratings(revised[1], item) if revised else None,
    )


def _ratings(text: str, item: Item) -> dict[str, float] | None:
    found = {name: float(score) for name, score in re.findall(r"(\w+):\s+(\d+)", text)}
    return found if found.keys() == item.reference.keys() else None


def scaled_difference(d: float) -> float:
    """Penalty for a rating that is d >= 0 away from its reference (see the module)."""
    if d == 0:
        return 0.0
    return d if d > 5 else 6.5 / (1 + math.exp(-1.2 * (d - 4)))


def question_score(ratings: Mapping[str, float], reference: Mapping[str, float]) -> float:
    """Score of one answer in percent; not floored at 0.

    Args:
        ratings: the model's rating of each emotion.
        reference: the reference's, over the same names.
    """
    total = sum(scaled_difference(abs(ratings[name] - reference[name])) for name in reference)
    return 10 * (10 - _ADJUSTMENT * total)


def score_eqbench(items: Sequence[Item], replies: Sequence[str]) -> list[Measure]:
    """Score replies.

    Args:
        items: the questions.
        replies: what the model said to each.

    Returns:
        The official score, then that of the first and of the revised ratings. The official one is
        the revised one where that is at least as high and has at least 95% as many readable
        answers, else that of the first ratings.
    """
    first: dict[str, float] = {}
    revised: dict[str, float] = {}
    for item, reply in zip(items, replies, strict=True):
        for values, ratings in zip((first, revised), read_ratings(reply, item), strict=True):
            values[item.qid] = question_score(ratings, item.reference) if ratings else math.nan
    chosen = revised if _official(_known(revised), _known(first)) else first
    measures = [Measure(VERSION, chosen), Measure(f"{VERSION} first pass", first)]
    if any(item.revises for item in items):
        measures.append(Measure(f"{VERSION} revised", revised))
    return measures


def _official(revised: list[float], first: list[float]) -> bool:
    """Whether the official score is that of the revised ratings."""
    means = [math.fsum(values) / len(values) if values else 0.0 for values in (revised, first)]
    return bool(revised) and means[0] >= means[1] and len(revised) >= 0.95 * len(first)


def _known(values: Mapping[str, float]) -> list[float]:
    return [value for value in values.values() if not math.isnan(value)]


# ---------------------------------------------------------------------- running a model


def ask_eqbench(chat: ChatModel, items: Sequence[Item], report: Report | None = None) -> Outcome:
    """Let a model answer every question once and score it.

    Args:
        chat: the model.
        items: the questions.
        report: told how many answers have come, of how many.

    Returns:
        The scores of :func:`score_eqbench`, counts, notes, and a record per question.

    Raises:
        NormkitError: where the model answers nothing at all.
    """
    conversations = [[{"role": "user", "content": item.prompt.strip()}] for item in items]
    answers = complete_all(chat, conversations, report)
    replies = ["" if isinstance(answer, Failed) else answer for answer in answers]
    failed = [answer.reason for answer in answers if isinstance(answer, Failed)]
    measures = score_eqbench(items, replies)
    parsed = len(_known(measures[0].values))
    notes = [f"{VERSION}: {parsed} of {len(items)} answers could be read; the others are left out"]
    if parsed < LEAST_PARSED * len(items):
        notes.append(
            f"{VERSION}: under 83% of the answers could be read; the official benchmark gives no "
            "score then, and this one must not be compared with published scores"
        )
    if failed:
        notes.append(f"{VERSION}: {len(failed)} of {len(items)} requests failed: {failed[0]}")
    records: list[dict[str, Any]] = [
        {"qid": item.qid, "score": measures[0].values[item.qid], "reply": reply}
        for item, reply in zip(items, replies, strict=True)
    ]
    counts = {"answers": len(items), "failed": len(failed), "parsed": parsed}
    return Outcome(tuple(measures), counts, tuple(notes), tuple(records))
