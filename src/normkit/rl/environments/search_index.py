"""Passages, and the search over them by BM25.

Robertson and Zaragoza (2009), as the package bm25s computes it: Lucene's variant with k1 = 1.5 and
b = 0.75, English stop words left out, no stemming. Titles are searched with the texts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from normkit.errors import InputError, MissingDependencyError
from normkit.rl.json_fields import read_json_lines

_KEPT = 100_000
"""Queries whose hits are remembered."""


@dataclass(frozen=True)
class Passage:
    """A text that can be found.

    Attributes:
        id: unique name.
        title: what it is about.
        text: what it says.
    """

    id: str
    title: str
    text: str


class Searcher:
    """BM25 over passages.

    Args:
        passages: the passages, at least one, each with its own id.
        hits: most passages that a query finds, K.

    Raises:
        InputError: for no passages, or an id that stands twice.
        MissingDependencyError: without the extra ``search``.
    """

    def __init__(self, passages: Sequence[Passage], hits: int = 3) -> None:
        try:
            import bm25s
        except ImportError:
            raise MissingDependencyError("bm25s", "search") from None
        self.passages = list(passages)
        self.place = {passage.id: i for i, passage in enumerate(self.passages)}
        if not self.passages or len(self.place) < len(self.passages):
            raise InputError("passages must be at least one, with different ids")
        if hits < 1:
            raise InputError(f"hits must be at least 1, got {hits}")
        self.hits = min(hits, len(self.passages))
        self._index = bm25s.BM25()
        tokens = self._tokens([f"{p.title} {p.text}" for p in self.passages])
        if not any(tokens):
            raise InputError("passages must hold words that are not stop words alone")
        self._index.index(tokens, show_progress=False)
        self._found: dict[str, npt.NDArray[np.int64]] = {}

    def retrieve(self, queries: Sequence[str]) -> npt.NDArray[np.int64]:
        """Places of the passages that fit queries best.

        Args:
            queries: the queries, Q; each is searched once and its hits are remembered.

        Returns:
            ``[Q, K]``, best first; -1 where fewer passages share a word with the query.
        """
        new = [query for query in dict.fromkeys(queries) if query not in self._found]
        if len(self._found) + len(new) > _KEPT:
            self._found.clear()
            new = list(dict.fromkeys(queries))
        if new:
            places, scores = self._index.retrieve(
                self._tokens(new),
                k=self.hits,
                show_progress=False,
                backend_selection="numpy",
            )
            hits = np.where(np.asarray(scores) > 0, np.asarray(places, np.int64), -1)
            self._found.update(zip(new, hits, strict=True))
        if not len(queries):
            return np.zeros((0, self.hits), np.int64)
        return np.stack([self._found[query] for query in queries])

    def _tokens(self, texts: Sequence[str]) -> Any:
        import bm25s

        return bm25s.tokenize(list(texts), stopwords="en", return_ids=False, show_progress=False)


def read_passages(path: str | Path) -> list[Passage]:
    """Read a corpus: JSON lines with ``id``, ``title`` (may be left out) and ``text``.

    Raises:
        InputError: names the file, line and field that is missing, malformed or stands twice.
    """
    passages: dict[str, Passage] = {}
    for field in read_json_lines(Path(path)):
        name = field["id"]
        # Data sets number their passages as often as they name them.
        key = str(name.integer()) if isinstance(name.value, int) else name.text()
        if key in passages:
            raise name.wrong("an id that no other line has")
        passages[key] = Passage(key, field["title"].text(empty=True), field["text"].text())
    if not passages:
        raise InputError(f"{path} must hold at least one passage")
    return list(passages.values())
