"""Scenarios of the emotional-support world: who the user is, what happened, what is needed."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from normkit.errors import InputError, MissingDependencyError
from normkit.rl.rubric import AXES, Axis

if TYPE_CHECKING:
    from yaml.nodes import Node

INDICATORS = ("C.1", "C.2", "C.3", "A.1", "A.2", "A.3", "P.1", "P.2", "P.3")
CATEGORIES = ("living", "health", "leisure", "beliefs", "relationships", "career")
THRESHOLDS = ("low", "medium", "high")


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

    @property
    def scripted(self) -> bool:
        """Whether the person has lines of their own; EMPA's cases have none."""
        return any((*self.lines.values(), self.hurt, self.relief))


def load_scenarios(path: str | Path) -> list[Scenario]:
    """Read and check a scenario file.

    Args:
        path: a ``.yaml`` file with a list of scenarios, or a ``.jsonl`` file with one JSON object a
            line. The keys are the attributes of :class:`Scenario`.

    Returns:
        The scenarios, in order.

    Raises:
        InputError: names file, line and field of every problem (the first twenty), and what was
            expected there.
    """
    path = Path(path)
    suffix = path.suffix.lower()
    if suffix not in (".yaml", ".yml", ".jsonl"):
        raise InputError(f"scenarios must be a .yaml or .jsonl file, got {path.name!r}")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path} cannot be read: {error}") from None
    return parse_scenarios(text, path.name, json_lines=suffix == ".jsonl")


def builtin_scenarios(split: Literal["train", "heldout"]) -> list[Scenario]:
    """The scenarios that normkit ships: those of training or the held-out ones."""
    if split not in ("train", "heldout"):
        raise InputError(f"split must be train or heldout, got {split!r}")
    name = f"{split}.yaml"
    text = resources.files("normkit.data.scenarios").joinpath(name).read_text(encoding="utf-8")
    return parse_scenarios(text, name)


def parse_scenarios(text: str, name: str, json_lines: bool = False) -> list[Scenario]:
    """Read and check scenarios from text; ``name`` stands in messages. See `load_scenarios`."""
    check = _Check(name)
    nodes = check.json_lines(text) if json_lines else check.yaml_list(text)
    scenarios = [scenario for node in nodes if (scenario := check.scenario(node)) is not None]
    if check.problems:
        # Stable, so that problems of one line keep the order in which they were found.
        found = [problem for _, problem in sorted(check.problems, key=lambda item: item[0])]
        more = len(found) - _SHOWN
        raise InputError("\n".join([*found[:_SHOWN], *([f"and {more} more"] if more > 0 else [])]))
    if not scenarios:
        raise InputError(f"{name} must hold at least one scenario, got none")
    return scenarios


_SHOWN = 20
_KEYS = tuple(Scenario.__dataclass_fields__)
_SLUG = re.compile(r"[a-z0-9]+(-[a-z0-9]+)*")
_DECIMAL = re.compile(r"[-+]?(0|[1-9][0-9]*)")
_TAG = "tag:yaml.org,2002:"
_KINDS = {
    "map": "a mapping",
    "seq": "a list",
    "null": "nothing",
    "int": "the integer",
    "float": "the number",
    "bool": "the truth value",
    "timestamp": "the date",
}


