"""Tasks of the tool world: templates, filled with names and numbers, run to get their results.

A step's arguments may hold results of earlier ones, ``{0}`` for the first. Every task is made by
running its calls, so the reference trace is right by construction; the suite runs them again.
Held-out tasks have other templates and other rows of every table than those of training.
"""

from __future__ import annotations

import random
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

from normkit.rl.environment import Split
from normkit.rl.environments.toolbox import Toolbox, as_text, load_land
from normkit.rl.tool_calls import ToolCall

_PER_TEMPLATE: Mapping[Split, int] = {"train": 28, "heldout": 20}
_ATTEMPTS = 1000


@dataclass(frozen=True)
class Template:
    """A kind of task.

    Attributes:
        name: of the kind.
        split: where it is used.
        question: text with slots ``{town}``, ``{other}``, ``{good}`` ...
        steps: tool and arguments of each call, with slots and results.
        answer: text with results.
        after: steps whose results a step needs beyond those in its arguments.
    """

    name: str
    split: Split
    question: str
    steps: tuple[tuple[str, Mapping[str, Any]], ...]
    answer: str
    after: Mapping[int, tuple[int, ...]]

    def needs(self, step: int) -> frozenset[int]:
        """Steps whose results this one cannot do without."""
        written = re.findall(r"\{(\d)\}", " ".join(map(str, self.steps[step][1].values())))
        return frozenset(map(int, written)) | frozenset(self.after.get(step, ()))


@dataclass(frozen=True)
class Task:
    """A task with its reference trace.

    Attributes:
        id: unique name.
        template: its kind.
        question: what is asked.
        gold: the reference calls, in an order that works.
        results: what each returns.
        answer: the reference answer.
    """

    id: str
    template: Template
    question: str
    gold: tuple[ToolCall, ...]
    results: tuple[str, ...]
    answer: str


def _lookup(table: str, name: str, field: str) -> tuple[str, dict[str, Any]]:
    return "lookup", {"table": table, "name": name, "field": field}


def _calculate(expression: str) -> tuple[str, dict[str, Any]]:
    return "calculator", {"expression": expression}


def _convert(value: str, source: str, target: str) -> tuple[str, dict[str, Any]]:
    return "convert", {"value": value, "source": source, "target": target}


def _query(sql: str) -> tuple[str, dict[str, Any]]:
    return "query", {"sql": sql}


def _between(start: str, end: str) -> tuple[str, dict[str, Any]]:
    return "days_between", {"start": start, "end": end}


def _template(
    name: str,
    split: Split,
    question: str,
    *steps: tuple[str, Mapping[str, Any]],
    answer: str = "",
    after: Mapping[int, tuple[int, ...]] | None = None,
) -> Template:
    last = answer or f"{{{len(steps) - 1}}}"
    return Template(name, split, question, steps, last, after or {})


_SEARCH = ("search", {"text": "{nickname}"})

