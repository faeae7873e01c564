r"""The search world in a vocabulary of eleven tokens, many dialogues side by side.

Every query that this vocabulary can say was searched once with the world's own searcher, so that a
dialogue is a walk through tables. A small policy does not read texts. It sees how many hops a
question takes and, after each turn, which of the question's relations the best passage tells
something about. It points at names instead of writing them::

    search  x | v1 | v2 | v3   w0 | w1 | w2 | w3   end
    answer  x | v1 | v2 | v3   end

x is the entity that the question names, v_i what the latest passage tells under the question's
i-th relation, w_i that relation's words, w0 no words. A turn ends with "end" or after four tokens;
one that cannot be read finds nothing. What is learned carries over to all questions.

Shapes: E dialogues (of all runs); T turns; L = 4 tokens of a turn; Q questions; P passages;
N names; W relations.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from normkit.rl.answers import normalize_answer
from normkit.rl.environment import Split
from normkit.rl.environments.search import SearchWorld, SearchWorldConfig
from normkit.rl.environments.search_land import Entity, entities, named, relations

TURNS = 5
LENGTH = 4
SEARCH, ANSWER, POINT, WORDS, END = 0, 1, 2, 6, 10
"""Tokens; four of them point and four are words."""
VOCABULARY = 11
NOTHING = VOCABULARY
"""What is seen when no relation of the question is told about; seven more tokens follow for sets
of relations that are."""
ASKED = NOTHING + 8
"""What is seen first; three tokens, by the hops that the question takes."""
SEEN = ASKED + 3
"""Tokens that a policy may see."""


@dataclass(frozen=True)
class Tables:
    """What queries find, and what passages tell.

    Attributes:
        found: best passage of a query ``[N, W + 1]``, by the name in it and the relation whose
            words are added, the last being none; P where nothing is found.
        told: name that a passage tells under a relation ``[P + 1, W + 1]``; 0, the empty name,
            where it tells none.
        names: all names, as they are compared.
        subject: name that each question is about, by split.
        relation: relations of its hops ``[Q, 3]``; W where there are fewer, by split.
        answer: the answer's name ``[Q]``, by split.
    """

    found: Tensor
    told: Tensor
    names: list[str]
    subject: dict[Split, Tensor]
    relation: dict[Split, Tensor]
    answer: dict[Split, Tensor]


@cache
def tables() -> Tables:
    """Search for everything that can be said."""
    world = SearchWorld(SearchWorldConfig(max_turns=TURNS, hits=1))
    kinds = relations()
    place = {(r.kind, r.name): i for i, r in enumerate(kinds)}
    numbers: dict[str, int] = {"": 0}
    spoken = [""]

    def number(value: Entity | str) -> int:
        key = normalize_answer(named(value))
        if key not in numbers:
            numbers[key] = len(spoken)
            spoken.append(named(value))
        return numbers[key]

    passages = world.searcher.place
    told = torch.zeros(len(passages) + 1, len(kinds) + 1, dtype=torch.int64)
    for entity in (*entities("train"), *entities("heldout")):
        number(entity)
        for name, value in entity.facts.items():
            told[passages[entity.id], place[entity.kind, name]] = number(value)
    subject, relation, answer = {}, {}, {}
    splits: tuple[Split, ...] = ("train", "heldout")
    for split in splits:
        known = {entity.id: entity for entity in entities(split)}
        asked = [world.questions[name] for name in world.tasks(split)]
        about = [[known[p] for p in question.passages] for question in asked]
        hops = [q.kind.split(".")[1:] for q in asked]
        chains = [
            [place[e.kind, name] for e, name in zip(es, ns, strict=True)]
            for es, ns in zip(about, hops, strict=True)
        ]
        subject[split] = torch.tensor([number(es[0]) for es in about])
        relation[split] = torch.tensor([(c + [len(kinds)] * 3)[:3] for c in chains])
        ends = [es[-1].facts[ns[-1]] for es, ns in zip(about, hops, strict=True)]
        answer[split] = torch.tensor([number(value) for value in ends])
    words = [*(r.query for r in kinds), ""]
    queries = [f"{name} {word}" for name in spoken for word in words]
    best = torch.from_numpy(world.retrieve(queries)).view(len(spoken), len(words))
    found = torch.where(best < 0, len(passages), best)
    return Tables(found, told, list(numbers), subject, relation, answer)


@dataclass(frozen=True)
class Dialogues:
    """Dialogues of all runs; a step is a token that is seen and the one that is said next.

    Attributes:
        seen: the question's token, then for each turn its four, "end" where it was over earlier,
            and what followed ``[E, 1 + T * (L + 1)]``.
        live: whether the policy said the next token ``[E, T * (L + 1)]``.
        said: what the policy noted with each token, a row a note ``[K, E, T * (L + 1)]``.
        reward: exact match of the answer, 0 or 1 ``[E]``.
    """

    seen: Tensor
    live: Tensor
    said: Tensor
    reward: Tensor

    def part(self, rows: Tensor) -> Dialogues:
        """Some of the dialogues."""
        return Dialogues(self.seen[rows], self.live[rows], self.said[:, rows], self.reward[rows])


Say = Callable[[Tensor], tuple[Tensor, Tensor]]
"""Sees a token ``[E]``; says the next one, and notes on it ``[K, E]``.

