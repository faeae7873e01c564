"""Scenarios of the emotional-support world: who the user is, what happened, what is needed."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any, Literal

from normkit.errors import InputError, MissingDependencyError
from normkit.rl.rubric import AXES, Axis

INDICATORS = ("C.1", "C.2", "C.3", "A.1", "A.2", "A.3", "P.1", "P.2", "P.3")
CATEGORIES = ("living", "health", "leisure", "beliefs", "relationships", "career")


@dataclass(frozen=True)
class Persona:
    """The simulated user.

    Attributes:
        name: first name.
        age: in years.
        about: one or two sentences about the person.
        voice: how the person talks.
        threshold: how easily the person feels understood: "low", "medium" or "high".
    """

    name: str
    age: int
    about: str
    voice: str
    threshold: str


@dataclass(frozen=True)
class Scenario:
    """One situation that a user brings.

    Attributes:
        id: unique name in kebab-case.
        category: one of :data:`CATEGORIES`.
        persona: who speaks.
        situation: what happened, in the third person.
        needs: what the person hopes for from a listener (known to judge and simulator only).
        deficit: the filled initial-deficit form, indicator to level 0..3 (:data:`INDICATORS`).
        points: axis to short sentences that a fitting reply would touch on.
        opening: the user's first message.
        lines: axis to messages spoken while that need is the largest one left.
        hurt: messages spoken after a reply that set the person back.
        relief: messages spoken when little is left to close.
    """

    id: str
    category: str
    persona: Persona
    situation: str
    needs: str
    deficit: Mapping[str, int]
    points: Mapping[Axis, tuple[str, ...]]
    opening: str
    lines: Mapping[Axis, tuple[str, ...]]
    hurt: tuple[str, ...]
    relief: tuple[str, ...]


def load_scenarios(path: str | Path) -> list[Scenario]:
    """Read and check a scenario file.

    Args:
        path: a YAML list of scenarios, or a ``.jsonl`` file with one JSON object a line. The keys
            are the attributes of :class:`Scenario`.

    Returns:
        The scenarios, in order.

    Raises:
        InputError: names file, line and field of every problem (the first twenty), and what was
            expected there.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path} cannot be read: {error}") from None
    return parse_scenarios(text, path.name, json_lines=path.suffix == ".jsonl")


def builtin_scenarios(split: Literal["train", "heldout"]) -> list[Scenario]:
    """The scenarios that normkit ships: those of training and the held-out ones."""
    name = f"{split}.yaml"
    text = resources.files("normkit.data.scenarios").joinpath(name).read_text(encoding="utf-8")
    return parse_scenarios(text, name)


def parse_scenarios(text: str, name: str, json_lines: bool = False) -> list[Scenario]:
    """Read and check scenarios from text; ``name`` stands in messages. See `load_scenarios`."""
    check = _Check(name)
    nodes: list[tuple[Any, int]] = []
    if json_lines:
        lines = [(line, n) for n, line in enumerate(text.splitlines()) if line.strip()]
        nodes = [(check.compose(line, n), n) for line, n in lines]
    else:
        root = check.compose(text, 0)
        if root is not None and root.tag.endswith(":seq"):
            nodes = [(node, 0) for node in root.value]
        elif root is not None:
            check.problem(root, "", "a list of scenarios", "something else", 0)
    scenarios: list[Scenario] = []
    seen: set[str] = set()
    for node, offset in nodes:
        if node is None:
            continue
        check.offset = offset
        scenario = check.scenario(node)
        if scenario is None:
            continue
        if scenario.id in seen:
            check.problem(node, "id", "a unique name", repr(scenario.id))
        seen.add(scenario.id)
        scenarios.append(scenario)
    if not scenarios and not check.problems:
        check.problems.append(f"{name}: it holds no scenario")
    if check.problems:
        more = len(check.problems) - _SHOWN
        tail = [f"and {more} more problems"] if more > 0 else []
        raise InputError("\n".join([*check.problems[:_SHOWN], *tail]))
    return scenarios


_SHOWN = 20
_KEYS = tuple(Scenario.__dataclass_fields__)
_SLUG = re.compile(r"[a-z0-9]+(-[a-z0-9]+)*")


