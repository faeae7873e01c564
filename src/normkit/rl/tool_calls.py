r"""Tool calls: what one is, and readers of the forms in which models and data sets write them.

=============  ===================================================================================
reader         reads
=============  ===================================================================================
`read_openai`  ``tool_calls`` of an assistant message; arguments as a JSON string or an object
`read_qwen`    text with ``<tool_call>{"name": ..., "arguments": {...}}</tool_call>``
`read_bfcl`    reference calls ``{name: {parameter: [accepted, ...]}}``, ``""`` for optional
`read_ftrl`    a line of MatchTIR's training data: ``ground_truth``, ``answer``, ``unsolved_set``
=============  ===================================================================================

What a model wrote is untrusted: a call that cannot be read is counted with its reason, never
raised, and a text beyond :data:`MAX_CHARACTERS` is not parsed. References are data that must be
right: a wrong one raises :class:`~normkit.errors.InputError`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from normkit.errors import InputError

MAX_CHARACTERS = 20_000
"""Longest call that is parsed."""
MAX_DEPTH = 50
"""Deepest nesting of a call: what is nested deeper could not be compared."""

_OPEN, _CLOSE = "<tool_call>", "</tool_call>"


@dataclass(frozen=True, slots=True)
class AnyOf:
    """A value of a reference call that may be one of several.

    Attributes:
        values: what is accepted; each may contain further :class:`AnyOf`.
        optional: whether the parameter may be left out.
    """

    values: tuple[Any, ...]
    optional: bool = False


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A call of a tool, by a model or in a reference.

    Attributes:
        name: of the tool.
        arguments: value of each parameter, as JSON has them; in a reference also :class:`AnyOf`.
    """

    name: str
    arguments: Mapping[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """The call as JSON-ready values."""
        return {"name": self.name, "arguments": dict(self.arguments)}


@dataclass(frozen=True, slots=True)
class Parsed:
    """What a model's message held.

    Attributes:
        calls: the calls that could be read, in order.
        failures: why each of the others could not.
    """

    calls: list[ToolCall]
    failures: list[str]


def read_openai(tool_calls: Any) -> Parsed:
    """Read the ``tool_calls`` of an assistant message.

    Args:
        tool_calls: list of ``{"type": "function", "function": {"name", "arguments"}}``, or of bare
            ``{"name", "arguments"}``; None for no calls.
    """
    if tool_calls is None:
        return Parsed([], [])
    if not isinstance(tool_calls, (list, tuple)):
        return Parsed([], ["tool_calls is not a list"])

    def read(entry: Any) -> ToolCall:
        return _call(entry.get("function", entry) if isinstance(entry, Mapping) else entry)

    return _parse(tool_calls, read)


def read_qwen(text: str) -> Parsed:
    """Read the calls in a reply of Qwen's and Hermes' form; a tag that does not end is a failure.

    Args:
        text: the reply.
    """

    def read(part: str) -> ToolCall:
        body, end, _ = part.partition(_CLOSE)
        if not end:
            raise InputError("the tag <tool_call> does not end")
        return _call(_json(body.strip()))

    return _parse(text.split(_OPEN)[1:], read)


def read_bfcl(ground_truth: Any) -> list[ToolCall]:
    """Read reference calls in the form of the Berkeley Function Calling Leaderboard.

    Args:
        ground_truth: list of ``{name: {parameter: [accepted, ...]}}``. ``""`` among the accepted
            values means that the parameter may be left out. An accepted object has lists of
            accepted values in its turn.

    Raises:
        InputError: names the call and the parameter.
    """
    if not isinstance(ground_truth, Sequence) or isinstance(ground_truth, str):
        raise InputError("ground_truth must be a list of calls")
    calls = []
    for number, entry in enumerate(ground_truth):
        if not isinstance(entry, Mapping) or len(entry) != 1:
            raise InputError(f"ground_truth[{number}] must be an object with one name")
        ((name, parameters),) = entry.items()
        if not isinstance(parameters, Mapping):
            raise InputError(f"ground_truth[{number}] must map {name} to its parameters")
        where = f"ground_truth[{number}]: {name}"
        calls.append(
            ToolCall(name, {k: _accepted(v, f"{where}.{k}") for k, v in parameters.items()})
        )
    return calls


@dataclass(frozen=True, slots=True)
class Reference:
    """What a data set says about a task.

    Attributes:
        calls: the reference calls, in order.
        answer: the final answer; empty where there is none.
        results: what the calls of each tool should return, where the data set says so.
    """

    calls: list[ToolCall]
    answer: str = ""
    results: Mapping[str, Sequence[str]] = field(default_factory=dict)


def read_ftrl(record: Mapping[str, Any]) -> Reference:
    """Read a line of MatchTIR's training data (FTRL, arXiv 2508.08791).

    Args:
        record: ``ground_truth``, a list of ``{"name", "parameters"}`` or the same as a JSON string;
            ``answer`` and ``unsolved_set`` (``{tool: [result, ...]}`` or a JSON string), where
            given. Its ``codes``, the tools as Python, are not looked at and never run.

    Raises:
        InputError: names the field.
    """
    calls = []
    for number, entry in enumerate(_data(record, "ground_truth", list)):
        name = entry.get("name") if isinstance(entry, Mapping) else None
        parameters = entry.get("parameters") if isinstance(entry, Mapping) else None
        if not isinstance(name, str) or not isinstance(parameters, Mapping):
            raise InputError(f"ground_truth[{number}] must have a name and parameters")
        calls.append(ToolCall(name, dict(parameters)))
    results = _data(record, "unsolved_set", dict) if record.get("unsolved_set") else {}
    answer = record.get("answer")
    return Reference(calls, "" if answer is None else str(answer), results)


def _parse(entries: Sequence[Any], read: Callable[[Any], ToolCall]) -> Parsed:
    calls, failures = [], []
    for entry in entries:
        try:
            calls.append(read(entry))
        except InputError as error:
            failures.append(str(error))
    return Parsed(calls, failures)


def _call(entry: Any) -> ToolCall:
    """A call of ``{"name", "arguments"}``; arguments may be JSON in a string."""
    if not isinstance(entry, (dict, Mapping)):  # dict first: asking an abstract class takes longer
        raise InputError("the call is not an object")
    name = entry.get("name")
    if not isinstance(name, str) or not name.strip():
        raise InputError("the call has no name")
    arguments = entry.get("arguments")
    if isinstance(arguments, str):
        arguments = _json(arguments.strip() or "{}")
    if arguments is None:
        arguments = {}
    if not isinstance(arguments, (dict, Mapping)):
        raise InputError("the arguments are not an object")
    return ToolCall(name.strip(), dict(arguments))


def _json(text: str) -> Any:
    if len(text) > MAX_CHARACTERS:
        raise InputError(f"the call is longer than {MAX_CHARACTERS} characters")
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InputError(f"the call is not JSON ({str(error)[:80]})") from None
    if text.count("{") + text.count("[") <= MAX_DEPTH:
        return value
    level = [value]
    for _ in range(MAX_DEPTH):
        level = [
            item
            for one in level
            if isinstance(one, (dict, list))
            for item in (one.values() if isinstance(one, dict) else one)
        ]
        if not level:
            return value
    raise InputError(f"the call is nested more than {MAX_DEPTH} deep")


def _accepted(values: Any, where: str) -> AnyOf:
    if not isinstance(values, Sequence) or isinstance(values, str):
        raise InputError(f"{where} must be a list of accepted values")
    kept = tuple(_nested(value, where) for value in values if not _is_blank(value))
    # A list of nothing but "" accepts the empty text and nothing at all alike.
    return AnyOf(kept or ("",), len(kept) < len(values))


def _nested(value: Any, where: str) -> Any:
    """Objects within accepted values have lists of accepted values themselves."""
    if isinstance(value, Mapping):
        return {k: _accepted(v, f"{where}.{k}") for k, v in value.items()}
    if isinstance(value, list):
        return [_nested(item, where) for item in value]
    return value


def _is_blank(value: Any) -> bool:
    return isinstance(value, str) and not value


def _data(record: Mapping[str, Any], name: str, kind: type) -> Any:
    """A field that is JSON, as such or in a string."""
    value = record.get(name)
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError) as error:
            raise InputError(f"{name} is not JSON: {error}") from None
    if not isinstance(value, kind):
        expected = "a list" if kind is list else "an object"
        raise InputError(f"{name} must be {expected}, got {type(value).__name__}")
    return value
