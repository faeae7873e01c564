"""The tools of the tool world, and how a call of one is run.

Arguments are untrusted. Expressions have a parser of their own, over float64 alone; SQL may only
read (an authorizer refuses everything else) and stops after a budget of steps or of time; every
text has a length limit. What goes wrong is an error text for the model, never an exception.

The database is an invented land (``normkit.data.tools``): towns, goods and events as tables, and
notes that only the search finds.
"""

from __future__ import annotations

import json
import math
import re
import sqlite3
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import date, timedelta
from functools import cache
from importlib import resources
from itertools import count
from typing import Any

from normkit.errors import InputError
from normkit.rl.tool_calls import ToolCall

MAX_TEXT = 300
"""Longest text argument, in characters."""
MAX_RESULT = 400
"""Longest result, in characters; what is beyond is cut."""
MAX_ROWS = 20
"""Most rows of a query that are shown."""
SQL_STEPS = 200_000
"""Steps of SQLite's machine after which a query is stopped (some milliseconds)."""
SQL_SECONDS = 1.0
"""Time after which a query is stopped: a step that compares long texts may be a slow one."""
SQL_TEXT = 10_000
"""Longest text that a query may put together, in characters."""
_SQL_CHECKS = 200
_SQL_FUNCTIONS = ("abs", "avg", "count", "length", "like", "lower", "max", "min", "round", "sum")
_KINDS: Mapping[str, tuple[type, ...]] = {"string": (str,), "number": (int, float)}


@dataclass(frozen=True)
class Tool:
    """A tool.

    Attributes:
        name: what it is called by.
        description: one sentence for the model.
        parameters: kind of each parameter, "string" or "number"; all must be given.
        function: takes them by name and returns the result; raises InputError for the model.
    """

    name: str
    description: str
    parameters: Mapping[str, str]
    function: Callable[..., str]

    def to_json(self) -> dict[str, Any]:
        """The tool as chat templates and servers take it (OpenAI's form)."""
        properties = {name: {"type": kind} for name, kind in self.parameters.items()}
        schema = {"type": "object", "properties": properties, "required": list(properties)}
        function = {"name": self.name, "description": self.description, "parameters": schema}
        return {"type": "function", "function": function}


@dataclass(frozen=True)
class Result:
    """What a call returned.

    Attributes:
        text: the result, or what was wrong.
        ok: False where something was wrong.
    """

    text: str
    ok: bool = True