class _Check:
    """Walks YAML nodes, which know their line, and collects what is wrong.

    Nodes are only looked at, never constructed: a tag of the file cannot make an object. JSON is
    read as JSON, since YAML takes neither its tabs nor its surrogate pairs, and laid out as the
    same nodes.
    """

    def __init__(self, name: str) -> None:
        try:
            import yaml
        except ImportError:
            raise MissingDependencyError("pyyaml", "rl") from None
        self.yaml = yaml
        self.name = name
        self.problems: list[tuple[int, str]] = []
        self.first_line: dict[str, int] = {}

    # ------------------------------------------------------------------ syntax

    def yaml_list(self, text: str) -> list[Node]:
        try:
            root = self.yaml.compose(text, Loader=self.yaml.SafeLoader)
        except self.yaml.MarkedYAMLError as error:
            mark = error.problem_mark or error.context_mark
            what = ", ".join(part for part in (error.context, error.problem) if part)
            self.problem(mark.line + 1 if mark else 1, f"it is not YAML: {what}")
            return []
        except self.yaml.reader.ReaderError as error:
            line = text.count("\n", 0, error.position) + 1
            self.problem(line, f"it is not YAML: character U+{error.character:04X}")
            return []
        except RecursionError:
            self.problem(1, "it is not a list of scenarios: it is nested too deeply")
            return []
        if root is None:
            return []
        if not _is(root, "seq"):
            self.wrong(root, "the file", "a list of scenarios")
            return []
        return list(root.value)

    def json_lines(self, text: str) -> list[Node]:
        nodes = []
        # Not splitlines: JSON texts may hold U+2028 and its like as they are.
        for number, line in enumerate(text.split("\n")):
            if not line.strip():
                continue
            mark = self.yaml.Mark(self.name, 0, number, 0, None, 0)
            try:
                nodes.append(self._json_node(json.loads(line, object_pairs_hook=_Pairs), mark))
            except json.JSONDecodeError as error:
                what = f"it is not JSON: {error.msg} (column {error.colno})"
                self.problem(number + 1, what)
            except (ValueError, RecursionError) as error:
                self.problem(number + 1, f"it is not JSON that can be read: {error}")
        return nodes

    def _json_node(self, value: Any, mark: Any) -> Node:
        node: Node
        nodes = self.yaml.nodes
        if isinstance(value, _Pairs):
            pairs = [(self._json_node(k, mark), self._json_node(v, mark)) for k, v in value]
            node = nodes.MappingNode(f"{_TAG}map", pairs, mark)
        elif isinstance(value, list):
            items = [self._json_node(item, mark) for item in value]
            node = nodes.SequenceNode(f"{_TAG}seq", items, mark)
        else:
            kind = {str: "str", bool: "bool", int: "int", float: "float"}.get(type(value), "null")
            text = value if kind == "str" else json.dumps(value)
            node = nodes.ScalarNode(f"{_TAG}{kind}", text, mark)
        return node

    # ------------------------------------------------------------------ problems

    def problem(self, line: int, what: str) -> None:
        self.problems.append((line, f"{self.name} line {line}: {what}"))

    def wrong(self, node: Node, field: str, expected: str) -> None:
        self.problem(_line(node), f"{field} must be {expected}, got {_given(node)}")

    # ------------------------------------------------------------------ fields

    def scenario(self, node: Node) -> Scenario | None:
        before = len(self.problems)
        fields = self.mapping(node, "", _KEYS)
        values: dict[str, Any] = {}
        for key, value in fields.items():
            if key == "persona":
                values[key] = self.persona(value)
            elif key == "deficit":
                values[key] = self.deficit(value)
            elif key in ("points", "lines"):
                axes = self.mapping(value, key, AXES)
                values[key] = {a: self.texts(axes[a], f"{key}.{a}") for a in AXES if a in axes}
            elif key in ("hurt", "relief"):
                values[key] = self.texts(value, key)
            else:
                values[key] = self.text(value, key)
        if values.get("id"):
            self.name_of(fields["id"], values["id"])
        if values.get("category"):
            self.choice(fields["category"], "category", values["category"], CATEGORIES)
        return Scenario(**values) if len(self.problems) == before else None

    def name_of(self, node: Node, name: str) -> None:
        if not _SLUG.fullmatch(name):
            self.wrong(node, "id", "kebab-case (a-z, 0-9 and single hyphens)")
        if name in self.first_line:
            self.wrong(node, "id", f"unique (line {self.first_line[name]} has the same)")
        self.first_line.setdefault(name, _line(node))

    def persona(self, node: Node) -> Persona | None:
        keys = tuple(Persona.__dataclass_fields__)
        fields = self.mapping(node, "persona", keys)
        values: dict[str, Any] = {
            key: self.integer(value, "persona.age", 1, 120)
            if key == "age"
            else self.text(value, f"persona.{key}")
            for key, value in fields.items()
        }
        if values.get("threshold"):
            where = "persona.threshold"
            self.choice(fields["threshold"], where, values["threshold"], THRESHOLDS)
        return Persona(**values) if len(values) == len(keys) else None

    def deficit(self, node: Node) -> dict[str, int]:
        before = len(self.problems)
        fields = self.mapping(node, "deficit", INDICATORS)
        levels = {
            key: self.integer(fields[key], f"deficit.{key}", 0, 3)
            for key in INDICATORS
            if key in fields
        }
        if len(self.problems) == before and not any(levels.values()):
            line = _line(node)
            self.problem(line, "deficit must have a level above 0 (nothing is needed), got only 0")
        return levels

    def mapping(self, node: Node, field: str, keys: Sequence[str]) -> dict[str, Node]:
        """Return the known fields of a mapping; every other key and every missing one is wrong."""
        prefix = f"{field}." if field else ""
        if not _is(node, "map"):
            self.wrong(node, field or "a scenario", f"a mapping of {', '.join(keys)}")
            return {}
        fields: dict[str, Node] = {}
        for key, value in node.value:
            name = str(key.value) if _is(key, "str") else ""
            if name not in keys:
                self.wrong(key, f"a key of {field or 'a scenario'}", f"one of {', '.join(keys)}")
            elif name in fields:
                self.problem(_line(key), f"{prefix}{name} must be given once, got it twice")
            else:
                fields[name] = value
        for name in keys:
            if name not in fields:
                self.problem(_line(node), f"{prefix}{name} must be given, got nothing")
        return fields

    def choice(self, node: Node, field: str, value: str, options: Sequence[str]) -> None:
        if value not in options:
            self.wrong(node, field, f"one of {', '.join(options)}")

    def text(self, node: Node, field: str) -> str:
        if not _is(node, "str"):
            quote = " (put it in quotes)" if _is(node, "int", "float", "bool", "timestamp") else ""
            self.wrong(node, field, f"a text{quote}")
            return ""
        try:
            # Joins surrogate pairs that were written as two escapes; a lone one is no character.
            whole = node.value.encode("utf-16", "surrogatepass").decode("utf-16")
        except UnicodeDecodeError:
            self.wrong(node, field, "a text of whole characters")
            return ""
        text = " ".join(whole.split())
        if not text:
            self.wrong(node, field, "a text that is not empty")
        return text

    def texts(self, node: Node, field: str) -> tuple[str, ...]:
        if not _is(node, "seq") or not node.value:
            self.wrong(node, field, "a list of at least one text")
            return ()
        texts: list[str] = []
        for i, item in enumerate(node.value):
            text = self.text(item, f"{field}[{i}]")
            if text and text in texts:
                self.wrong(item, f"{field}[{i}]", f"unlike {field}[{texts.index(text)}]")
            texts.append(text)
        return tuple(texts)

    def integer(self, node: Node, field: str, low: int, high: int) -> int:
        # Seven digits at most: YAML has no limit, int() has one.
        if _is(node, "int") and len(node.value) < 8 and _DECIMAL.fullmatch(node.value):
            value = int(node.value)
            if low <= value <= high:
                return value
        self.wrong(node, field, f"an integer {low}..{high}")
        return low


class _Pairs(list[tuple[str, Any]]):
    """A JSON object with its keys in order, repeated ones included."""


def _kind(node: Node) -> str:
    """Name of the node's YAML type; empty where a tag gives it one of its own."""
    kind = str(node.tag).removeprefix(_TAG)
    shape = {"map": "MappingNode", "seq": "SequenceNode"}.get(kind, "ScalarNode")
    return kind if kind in (*_KINDS, "str") and type(node).__name__ == shape else ""


def _is(node: Node, *kinds: str) -> bool:
    return _kind(node) in kinds


def _line(node: Node) -> int:
    return int(node.start_mark.line) + 1


def _given(node: Node) -> str:
    kind = _kind(node)
    if not kind:
        return f"a value with the tag {node.tag}"
    if kind in ("map", "seq", "null"):
        return _KINDS[kind] + (" without entries" if kind != "null" and not node.value else "")
    value = node.value if len(node.value) <= 60 else node.value[:57] + "..."
    return f"{_KINDS[kind]} {value}" if kind in _KINDS else repr(value)