It is shown all tokens in turn; where it is not its turn to speak, what it says does not count.
"""


def play(split: Split, question: Tensor, say: Say) -> Dialogues:
    """Play one dialogue for each question.

    Args:
        split: of the questions.
        question: their numbers ``[E]``.
        say: the policy.
    """
    table = tables()
    asked = _Asked(table, split, question)
    passage = torch.full_like(question, asked.nowhere)
    alive = torch.ones_like(question, dtype=torch.bool)
    reward = torch.zeros(len(question), dtype=torch.float64)
    seen, live, notes = [ASKED - 1 + hops(split)[question]], [], []
    for _ in range(TURNS):
        writing = alive
        for _ in range(LENGTH):
            token, note = say(seen[-1])
            token = torch.where(writing, token, END)
            live.append(writing)
            notes.append(note)
            seen.append(token)
            writing = writing & (token != END)
        _, note = say(seen[-1])
        live.append(torch.zeros_like(alive))
        notes.append(note)
        turn = torch.stack(seen[-LENGTH:])
        answers, name = asked.answered(turn, passage)
        answers = answers & alive
        reward += answers & (name == table.answer[split][question])
        passage = asked.searched(turn, passage)
        alive = alive & ~answers
        told = (asked.names(passage)[:, 1:] > 0).long()
        seen.append(NOTHING + (told * torch.tensor([1, 2, 4])).sum(1))
    return Dialogues(torch.stack(seen, 1), torch.stack(live, 1), torch.stack(notes, 2), reward)


class _Asked:
    """Reads turns ``[L, E]`` of dialogues on questions ``[E]``."""

    def __init__(self, table: Tables, split: Split, question: Tensor) -> None:
        self._table = table
        self._subject = table.subject[split][question, None]
        self._relation = table.relation[split][question]
        self.nowhere = len(table.told) - 1
        wordless = torch.full_like(self._subject, table.told.shape[1] - 1)
        self._words = torch.cat([wordless, self._relation], 1)

    def names(self, passage: Tensor) -> Tensor:
        """Names that can be pointed at ``[E, 4]``; 0 where there is none."""
        told = self._table.told[passage[:, None], self._relation]
        return torch.cat([self._subject, told], 1)

    def answered(self, turn: Tensor, passage: Tensor) -> tuple[Tensor, Tensor]:
        """Whether turns are answers ``[E]``, and with which name ``[E]``."""
        points, name = self._pointed(turn, passage)
        return (turn[0] == ANSWER) & points & (turn[2] == END) & (name > 0), name

    def searched(self, turn: Tensor, passage: Tensor) -> Tensor:
        """Passage that is found ``[E]``; nowhere if turns are no queries or find nothing."""
        points, name = self._pointed(turn, passage)
        worded = (turn[2] >= WORDS) & (turn[2] < END)
        word = self._words.gather(1, (turn[2] - WORDS).clamp(0, 3)[:, None])[:, 0]
        found = self._table.found[name, word]
        return torch.where((turn[0] == SEARCH) & points & worded, found, self.nowhere)

    def _pointed(self, turn: Tensor, passage: Tensor) -> tuple[Tensor, Tensor]:
        points = (turn[1] >= POINT) & (turn[1] < WORDS)
        place = (turn[1] - POINT).clamp(0, 3)[:, None]
        return points, self.names(passage).gather(1, place)[:, 0]


def hops(split: Split) -> Tensor:
    """Searches that each question takes ``[Q]``, 1..3."""
    table = tables()
    return (table.relation[split] < table.told.shape[1] - 1).sum(1)


def teacher(split: Split, question: Tensor, noise: float, generator: torch.Generator) -> Say:
    """Says what leads to the answer, and now and then any token instead.

    Args:
        split: of the questions.
        question: their numbers ``[E]``.
        noise: probability of any token.
        generator: of the noise.
    """
    needed = hops(split)[question]
    steps = iter(range(TURNS * (LENGTH + 1)))

    def say(token: Tensor) -> tuple[Tensor, Tensor]:
        turn, place = divmod(next(steps), LENGTH + 1)
        searches = turn < needed
        following = (
            torch.where(searches, SEARCH, ANSWER),
            POINT + torch.where(searches, turn, needed).clamp(max=3),
            torch.where(searches, WORDS + min(turn + 1, 3), END),
        )
        right = following[place] if place < len(following) else torch.full_like(token, END)
        any_token = torch.randint(VOCABULARY, token.shape, generator=generator)
        wrong = torch.rand(token.shape, generator=generator) < noise
        return torch.where(wrong, any_token, right), torch.zeros(1, *token.shape)

    return say
