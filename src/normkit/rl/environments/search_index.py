"""Passages, and the search over them by BM25.

Robertson and Zaragoza (2009), as the package bm25s computes it: Lucene's variant with k1 = 1.5 and
b = 0.75, English stop words left out, no stemming. Titles are searched with the texts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from normkit.errors import InputError, MissingDependencyError

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
        for query, tokens in zip(new, self._tokens(new), strict=True):
            self._found[query] = self._best(tokens)
        if not len(queries):
            return np.zeros((0, self.hits), np.int64)
        return np.stack([self._found[query] for query in queries])

    def _best(self, tokens: Sequence[str]) -> npt.NDArray[np.int64]:
        """Places of the highest scores ``[K]``, the first of equals first.

        bm25s has a search for these too; over many zeros it is a hundred times slower.
        """
        best = np.full(self.hits, -1)
        known = [token for token in tokens if token in self._index.vocab_dict]
        if known:
            scores = self._index.get_scores(known)
            (places,) = np.nonzero(scores)
            order = np.argsort(-scores[places], kind="stable")[: self.hits]
            best[: len(order)] = places[order]
        return best

    def _tokens(self, texts: Sequence[str]) -> Any:
        import bm25s

        return bm25s.tokenize(list(texts), stopwords="en", return_ids=False, show_progress=False)
