"""Questions that take one to three searches, made from facts of the invented land.

A question follows a chain of facts: who wrote a book, where that person was born, which river runs
there. Only the first entity is named; each search finds the next. Every question comes with the
queries and the passages that lead to its answer. :func:`solved` follows them with nothing but what
is found.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache

from normkit.rl.answers import normalize_answer
from normkit.rl.environment import Split
from normkit.rl.environments.search_index import Searcher
from normkit.rl.environments.search_land import Entity, Relation, entities, named, relations

HOPS = (1, 2, 3)
_PER_HOPS: Mapping[Split, int] = {"train": 120, "heldout": 40}
_ALIASED = ("river", "lake", "mountain")
"""Kinds that are also called by the last word of their names."""


@dataclass(frozen=True)
class Question:
    """A question with its reference.

    Attributes:
        id: unique name.
        text: what is asked.
        answers: the right answers; any of them will do.
        queries: searches that lead to it, one a hop; empty where they are not known.
        passages: ids of the passages that hold the facts, one a hop; empty where not known.
        kind: the relations that it follows, or the data set's kind.
    """

    id: str
    text: str
    answers: tuple[str, ...]
    queries: tuple[str, ...] = ()
    passages: tuple[str, ...] = ()
    kind: str = ""

    @property
    def hops(self) -> int:
        """Passages that are needed; 0 where it is not known."""
        return len(self.passages)


def solved(question: Question, searcher: Searcher) -> bool:
    """Whether the reference queries find the passages, and these lead to the answer.

    Each query but the first may only name what an earlier passage told; the last passage must hold
    an answer.
    """
    places = searcher.retrieve(question.queries)
    told = ""
    for query, passage, found in zip(question.queries, question.passages, places, strict=True):
        title = searcher.passages[searcher.place[passage]].title
        known = normalize_answer(f"{question.text} {told}")
        if normalize_answer(title) not in known or title not in query:
            return False
        if searcher.place[passage] not in found:
            return False
        told = searcher.passages[searcher.place[passage]].text
    return any(normalize_answer(answer) in normalize_answer(told) for answer in question.answers)


@cache
def make_questions(split: Split) -> tuple[Question, ...]:
    """The questions of a split about the invented land, by hops; always the same."""
    generator = random.Random(f"search questions {split}")
    questions: list[Question] = []
    for hops in HOPS:
        of_kind: dict[str, list[_Chain]] = {}
        for chain in _chains(split, hops):
            of_kind.setdefault(chain.kind, []).append(chain)
        for chains in of_kind.values():
            generator.shuffle(chains)
        chosen = _in_turns(list(of_kind.values()), _PER_HOPS[split])
        questions += [
            chain.question(f"{split}-{hops}-{number:03}", generator)
            for number, chain in enumerate(chosen)
        ]
    return tuple(questions)


@dataclass(frozen=True)
class _Chain:
    """Facts of which each is about the value of the one before.

    Attributes:
        entities: what each fact is about.
        relations: what each says.
    """

    entities: tuple[Entity, ...]
    relations: tuple[Relation, ...]

    @property
    def kind(self) -> str:
        """The relations by name."""
        return ".".join((self.entities[0].kind, *(r.name for r in self.relations)))

    def question(self, name: str, generator: random.Random) -> Question:
        """Put it into words."""
        spoken = self.entities[0].name
        for relation in self.relations[:-1]:
            spoken = generator.choice(relation.phrases).format(x=spoken)
        last = self.relations[-1]
        value = self.entities[-1].facts[last.name]
        answers = [named(value)]
        if isinstance(value, Entity) and value.kind in _ALIASED:
            answers.append(value.name.split()[-1])
        return Question(
            id=name,
            text=generator.choice(last.asks).format(x=spoken),
            answers=tuple(answers),
            queries=tuple(
                f"{e.title} {r.query}" for e, r in zip(self.entities, self.relations, strict=True)
            ),
            passages=tuple(e.id for e in self.entities),
            kind=self.kind,
        )


def _chains(split: Split, hops: int) -> Iterator[_Chain]:
    """All chains of so many facts that come by no entity twice."""
    for entity in entities(split):
        yield from _grown(_Chain((entity,), ()), hops)


def _grown(chain: _Chain, hops: int) -> Iterator[_Chain]:
    last = chain.entities[-1]
    for relation in relations():
        if relation.kind != last.kind or relation.name not in last.facts:
            continue
        value = last.facts[relation.name]
        longer = (*chain.relations, relation)
        if value in chain.entities:
            continue
        if len(longer) == hops:
            yield _Chain(chain.entities, longer)
        elif isinstance(value, Entity):
            yield from _grown(_Chain((*chain.entities, value), longer), hops)


def _in_turns(kinds: Sequence[Sequence[_Chain]], count: int) -> list[_Chain]:
    """One chain of each kind after the other, until there are enough."""
    longest = max(map(len, kinds))
    turns = [kind[i] for i in range(longest) for kind in kinds if i < len(kind)]
    return turns[:count]