TEMPLATES: tuple[Template, ...] = (
    _template(
        "freight",
        "train",
        "How many pounds do {k} pieces of the {good} weigh?",
        _lookup("goods", "{good}", "weight_kg"),
        _calculate("{k} * {0}"),
        _convert("{1}", "kg", "lb"),
    ),
    _template(
        "stock",
        "train",
        "One piece of every good from {town} goes on each of {k} ships. How many pounds are that?",
        _query("SELECT SUM(weight_kg) FROM goods WHERE town = '{town}'"),
        _calculate("{k} * {0}"),
        _convert("{1}", "kg", "lb"),
    ),
    _template(
        "weekday",
        "train",
        "Which weekday is it {k} days after the {event} starts?",
        _lookup("events", "{event}", "start"),
        ("add_days", {"day": "{0}", "count": "{k}"}),
        ("weekday", {"day": "{1}"}),
    ),
    _template(
        "density",
        "train",
        "How many people live on {k} square kilometres of the {nickname}?",
        _SEARCH,
        _lookup("towns", "{town}", "population"),
        _lookup("towns", "{town}", "area_km2"),
        _calculate("{k} * {1} / {2}"),
        after={1: (0,), 2: (0,)},
    ),
    _template(
        "gap",
        "train",
        "How many weeks lie between the starts of the {event} and of the {later}?",
        _lookup("events", "{event}", "start"),
        _lookup("events", "{later}", "start"),
        _between("{0}", "{1}"),
        _calculate("{2} / 7"),
    ),
    _template(
        "budget",
        "train",
        "What do {k} pieces of the {good} and {j} of the {ware} cost together?",
        _lookup("goods", "{good}", "price"),
        _lookup("goods", "{ware}", "price"),
        _calculate("{k} * {0}"),
        _calculate("{j} * {1}"),
        _calculate("{2} + {3}"),
    ),
    _template(
        "climb",
        "train",
        "In how many stages of {k} feet does one climb from {town} to {other}?",
        _lookup("towns", "{other}", "elevation_m"),
        _lookup("towns", "{town}", "elevation_m"),
        _calculate("{0} - {1}"),
        _convert("{2}", "m", "ft"),
        _calculate("{3} / {k}"),
    ),
    _template(
        "anniversary",
        "train",
        "On which weekday was the {nickname} founded, and how many years of 365.25 days before the "
        "start of the {event}?",
        _SEARCH,
        _lookup("towns", "{town}", "founded"),
        ("weekday", {"day": "{1}"}),
        _lookup("events", "{event}", "start"),
        _between("{1}", "{3}"),
        _calculate("{4} / 365.25"),
        answer="{2} {5}",
        after={1: (0,)},
    ),
    _template(
        "caravan",
        "train",
        "How many pounds do {k} pieces of the {good} and {j} of the {ware} weigh together?",
        _lookup("goods", "{good}", "weight_kg"),
        _lookup("goods", "{ware}", "weight_kg"),
        _calculate("{k} * {0}"),
        _calculate("{j} * {1}"),
        _calculate("{2} + {3}"),
        _convert("{4}", "kg", "lb"),
    ),
    _template(
        "warmth",
        "heldout",
        "How many degrees Fahrenheit does {town} have when it is {k} Fahrenheit above its mean?",
        _lookup("towns", "{town}", "temperature_c"),
        _convert("{0}", "C", "F"),
        _calculate("{1} + {k}"),
    ),
    _template(
        "takings",
        "heldout",
        "Every visitor of the {event} pays {k} coins. What does it take on a day?",
        _lookup("events", "{event}", "visitors"),
        _lookup("events", "{event}", "days"),
        _calculate("{0} / {1}"),
        _calculate("{k} * {2}"),
    ),
    _template(
        "discount",
        "heldout",
        "By how much is {k} times the {good} cheaper than as often the dearest good of the "
        "{nickname}?",
        _SEARCH,
        _query("SELECT MAX(price) FROM goods WHERE town = '{town}'"),
        _lookup("goods", "{good}", "price"),
        _calculate("{1} - {2}"),
        _calculate("{k} * {3}"),
        after={1: (0,)},
    ),
    _template(
        "pilgrimage",
        "heldout",
        "From the start of the {event} to that of the {later} somebody walks {k} km a day and then "
        "rests {j} days. How many miles is that, and on which date does the rest end?",
        _lookup("events", "{event}", "start"),
        _lookup("events", "{later}", "start"),
        _between("{0}", "{1}"),
        _calculate("{k} * {2}"),
        _convert("{3}", "km", "mi"),
        ("add_days", {"day": "{1}", "count": "{j}"}),
        answer="{4} {5}",
    ),
)


@cache
def make_tasks(split: Split) -> tuple[Task, ...]:
    """The tasks of a split, always the same."""
    box = Toolbox()
    tasks: list[Task] = []
    for template in TEMPLATES:
        if template.split != split:
            continue
        # A text seed gives the same numbers on every platform and version of Python.
        generator = random.Random(f"tools {template.name}")
        made: dict[str, Task] = {}
        for _ in range(_ATTEMPTS):
            task = _fill(template, _slots(split, generator), box, len(made))
            if task is not None:
                made.setdefault(task.question, task)
            if len(made) == _PER_TEMPLATE[split]:
                break
        tasks += made.values()
    return tuple(tasks)


def _slots(split: Split, generator: random.Random) -> dict[str, Any]:
    """Names and numbers to fill in; the splits share no row of a table."""
    land, first = load_land(), int(split == "heldout")

    def two(table: str) -> list[str]:
        rows = [row["name"] for row in land.tables[table]][first::2]
        return generator.sample(rows, 2)

    town, other = two("towns")
    good, ware = two("goods")
    start = {row["name"]: row["start"] for row in land.tables["events"]}
    event, later = sorted(two("events"), key=lambda name: start[name])
    k, j = (2 * generator.randrange(1, 25) + first for _ in range(2))
    names = {"town": town, "other": other, "good": good, "ware": ware, "event": event}
    return {**names, "later": later, "nickname": land.nicknames[town], "k": k, "j": j}


def _fill(template: Template, slots: Mapping[str, Any], box: Toolbox, number: int) -> Task | None:
    """Fill in a template and run its calls; None where it makes no sense.

    That is where a call finds nothing, a number is not above zero, or a call is made twice.
    """
    gold: list[ToolCall] = []
    results: list[str] = []
    for name, arguments in template.steps:
        kinds = box.tools[name].parameters
        call = ToolCall(
            name, {k: _value(v.format(*results, **slots), kinds[k]) for k, v in arguments.items()}
        )
        result = box.run(call)
        senseless = result.text in (as_text(None), "0") or result.text.startswith("-")
        if senseless or not result.ok or call in gold:
            return None
        gold.append(call)
        results.append(result.text)
    return Task(
        id=f"{template.name}-{number:02}",
        template=template,
        question=template.question.format(**slots),
        gold=tuple(gold),
        results=tuple(results),
        answer=template.answer.format(*results),
    )


def _value(text: str, kind: str) -> Any:
    if kind == "string":
        return text
    number = float(text)
    return int(number) if number.is_integer() else number
