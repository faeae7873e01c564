"""EmoBench: multiple-choice questions on understanding emotions and on acting upon them.

EmoBench: Evaluating the Emotional Intelligence of Large Language Models (Sabour et al., ACL 2024),
arXiv 2402.12071. A folder has ``EA.jsonl`` (emotional application: the most effective action or
response) and ``EU.jsonl`` (emotional understanding: the emotion and its cause), in English and
Chinese. Files are read from a user's copy; none is part of normkit, and the prompts are our own.

Differences from the authors' code: the choices are shuffled, anew in every repeat, and the answers
of the repeats are voted on; answers are decoded greedily; a letter or a choice's text is read as
well as JSON; the emotion and the cause are also scored each for itself; and small models, which
seldom keep to a form, can be scored by the likelihood that they give to the choices.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeAlias

from normkit.errors import InputError
from normkit.rl.chat import ChatModel, Message
from normkit.rl.evaluation.choices import LETTERS, Question, read_answers, vote
from normkit.rl.evaluation.measure import Measure, Outcome, Report, complete_all
from normkit.rl.json_fields import Field, read_json_lines
from normkit.rl.judge import Failed

Language: TypeAlias = Literal["en", "zh"]
Task: TypeAlias = Literal["EA", "EU"]
LikelihoodScorer: TypeAlias = Callable[[str, Sequence[str]], list[float]]
"""Log-likelihoods of the answers to a prompt, comparable with each other."""


@dataclass(frozen=True)
class Item:
    """One row of EmoBench.

    Attributes:
        task: "EA" or "EU".
        qid: name of the row in its file and language.
        language: "en" or "zh".
        category: the coarse category.
        kind: "Action" or "Response" (EA), or the fine-grained category (EU).
        scenario: what happened.
        subject: whom the questions are about.
        questions: ``answer`` (EA), or ``emotion`` and ``cause`` (EU).
    """

    task: Task
    qid: str
    language: Language
    category: str
    kind: str
    scenario: str
    subject: str
    questions: tuple[Question, ...]


Answers: TypeAlias = tuple[int | None, ...]
"""Index of the chosen choice of each question of an item; None where there is no answer."""


# ---------------------------------------------------------------------- reading


def read_emobench(folder: str | Path) -> list[Item]:
    """Read ``EA.jsonl`` and ``EU.jsonl`` of a folder, or the one of them that is there.

    Raises:
        InputError: where neither is there; or with the file, line and field that is wrong.
    """
    folder = Path(folder)
    tasks: tuple[Task, ...] = ("EA", "EU")
    found = [task for task in tasks if (folder / f"{task}.jsonl").is_file()]
    if not found:
        raise InputError(f"emobench: {folder} must be a folder with EA.jsonl or EU.jsonl")
    return [item for task in found for item in _read_file(folder / f"{task}.jsonl", task)]


def _read_file(path: Path, task: Task) -> Iterator[Item]:
    rows = read_json_lines(path)
    if not rows:
        raise InputError(f"{path} must hold one question a line, got an empty file")
    seen: set[tuple[str, str]] = set()
    for row in rows:
        item = _item(row, task)
        if (item.language, item.qid) in seen:
            raise row["qid"].wrong(f"different from the other rows of language {item.language}")
        seen.add((item.language, item.qid))
        yield item


def _item(row: Field, task: Task) -> Item:
    language = row["language"]
    if language.value not in ("en", "zh"):
        raise language.wrong("en or zh")
    questions: tuple[Question, ...]
    if task == "EA":
        category, kind = row["category"], row["question type"]
        if kind.value not in ("Action", "Response"):
            raise kind.wrong("Action or Response")
        questions = (_question(row, "answer", "choices", "label"),)
    else:
        category, kind = row["coarse_category"], row["finegrained_category"]
        questions = (
            _question(row, "emotion", "emotion_choices", "emotion_label"),
            _question(row, "cause", "cause_choices", "cause_label"),
        )
    qid = row["qid"]
    return Item(
        task=task,
        qid=str(qid.value) if isinstance(qid.value, int) else qid.text(),
        language=language.value,
        category=category.text(),
        kind=kind.text(),
        scenario=row["scenario"].text(),
        subject=row["subject"].text(),
        questions=questions,
    )


def _question(row: Field, key: str, choices: str, label: str) -> Question:
    texts = [choice.text() for choice in row[choices]]
    if not 2 <= len(texts) <= len(LETTERS) or len(set(texts)) < len(texts):
        raise row[choices].wrong(f"a list of 2 to {len(LETTERS)} texts that differ")
    if row[label].text() not in texts:
        raise row[label].wrong(f"one of {choices}")
    return Question(key, tuple(texts), texts.index(row[label].value))


# ---------------------------------------------------------------------- asking

_ASKED: dict[Language, dict[str, str]] = {
    "en": {
        "Action": "What is the most helpful thing that {subject} can do?",
        "Response": "What is the most helpful thing that {subject} can say or show in return?",
        "emotion": "What does {subject} feel in the end?",
        "cause": "Why does {subject} feel that way?",
        "letter": "Think about what the people in the story feel, know and want. Then answer with "
        "letters alone, as a JSON object of this form and nothing else: {form}",
        "form": "<letter>",
        "text": "Answer with the words of the right choice and nothing else.",
    },
    "zh": {
        "Action": "{subject}能做的最有帮助的事是什么？",
        "Response": "{subject}最有帮助的回应是什么？",
        "emotion": "{subject}最后的感受是什么？",
        "cause": "{subject}为什么会有这样的感受？",
        "letter": "请体会故事中各人的感受、想法和愿望，然后只用字母作答，"
        "除下面格式的 JSON 对象外不要写任何内容：{form}",
        "form": "<字母>",
        "text": "请只写出正确选项的原文。",
    },
}


def item_orders(item: Item, seed: int, repeat: int) -> tuple[tuple[int, ...], ...]:
    """Return the order in which each question of an item shows its choices in a repeat.

    Args:
        item: the row.
        seed: of all orders; an item's own depend on its name too, not on its place in a list.
        repeat: which asking.

    Returns:
        For each question the indices of its choices as they are shown.
    """
    name = f"{seed} {item.task} {item.language} {item.qid} {repeat}"
    return tuple(question.shuffled(f"{name} {question.key}") for question in item.questions)


def item_messages(item: Item, orders: Sequence[Sequence[int]]) -> list[Message]:
    """Return the conversation that asks all questions of an item, answered by letters as JSON.

    Args:
        item: the row.
        orders: the order in which each question shows its choices (:func:`item_orders`).
    """
    words = _ASKED[item.language]
    asked = [
        f"{question.key}: {_posed(item, question, order)}"
        for question, order in zip(item.questions, orders, strict=True)
    ]
    form = ", ".join(f'"{question.key}": "{words["form"]}"' for question in item.questions)
    parts = [item.scenario, *asked, words["letter"].replace("{form}", f"{{{form}}}")]
    return [{"role": "user", "content": "\n\n".join(parts)}]


def question_prompt(item: Item, question: Question, order: Sequence[int]) -> str:
    """Return the prompt that asks one question of an item, answered by the words of a choice.

    Args:
        item: the row.
        question: one of its questions.
        order: the order in which it shows its choices.
    """
    parts = [item.scenario, _posed(item, question, order), _ASKED[item.language]["text"]]
    return "\n\n".join(parts)


def _posed(item: Item, question: Question, order: Sequence[int]) -> str:
    words = _ASKED[item.language][item.kind if item.task == "EA" else question.key]
    # Not format: a subject is data, and may hold braces.
    return f"{words.replace('{subject}', item.subject)}\n{question.listed(order)}"


# ---------------------------------------------------------------------- scoring


def score_emobench(items: Sequence[Item], answers: Sequence[Answers]) -> list[Measure]:
    """Score answers: percent right per task and language, then per category.

    Args:
        items: the rows.
        answers: the (voted) answers to each; an item without an answer counts as wrong.

    Returns:
        For EA the accuracy; for EU that of emotion and cause together (the headline), of the
        emotion and of the cause. Values are 100 or 0 per row.
    """
    groups: dict[str, dict[str, float]] = {}
    for by_category in (False, True):
        for item, chosen in zip(items, answers, strict=True):
            right = [a == q.label for q, a in zip(item.questions, chosen, strict=True)]
            parts = {"": all(right)}
            if item.task == "EU":
                parts = {" both": all(right), " emotion": right[0], " cause": right[1]}
            for part, value in parts.items():
                name = f"EmoBench {item.task} {item.language}{part}"
                name += f": {item.category}" if by_category else ""
                groups.setdefault(name, {})[item.qid] = 100.0 * value
    return [Measure(name, values) for name, values in groups.items()]


# ---------------------------------------------------------------------- running a model


def ask_emobench(
    chat: ChatModel,
    items: Sequence[Item],
    repeats: int = 3,
    seed: int = 0,
    report: Report | None = None,
) -> Outcome:
    """Let a model answer in words, every item ``repeats`` times with shuffled choices, and vote.

    Args:
        chat: the model.
        items: the rows.
        repeats: askings of an item, each in an order of its own.
        seed: of the orders.
        report: told how many answers have come, of how many.

    Returns:
        Accuracies of the voted answers, counts, notes, and a record per item.

    Raises:
        NormkitError: where the model answers nothing at all.
    """
    rounds = [(item, item_orders(item, seed, r)) for item in items for r in range(repeats)]
    replies = complete_all(chat, [item_messages(*asked) for asked in rounds], report)
    read: list[Answers] = [
        (None,) * len(item.questions)
        if isinstance(reply, Failed)
        else read_answers(reply, item.questions, orders)
        for (item, orders), reply in zip(rounds, replies, strict=True)
    ]
    said = [reply.reason if isinstance(reply, Failed) else reply for reply in replies]
    failed = [reply.reason for reply in replies if isinstance(reply, Failed)]
    return _outcome(items, read, said, failed)


def weigh_emobench(
    scorer: LikelihoodScorer,
    items: Sequence[Item],
    repeats: int = 3,
    seed: int = 0,
    report: Report | None = None,
) -> Outcome:
    """Take the choice that a model finds likeliest, question by question, and vote as above.

    Every question is asked for itself with all its choices in view, and the texts of the choices
    are compared as answers.

    Args:
        scorer: the model.
        items: the rows.
        repeats: askings of an item, each in an order of its own.
        seed: of the orders.
        report: told how many items have been weighed, of how many.

    Returns:
        As :func:`ask_emobench`.
    """
    read: list[Answers] = []
    for item in items:
        for repeat in range(repeats):
            chosen = []
            orders = item_orders(item, seed, repeat)
            for question, order in zip(item.questions, orders, strict=True):
                weights = scorer(question_prompt(item, question, order), question.choices)
                chosen.append(max(range(len(weights)), key=weights.__getitem__))
            read.append(tuple(chosen))
            if report is not None:
                report(len(read), len(items) * repeats)
    return _outcome(items, read, [""] * len(read), [])


def _outcome(
    items: Sequence[Item], read: Sequence[Answers], said: Sequence[str], failed: Sequence[str]
) -> Outcome:
    """Vote on the answers of each item's repeats, which follow each other, and score the votes."""
    repeats = len(read) // max(len(items), 1)
    votes: list[Answers] = []
    records = []
    for i, item in enumerate(items):
        part = slice(i * repeats, (i + 1) * repeats)
        votes.append(tuple(vote(answers) for answers in zip(*read[part], strict=True)))
        records.append(
            {
                "task": item.task,
                "language": item.language,
                "qid": item.qid,
                "label": [question.label for question in item.questions],
                "vote": list(votes[-1]),
                "answers": [list(answers) for answers in read[part]],
                "replies": list(said[part]),
            }
        )
    counts = Counter(answers=len(read), failed=len(failed))
    counts["unreadable"] = sum(None in answers for answers in read) - len(failed)
    counts["items_without_answer"] = sum(None in chosen for chosen in votes)
    notes = []
    if lost := counts["unreadable"] + counts["failed"]:
        share = math.ceil(100 * lost / len(read))
        notes.append(
            f"EmoBench: {lost} of {len(read)} answers ({share}%) could not be read; the "
            f"{counts['items_without_answer']} questions left without an answer count as wrong"
        )
    if failed:
        notes.append(f"EmoBench: {len(failed)} of {len(read)} requests failed: {failed[0]}")
    return Outcome(tuple(score_emobench(items, votes)), dict(counts), tuple(notes), tuple(records))
