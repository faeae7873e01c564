"""Worlds to search in: the invented land, WordNet's nouns, or a corpus of one's own."""

from __future__ import annotations

import itertools
import random
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from normkit.data.wordnet import Synset, read_nouns
from normkit.errors import InputError
from normkit.rl.environment import Split
from normkit.rl.environments.search import SearchWorld, SearchWorldConfig
from normkit.rl.environments.search_files import read_passages, read_questions
from normkit.rl.environments.search_index import Passage, Searcher
from normkit.rl.environments.search_questions import HOPS, Question, solved

_PER_HOPS: Mapping[Split, int] = {"train": 120, "heldout": 40}
_ASKS = {
    1: 'What is the noun "{x}" a kind of?',
    2: 'The noun "{x}" names a kind of something. What is that something a kind of?',
    3: 'The noun "{x}" names a kind of something, and that a kind of something else. What is the '
    "latter a kind of?",
}


def open_world(
    config: SearchWorldConfig | None = None,
    corpus: str | Path = "land",
    questions: Path | None = None,
) -> SearchWorld:
    """Make a search world.

    Args:
        config: options of the world.
        corpus: "land" (shipped), "wordnet" (:mod:`normkit.data.wordnet`), or a file of passages.
        questions: questions about the file, of which the last third is held out. Where they bring
            their own passages, these are searched.

    Raises:
        InputError: where a file cannot be read, or questions or passages are missing.
    """
    config = config or SearchWorldConfig()
    own = str(corpus) not in ("land", "wordnet")
    if questions is None:
        if own:
            raise InputError(
                f"questions: a corpus of your own ({corpus}) needs a file of questions"
            )
        return SearchWorld(config) if str(corpus) == "land" else _wordnet(config)
    asked, passages = read_questions(questions)
    if own:
        passages = read_passages(corpus)
    if not passages:
        raise InputError(f"corpus: {questions} brings no passages; name a file that holds them")
    if len(asked) < 3:
        raise InputError(f"questions: {questions} must hold at least 3, got {len(asked)}")
    cut = len(asked) - len(asked) // 3
    return SearchWorld(config, passages, {"train": asked[:cut], "heldout": asked[cut:]})


# ---------------------------------------------------------------------- WordNet


def _wordnet(config: SearchWorldConfig) -> SearchWorld:
    nouns = read_nouns()
    return SearchWorld(config, *wordnet_questions(nouns, config.hits))


def wordnet_questions(
    nouns: Sequence[Synset], hits: int
) -> tuple[Searcher, dict[Split, list[Question]]]:
    """Questions about what is a kind of what, each answered by the searcher with its queries.

    Only words of a single meaning are asked about or come in between, and the splits share no word.

    Args:
        nouns: the nouns.
        hits: most passages that a query finds.
    """
    by_offset = {synset.offset: synset for synset in nouns}
    searcher = Searcher([_passage(synset, by_offset) for synset in nouns], hits)
    meanings = Counter(word.lower() for synset in nouns for word in synset.words)
    plain = {
        synset.offset
        for synset in nouns
        if len(synset.hypernyms) == 1 and meanings[synset.words[0].lower()] == 1
    }
    # A text seed gives the same numbers on every platform and version of Python.
    order = random.Random("wordnet").sample(sorted(plain), len(plain))
    used: set[int] = set()
    found: dict[Split, list[Question]] = {}
    for split, count in _PER_HOPS.items():
        found[split] = []
        for hops in HOPS:
            questions = _distinct(order, hops, by_offset, plain, used, searcher)
            found[split] += itertools.islice(questions, count)
    return searcher, found


def _distinct(
    order: Sequence[int],
    hops: int,
    by_offset: Mapping[int, Synset],
    plain: set[int],
    used: set[int],
    searcher: Searcher,
) -> Iterator[Question]:
    """Questions whose nouns no earlier question has; their nouns are added to the used ones."""
    for offset in order:
        chain = [by_offset[offset]]
        while len(chain) <= hops and (above := _above(chain[-1], by_offset)):
            chain.append(above[0])
        offsets = [synset.offset for synset in chain]
        if len(chain) <= hops or not plain.issuperset(offsets[:-1]) or used & set(offsets):
            continue
        words = [synset.words[0] for synset in chain[:-1]]
        question = Question(
            id=f"wordnet-{hops}-{offset:08}",
            text=_ASKS[hops].format(x=words[0]),
            answers=chain[-1].words,
            queries=tuple(words),
            passages=tuple(_id(offset) for offset in offsets[:-1]),
            kind="hypernym",
        )
        if solved(question, searcher):
            used.update(offsets)
            yield question


def _passage(synset: Synset, by_offset: Mapping[int, Synset]) -> Passage:
    title, *others = synset.words
    also = f" Also called {', '.join(others)}." if others else ""
    above = " and ".join(kind.words[0] for kind in _above(synset, by_offset))
    kind = f" A kind of {above}." if above else ""
    return Passage(_id(synset.offset), title, f"{synset.definition}.{also}{kind}")


def _above(synset: Synset, by_offset: Mapping[int, Synset]) -> list[Synset]:
    """What it is a kind of, as far as it is there."""
    return [by_offset[offset] for offset in synset.hypernyms if offset in by_offset]


def _id(offset: int) -> str:
    return f"n{offset:08}"
