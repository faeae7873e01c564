"""A user's own corpus and questions, in the forms in which public data sets come.

========================  ==========================================================================
form                      fields
========================  ==========================================================================
corpus, JSON lines        ``id``, ``title`` (may be left out), ``text``
questions, JSON lines     ``question`` and ``answers``, a text or a list; where known also ``id``,
                          ``queries``, and ``passages``: ids in the corpus, one a hop
Natural Questions, FlashRAG  ``question`` and ``answer`` or ``golden_answers``
HotpotQA, JSON or lines   ``question``, ``answer``, ``context`` and ``supporting_facts``, as the
                          authors or as the datasets hub write them; the context is a corpus
========================  ==========================================================================
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from normkit.errors import InputError
from normkit.rl.environments.search_index import Passage
from normkit.rl.environments.search_questions import Question
from normkit.rl.json_fields import Field, read_json, read_json_lines, read_text


def read_passages(path: str | Path) -> list[Passage]:
    """Read a corpus.

    Raises:
        InputError: names the file, line and field that is missing, malformed or stands twice.
    """
    passages: dict[str, Passage] = {}
    for row in _rows(Path(path)):
        name = _name(row["id"])
        if name in passages:
            raise row["id"].wrong("an id that no other passage has")
        passages[name] = Passage(name, row["title"].text(empty=True), row["text"].text())
    if not passages:
        raise InputError(f"{path} must hold at least one passage")
    return list(passages.values())


def read_questions(path: str | Path) -> tuple[list[Question], list[Passage]]:
    """Read questions, and the passages that come with them.

    Returns:
        The questions, and the passages of their contexts (HotpotQA), named by their titles; none
        where the questions are about a corpus of their own file.

    Raises:
        InputError: names the file, line and field that is missing, malformed or stands twice.
    """
    questions: dict[str, Question] = {}
    passages: dict[str, Passage] = {}
    for number, row in enumerate(_rows(Path(path))):
        key = row.first("id", "_id")
        name = _name(key) if key else f"question-{number:06}"
        if name in questions:
            raise key.wrong("an id that no other question has")
        for title, text in _context(row["context"]):
            passage = Passage(title, title, text)
            if passages.setdefault(title, passage) != passage:
                raise row["context"].wrong(f"one text for {title!r}, the same in every question")
        facts = row["supporting_facts"]
        questions[name] = Question(
            id=name,
            text=row["question"].text(),
            answers=_texts(row.first("answers", "golden_answers", "answer")),
            queries=_texts(row["queries"]) if row["queries"] else (),
            passages=tuple(dict.fromkeys(_titles(facts) if facts else _names(row["passages"]))),
            kind=row["type"].text(empty=True),
        )
    if not questions:
        raise InputError(f"{path} must hold at least one question")
    return list(questions.values()), list(passages.values())


def _rows(path: Path) -> list[Field]:
    """The objects of a file of JSON lines, or of one list."""
    if read_text(path).lstrip().startswith("["):
        return list(read_json(path))
    return read_json_lines(path)


def _name(field: Field) -> str:
    """An id; data sets number their rows as often as they name them."""
    return str(field.integer()) if isinstance(field.value, int) else field.text()


def _names(field: Field) -> list[str]:
    return [_name(item) for item in field] if field else []


def _texts(field: Field) -> tuple[str, ...]:
    """One text, or a list of at least one."""
    if not isinstance(field.value, list):
        return (field.text(),)
    if not field.value:
        raise field.wrong("a list that is not empty")
    return tuple(item.text() for item in field)


def _context(field: Field) -> Iterator[tuple[str, str]]:
    """Title and text of each paragraph: pairs in a list, or one object of two lists."""
    if not field:
        return
    if isinstance(field.value, dict):
        pairs = list(zip(field["title"], field["sentences"], strict=False))
    else:
        pairs = [_pair(item) for item in field]
    for title, sentences in pairs:
        text = " ".join(sentence.text(empty=True).strip() for sentence in sentences)
        yield title.text(), text


def _titles(field: Field) -> list[str]:
    """Titles of supporting facts, which are pairs of title and sentence, or two lists."""
    if isinstance(field.value, dict):
        return [title.text() for title in field["title"]]
    return [_pair(item)[0].text() for item in field]


def _pair(field: Field) -> tuple[Field, Field]:
    items = list(field)
    if len(items) != 2:
        raise field.wrong("a pair")
    return items[0], items[1]