class Toolbox:
    """The tools, over a database that any thread may ask.

    Args:
        tables: rows of each table, all with the same columns; the shipped land if None.
        notes: texts that the search finds.
    """

    def __init__(
        self,
        tables: Mapping[str, Sequence[Mapping[str, Any]]] | None = None,
        notes: Sequence[str] | None = None,
    ) -> None:
        land = load_land()
        self._tables = land.tables if tables is None else tables
        self._database, self._lock = _database(self._tables), threading.Lock()
        self._search = _Search(land.notes if notes is None else notes)
        text, number = "string", "number"
        shape = "; ".join(f"{name}({', '.join(rows[0])})" for name, rows in self._tables.items())
        tools = (
            Tool(
                "calculator",
                "Compute an expression of numbers with + - * / ^ and brackets.",
                {"expression": text},
                calculate,
            ),
            Tool(
                "convert",
                "Convert a value between units: " + " ".join(UNITS) + ".",
                {"value": number, "source": text, "target": text},
                convert,
            ),
            Tool("weekday", "Weekday of a date (YYYY-MM-DD).", {"day": text}, weekday),
            Tool(
                "add_days",
                "Date so many days after a date (YYYY-MM-DD).",
                {"day": text, "count": number},
                add_days,
            ),
            Tool(
                "days_between",
                "Number of days from a date to another (YYYY-MM-DD).",
                {"start": text, "end": text},
                days_between,
            ),
            Tool(
                "lookup",
                f"One field of the row of that name. Tables: {shape}.",
                {"table": text, "name": text, "field": text},
                self._lookup,
            ),
            Tool("query", "Run a SELECT on the same tables.", {"sql": text}, self._query),
            Tool("search", "Find the note that fits some words best.", {"text": text}, self._find),
        )
        self.tools = {tool.name: tool for tool in tools}

    def run(self, call: ToolCall) -> Result:
        """Run a call; whatever is wrong with it is told in the result."""
        tool = self.tools.get(call.name.lower())
        try:
            if tool is None:
                raise InputError(f"there is no tool {call.name[:40]!r}")
            return Result(_cut(tool.function(**_arguments(tool, call.arguments))))
        except InputError as error:
            return Result(_cut(f"error: {error}"), ok=False)

    def _lookup(self, table: str, name: str, field: str) -> str:
        rows = self._tables.get(table)
        if rows is None:
            raise InputError(f"there is no table {table!r}; there are {', '.join(self._tables)}")
        if field not in rows[0]:
            raise InputError(f"{table} has no field {field!r}; it has {', '.join(rows[0])}")
        # Both identifiers are known ones; the name is bound.
        found = self._select(f'SELECT "{field}" FROM "{table}" WHERE name = ?', (name,))  # noqa: S608
        if not found:
            raise InputError(f"{table} has no row named {name!r}")
        return as_text(found[0][0])

    def _query(self, sql: str) -> str:
        rows = self._select(sql, ())
        if not rows:
            return "no rows"
        return "; ".join(", ".join(as_text(value) for value in row) for row in rows)

    def _select(self, sql: str, values: tuple[str, ...]) -> list[tuple[Any, ...]]:
        checks, end = count(1), time.monotonic() + SQL_SECONDS

        def is_over() -> bool:
            return next(checks) == _SQL_CHECKS or time.monotonic() > end

        with self._lock:
            self._database.set_progress_handler(is_over, SQL_STEPS // _SQL_CHECKS)
            try:
                return self._database.execute(sql, values).fetchmany(MAX_ROWS)
            except (sqlite3.Error, sqlite3.Warning, ValueError, OverflowError) as error:
                raise InputError(f"SQL: {error}") from None

    def _find(self, text: str) -> str:
        return self._search.best(text)


@dataclass(frozen=True)
class Land:
    """The shipped database.

    Attributes:
        tables: rows of each table.
        nicknames: what notes call a town, by town.
        notes: texts of the notes.
    """

    tables: Mapping[str, Sequence[Mapping[str, Any]]]
    nicknames: Mapping[str, str]
    notes: Sequence[str]


@cache
def load_land() -> Land:
    """Read the shipped database."""
    text = resources.files("normkit.data.tools").joinpath("world.json").read_text(encoding="utf-8")
    data = json.loads(text)
    notes = data.pop("notes")
    return Land(data, {n["town"]: n["nickname"] for n in notes}, [n["text"] for n in notes])


def as_text(value: Any) -> str:
    """A value as a tool returns it; numbers with ten significant digits at most."""
    if isinstance(value, (int, float)):
        return f"{value + 0.0:.10g}"
    return "none" if value is None else str(value)


# ---------------------------------------------------------------------- calculator

_TOKEN = re.compile(r"\s*(\d+(?:\.\d*)?(?:[eE][+-]?\d+)?|\.\d+|\*\*|[-+*/^()])", re.ASCII)
_MAX_NESTING = 50


def calculate(expression: str) -> str:
    """Value of an arithmetic expression, in float64.

    ``+ - * /``, powers as ``^`` or ``**`` (from the right), signs and brackets.

    Raises:
        InputError: for anything else, a division by zero, or a value beyond float64.
    """
    tokens, place = [], 0
    stripped = expression.rstrip()
    while place < len(stripped):
        found = _TOKEN.match(stripped, place)
        if found is None:
            raise InputError(f"{stripped[place:].strip()[:10]!r} is no part of an expression")
        tokens.append(found[1])
        place = found.end()
    parser = _Expression(tokens)
    try:
        value = parser.sum(0)
    except ZeroDivisionError:
        raise InputError("division by zero") from None
    except OverflowError:
        raise InputError("the value is too large") from None
    if parser.next is not None:
        raise InputError(f"{parser.next!r} is out of place")
    if isinstance(value, complex) or not math.isfinite(value):
        raise InputError("the value is not a finite number")
    return as_text(value)


class _Expression:
    """Recursive descent, one method a level of precedence."""

    def __init__(self, tokens: list[str]) -> None:
        self._tokens, self._place = tokens, 0

    @property
    def next(self) -> str | None:
        return self._tokens[self._place] if self._place < len(self._tokens) else None

    def _take(self) -> str:
        if self.next is None:
            raise InputError("the expression ends too early")
        self._place += 1
        return self._tokens[self._place - 1]

    def sum(self, depth: int) -> Any:
        value = self._product(depth)
        while self.next in ("+", "-"):
            sign = 1 if self._take() == "+" else -1
            value += sign * self._product(depth)
        return value

    def _product(self, depth: int) -> Any:
        value = self._signed(depth)
        while self.next in ("*", "/"):
            if self._take() == "*":
                value *= self._signed(depth)
            else:
                value /= self._signed(depth)
        return value

    def _signed(self, depth: int) -> Any:
        if depth > _MAX_NESTING:
            raise InputError("the expression is nested too deep")
        if self.next in ("+", "-"):
            return (1 if self._take() == "+" else -1) * self._signed(depth + 1)
        base = self._atom(depth)
        if self.next in ("^", "**"):
            self._take()
            return base ** self._signed(depth + 1)
        return base

    def _atom(self, depth: int) -> Any:
        token = self._take()
        if token == "(":  # noqa: S105
            value = self.sum(depth + 1)
            if self._take() != ")":
                raise InputError("a bracket does not close")
            return value
        if token[0] not in ".0123456789":
            raise InputError(f"{token!r} is out of place")
        return float(token)


# ---------------------------------------------------------------------- units and dates

UNITS: Mapping[str, tuple[str, float]] = {
    "m": ("length", 1.0),
    "km": ("length", 1000.0),
    "ft": ("length", 0.3048),
    "mi": ("length", 1609.344),
    "kg": ("mass", 1.0),
    "g": ("mass", 0.001),
    "lb": ("mass", 0.45359237),
    "oz": ("mass", 0.45359237 / 16),
    "C": ("temperature", 1.0),
    "F": ("temperature", 5 / 9),
    "K": ("temperature", 1.0),
}
"""Quantity and size of each unit, in the first unit of its quantity."""
_ZERO = {"C": 0.0, "F": 32.0, "K": 273.15}
"""Reading of each scale at 0 degrees Celsius."""


def convert(value: float, source: str, target: str) -> str:
    """Convert a value between two units of the same quantity.

    Raises:
        InputError: for an unknown unit, or units of different quantities.
    """
    for unit in (source, target):
        if unit not in UNITS:
            raise InputError(f"there is no unit {unit!r}; there are {' '.join(UNITS)}")
    (quantity, size), (other, width) = UNITS[source], UNITS[target]
    if quantity != other:
        raise InputError(f"{source} is a {quantity}, {target} a {other}")
    return as_text((value - _ZERO.get(source, 0)) * size / width + _ZERO.get(target, 0))


def weekday(day: str) -> str:
    """English name of the weekday of a date."""
    names = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
    return names[_date(day).weekday()]


def add_days(day: str, count: float) -> str:
    """Date so many days later."""
    if not float(count).is_integer():
        raise InputError(f"count must be a whole number, got {as_text(count)}")
    try:
        return (_date(day) + timedelta(days=int(count))).isoformat()
    except OverflowError:
        raise InputError("the date is out of range") from None


def days_between(start: str, end: str) -> str:
    """Number of days from one date to another; negative where it was earlier."""
    return as_text((_date(end) - _date(start)).days)


def _date(text: str) -> date:
    try:
        if re.fullmatch(r"\d{4}-\d{2}-\d{2}", text, re.ASCII):
            return date.fromisoformat(text)
    except ValueError:
        pass
    raise InputError(f"{text!r} is not a date of the form YYYY-MM-DD")


# ---------------------------------------------------------------------- database and search


def _database(tables: Mapping[str, Sequence[Mapping[str, Any]]]) -> sqlite3.Connection:
    """The tables in memory; nothing but reading is allowed afterwards."""
    connection = sqlite3.connect(":memory:", check_same_thread=False)
    for name, rows in tables.items():
        columns = list(rows[0])
        marks = ", ".join("?" * len(columns))
        connection.execute(f'CREATE TABLE "{name}" ({", ".join(columns)})')
        connection.executemany(
            f'INSERT INTO "{name}" VALUES ({marks})',  # noqa: S608
            [tuple(row[column] for column in columns) for row in rows],
        )
    connection.commit()
    connection.execute("PRAGMA query_only = ON")
    if sys.version_info >= (3, 11):  # where Python hands the limit on
        connection.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, SQL_TEXT)
    readable = (sqlite3.SQLITE_SELECT, sqlite3.SQLITE_READ)

    def authorize(action: int, _first: str | None, second: str | None, *_: str | None) -> int:
        allowed = action in readable or (
            action == sqlite3.SQLITE_FUNCTION and (second or "").lower() in _SQL_FUNCTIONS
        )
        return sqlite3.SQLITE_OK if allowed else sqlite3.SQLITE_DENY

    connection.set_authorizer(authorize)
    return connection


