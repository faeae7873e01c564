"""The invented land that the search world asks about: entities, facts, and a passage on each.

Names and phrases are those of ``normkit.data.search``; what is true is drawn from a fixed seed. The
land has two halves, one for each split. No entity of one half is named in the other, so what is
learned of one is of no use in the other.
"""

from __future__ import annotations

import itertools
import json
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from importlib import resources
from typing import Any

from normkit.rl.environment import Split
from normkit.rl.environments.search_index import Passage

SPLITS: tuple[Split, ...] = ("train", "heldout")


@dataclass(frozen=True)
class Relation:
    """A kind of fact.

    Attributes:
        kind: kind of the entities that it is about.
        name: its name.
        sentences: ways to tell it; ``{s}`` is the entity, ``{v}`` the value. The first has ``{s}``.
        asks: ways to ask for the value, with ``{x}`` for the entity.
        query: words to search for it by.
        target: kind of the value where it is an entity.
        phrases: ways to speak of the value without naming it, where it is an entity.
        text: where the values stand that are no entities.
        year: whether the value is a year.
    """

    kind: str
    name: str
    sentences: Sequence[str]
    asks: Sequence[str]
    query: str
    target: str = ""
    phrases: Sequence[str] = ()
    text: str = ""
    year: bool = False


@dataclass(eq=False)
class Entity:
    """Something that has a passage.

    Attributes:
        id: unique name for machines.
        kind: person, town, river ...
        name: unique name, as it stands within a sentence.
        facts: value of each relation that it has.
    """

    id: str
    kind: str
    name: str
    facts: dict[str, Entity | str] = field(default_factory=dict)

    @property
    def title(self) -> str:
        """The name without its article."""
        return self.name.removeprefix("the ").removeprefix("The ")


def named(value: Entity | str) -> str:
    """A value as it stands within a sentence."""
    return value.name if isinstance(value, Entity) else value


@cache
def relations() -> tuple[Relation, ...]:
    """All kinds of facts, in the order in which they are drawn."""
    return tuple(Relation(**relation) for relation in _words()["relations"])


@cache
def entities(split: Split) -> tuple[Entity, ...]:
    """The entities of a half of the land, with their facts; always the same."""
    # A text seed gives the same numbers on every platform and version of Python.
    generator = random.Random(f"search land {split}")
    of_kind = {
        kind: [
            Entity(f"{split}-{kind}-{number:02}", kind, name)
            for number, name in enumerate(_names(kind, split, count, generator))
        ]
        for kind, count in _words()["counts"][split].items()
    }
    for relation in relations():
        for entity in of_kind[relation.kind]:
            value = _value(relation, entity, of_kind, generator)
            if value is not None:
                entity.facts[relation.name] = value
    return tuple(itertools.chain.from_iterable(of_kind.values()))


@cache
def passages() -> tuple[Passage, ...]:
    """A passage on every entity of both halves."""
    generator = random.Random("search passages")
    return tuple(
        Passage(entity.id, entity.title, _tell(entity, generator))
        for split in SPLITS
        for entity in entities(split)
    )


@cache
def _words() -> Mapping[str, Any]:
    file = resources.files("normkit.data.search").joinpath("land.json")
    words: Mapping[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return words


def _names(kind: str, split: Split, count: int, generator: random.Random) -> list[str]:
    """Names of a kind; the halves of the land share at most the shorter part of a name."""
    pool = _words()["names"][kind]
    first, last = pool["parts"]
    half = SPLITS.index(split)
    if len(first) > len(last):
        first = first[half::2]
    else:
        last = last[half::2]
    glue = pool.get("glue", " ")
    return generator.sample([a + glue + b for a in first for b in last], count)


# ---------------------------------------------------------------------- facts


def _older(pupil: Entity, teacher: Entity) -> bool:
    return int(named(teacher.facts["birthyear"])) + 15 <= int(named(pupil.facts["birthyear"]))


_FITS: Mapping[tuple[str, str], Callable[[Entity, Entity], bool]] = {
    ("person", "teacher"): _older,
    ("town", "founder"): lambda town, person: person.facts["birthplace"] is not town,
    ("region", "capital"): lambda region, town: town.facts["region"] is region,
}
"""Which values make sense, where not all do."""


def _value(
    relation: Relation,
    entity: Entity,
    of_kind: Mapping[str, Sequence[Entity]],
    generator: random.Random,
) -> Entity | str | None:
    """Draw a value; None where nothing fits."""
    if relation.year:
        return str(generator.randrange(1620, 1860))
    if relation.text:
        return str(generator.choice(_words()["texts"][relation.text]))
    fits = _FITS.get((relation.kind, relation.name))
    others = [e for e in of_kind[relation.target] if e is not entity]
    able = [e for e in others if fits is None or fits(entity, e)]
    return generator.choice(able) if able else None


def _tell(entity: Entity, generator: random.Random) -> str:
    """The facts of an entity in sentences, the first of which names it."""
    told = [r for r in relations() if r.kind == entity.kind and r.name in entity.facts]
    generator.shuffle(told)
    again = entity.name.split()[-1] if entity.kind == "person" else "it"
    sentences: list[str] = []
    for relation in told:
        able = [s for s in relation.sentences if sentences or "{s}" in s]
        subject = again if sentences else entity.name
        value = named(entity.facts[relation.name])
        sentence = generator.choice(able).format(s=subject, v=value)
        sentences.append(sentence[0].upper() + sentence[1:])
    return " ".join(sentences)