class _Check:
    """Walks YAML nodes, which know their line, and collects what is wrong."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.offset = 0
        self.problems: list[str] = []

    def compose(self, text: str, offset: int) -> Any:
        try:
            import yaml
        except ImportError:
            raise MissingDependencyError("pyyaml", "rl") from None
        try:
            return yaml.compose(text, Loader=yaml.SafeLoader)
        except yaml.YAMLError as error:
            mark = getattr(error, "problem_mark", None)
            line = offset + (mark.line if mark else 0) + 1
            problem = getattr(error, "problem", None) or "it is not YAML"
            self.problems.append(f"{self.name} line {line}: {problem}")
            return None

    def problem(
        self, node: Any, field: str, expected: str, given: str, offset: int | None = None
    ) -> None:
        line = node.start_mark.line + 1 + (self.offset if offset is None else offset)
        what = f"{field} must be" if field else "expected"
        self.problems.append(f"{self.name} line {line}: {what} {expected}, got {given}")

    def scenario(self, node: Any) -> Scenario | None:
        before = len(self.problems)
        fields = self.mapping(node, "a scenario", _KEYS)
        if fields is None or len(fields) < len(_KEYS):
            return None
        values: dict[str, Any] = {
            key: self.text(fields[key], key)
            for key in ("id", "category", "situation", "needs", "opening")
        }
        if values["id"] and not _SLUG.fullmatch(values["id"]):
            self.problem(fields["id"], "id", "kebab-case", repr(values["id"]))
        if values["category"] and values["category"] not in CATEGORIES:
            expected = "one of " + ", ".join(CATEGORIES)
            self.problem(fields["category"], "category", expected, repr(values["category"]))
        values["persona"] = self.persona(fields["persona"])
        values["deficit"] = self.deficit(fields["deficit"])
        for key in ("points", "lines"):
            axes = self.mapping(fields[key], key, AXES) or {}
            values[key] = {a: self.texts(n, f"{key}.{a}") for a, n in axes.items()}
        for key in ("hurt", "relief"):
            values[key] = self.texts(fields[key], key)
        return Scenario(**values) if len(self.problems) == before else None

    def persona(self, node: Any) -> Persona | None:
        keys = tuple(Persona.__dataclass_fields__)
        fields = self.mapping(node, "persona", keys)
        if fields is None or len(fields) < len(keys):
            return None
        age = self.integer(fields["age"], "persona.age", 1, 120)
        texts = {k: self.text(fields[k], f"persona.{k}") for k in keys if k != "age"}
        if texts["threshold"] and texts["threshold"] not in _THRESHOLDS:
            expected = "low, medium or high"
            self.problem(fields["threshold"], "persona.threshold", expected, texts["threshold"])
        return Persona(age=age, **texts)

    def deficit(self, node: Any) -> dict[str, int]:
        fields = self.mapping(node, "deficit", INDICATORS) or {}
        return {key: self.integer(n, f"deficit.{key}", 0, 3) for key, n in fields.items()}

    def mapping(self, node: Any, field: str, keys: Sequence[str]) -> dict[str, Any] | None:
        if not node.tag.endswith(":map"):
            self.problem(node, field, "a mapping", "something else")
            return None
        fields: dict[str, Any] = {}
        for key, value in node.value:
            if key.value not in keys:
                self.problem(key, f"a key of {field}", "one of " + ", ".join(keys), key.value)
            elif key.value in fields:
                self.problem(key, f"{field}: {key.value}", "given once", "it twice")
            fields[key.value] = value
        for key in keys:
            if key not in fields:
                self.problem(node, f"{field}: {key}", "given", "nothing")
        return {key: value for key, value in fields.items() if key in keys}

    def text(self, node: Any, field: str) -> str:
        if not node.tag.endswith(":str") or not node.value.strip():
            self.problem(node, field, "a text that is not empty", repr(node.value)[:60])
            return ""
        return " ".join(node.value.split())

    def texts(self, node: Any, field: str) -> tuple[str, ...]:
        if not node.tag.endswith(":seq") or not node.value:
            self.problem(node, field, "a list of texts", "something else")
            return ()
        return tuple(self.text(n, f"{field}[{i}]") for i, n in enumerate(node.value))

    def integer(self, node: Any, field: str, low: int, high: int) -> int:
        if node.tag.endswith(":int") and low <= int(node.value) <= high:
            return int(node.value)
        self.problem(node, field, f"an integer {low}..{high}", repr(node.value)[:60])
        return low


_THRESHOLDS = ("low", "medium", "high")