class _Search:
    """Notes ranked by the rarity of the words that they share with a text."""

    def __init__(self, notes: Sequence[str]) -> None:
        self._notes = notes
        self._words = [set(re.findall(r"\w+", note.lower())) for note in notes]
        frequency = Counter(word for words in self._words for word in words)
        self._rarity = {w: math.log(1 + len(notes) / n) for w, n in frequency.items()}

    def best(self, text: str) -> str:
        """The best note, the first of equals."""
        asked = set(re.findall(r"\w+", text.lower()))
        fit = [sum(self._rarity[w] for w in sorted(asked & words)) for words in self._words]
        if not any(fit):
            return "no note fits"
        return self._notes[fit.index(max(fit))]


# ---------------------------------------------------------------------- arguments


def _arguments(tool: Tool, given: Mapping[str, Any]) -> dict[str, Any]:
    unknown = [name for name in given if name not in tool.parameters]
    missing = [name for name in tool.parameters if name not in given]
    if unknown or missing:
        raise InputError(f"{tool.name} takes {', '.join(tool.parameters)}")
    for name, kind in tool.parameters.items():
        value = given[name]
        if isinstance(value, bool) or not isinstance(value, _KINDS[kind]):
            raise InputError(f"{name} must be a {kind}")
        if isinstance(value, str) and len(value) > MAX_TEXT:
            raise InputError(f"{name} is longer than {MAX_TEXT} characters")
        if isinstance(value, (int, float)) and not abs(value) <= 1e15:
            raise InputError(f"{name} must be within 1e15")
    return dict(given)


def _cut(text: str) -> str:
    return text if len(text) <= MAX_RESULT else text[: MAX_RESULT - 3] + "..."
