r"""Tool calls: what one is, and readers of the forms in which models and data sets write them.

=============  ===================================================================================
reader         reads
=============  ===================================================================================
`read_openai`  ``tool_calls`` of an assistant message; arguments as a JSON string or an object
`read_qwen`    text with ``<tool_call>{"name": ..., "arguments": {...}}</tool_call>``
`read_python`  text like ``[weather(city="Paris"), now()]``, which BFCL asks for in its prompts
`read_bfcl`    reference calls ``{name: {parameter: [accepted, ...]}}``, ``""`` for optional, or
               calls in Python's form
`read_ftrl`    a line of MatchTIR's data: ``ground_truth``, ``answer``, ``unsolved_set``
=============  ===================================================================================

What a model wrote is untrusted: a call that cannot be read is counted with its reason, never
raised, and a text beyond :data:`MAX_CHARACTERS` is not parsed. References are data that must be
right: a wrong one raises :class:`~normkit.errors.InputError`.
"""

from __future__ import annotations

import ast
import json
import warnings
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
        call = _call(entry.get("function", entry) if isinstance(entry, Mapping) else entry)
        _check_depth(call.arguments)
        return call

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


def read_python(text: str, signatures: Mapping[str, Sequence[str]] | None = None) -> Parsed:
    """Read calls that are written as Python writes them; nothing is run, values are literals.

    Args:
        text: a call, or a list of calls; text that is not is one failure.
        signatures: names of each tool's parameters in their order, for arguments without a name.
    """
    try:
        entries = _python_entries(text)
    except InputError as error:
        return Parsed([], [str(error)])
    return _parse(entries, lambda entry: _python_call(entry, signatures or {}))


def read_bfcl(
    ground_truth: Any, signatures: Mapping[str, Sequence[str]] | None = None
) -> list[ToolCall]:
    """Read reference calls in the form of the Berkeley Function Calling Leaderboard.

    Args:
        ground_truth: list of ``{name: {parameter: [accepted, ...]}}``. ``""`` among the accepted
            values means that the parameter may be left out; where nothing is accepted, nothing is
            right. An accepted object has lists of accepted values in its turn, or plain values. A
            call may also be Python in a string; the calls of several turns become one list.
        signatures: as in :func:`read_python`.

    Raises:
        InputError: names the call and the parameter.
    """
    if not isinstance(ground_truth, Sequence) or isinstance(ground_truth, str):
        raise InputError("ground_truth must be a list of calls")
    entries = [e for turn in ground_truth for e in (turn if isinstance(turn, list) else [turn])]
    calls = []
    for number, entry in enumerate(entries):
        where = f"ground_truth[{number}]"
        if isinstance(entry, str):
            parsed = read_python(entry, signatures)
            if parsed.failures:
                raise InputError(f"{where}: {parsed.failures[0]}")
            calls += parsed.calls
        else:
            calls.append(_accepting_call(entry, where))
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
    """Read a line of MatchTIR's data (FTRL, arXiv 2508.08791).

    Args:
        record: ``ground_truth``, a list of ``{"name", "parameters"}`` or the same as a JSON string;
            ``answer`` and ``unsolved_set`` (``{tool: [result, ...]}`` or a JSON string), where
            given. A line to test on has an ``unsolved_set`` and no ``ground_truth``. Its ``codes``,
            the tools as Python, are not looked at and never run.

    Raises:
        InputError: names the field.
    """
    calls = []
    results = _data(record, "unsolved_set", dict) if record.get("unsolved_set") else {}
    tested = results and record.get("ground_truth") is None
    for number, entry in enumerate([] if tested else _data(record, "ground_truth", list)):
        name = entry.get("name") if isinstance(entry, Mapping) else None
        parameters = entry.get("parameters") if isinstance(entry, Mapping) else None
        if not isinstance(name, str) or not isinstance(parameters, Mapping):
            raise InputError(f"ground_truth[{number}] must have a name and parameters")
        calls.append(ToolCall(name, dict(parameters)))
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
        if "\\u" in text:  # half of a surrogate pair is no character: no file could hold it
            json.dumps(value, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as error:
        raise InputError(f"the call is not JSON ({str(error)[:80]})") from None
    if text.count("{") + text.count("[") > MAX_DEPTH:
        _check_depth(value)
    return value


def _check_depth(value: Any) -> None:
    level = [value]
    for _ in range(MAX_DEPTH):
        level = [
            item
            for one in level
            if isinstance(one, (dict, list))
            for item in (one.values() if isinstance(one, dict) else one)
        ]
        if not level:
            return
    raise InputError(f"the call is nested more than {MAX_DEPTH} deep")


def _python_entries(text: str) -> list[ast.expr]:
    """The expressions of a list, or the one that there is."""
    if len(text) > MAX_CHARACTERS:
        raise InputError(f"the calls are longer than {MAX_CHARACTERS} characters")
    try:
        with warnings.catch_warnings():  # of what looks odd in a model's code
            warnings.simplefilter("ignore")
            body = ast.parse(text.strip(), mode="eval").body
    except (SyntaxError, ValueError, MemoryError, RecursionError):
        raise InputError("the calls are not Python") from None
    return body.elts if isinstance(body, (ast.List, ast.Tuple)) else [body]


def _python_call(entry: Any, signatures: Mapping[str, Sequence[str]]) -> ToolCall:
    if not isinstance(entry, ast.Call):
        raise InputError("the call is not one of Python")
    parts, function = [], entry.func
    while isinstance(function, ast.Attribute):
        parts.append(function.attr)
        function = function.value
    if not isinstance(function, ast.Name):
        raise InputError("the call has no name")
    name = ".".join([function.id, *reversed(parts)])
    names = signatures.get(name, ())
    if len(entry.args) > len(names):
        raise InputError(f"{name} has arguments without a name")
    given = [*zip(names, entry.args, strict=False), *((k.arg, k.value) for k in entry.keywords)]
    arguments = {key: _literal(value) for key, value in given if key is not None}
    if len(arguments) < len(given):
        raise InputError(f"{name} has arguments of the same name, or of none")
    return ToolCall(name, arguments)


def _literal(value: ast.expr) -> Any:
    """A literal of Python as JSON has it."""
    try:
        text = json.dumps(ast.literal_eval(value))
    except (ValueError, TypeError, MemoryError, RecursionError):
        raise InputError("an argument is not a literal that JSON has") from None
    return _json(text)


def _accepting_call(entry: Any, where: str) -> ToolCall:
    """A call whose parameters have lists of accepted values."""
    if not isinstance(entry, Mapping) or len(entry) != 1:
        raise InputError(f"{where} must be an object with one name")
    ((name, parameters),) = entry.items()
    if not isinstance(parameters, Mapping):
        raise InputError(f"{where} must map {name} to its parameters")
    for key, values in parameters.items():
        if not isinstance(values, list):
            raise InputError(f"{where}: {name}.{key} must be a list of accepted values")
    return ToolCall(name, {key: _accepted(values) for key, values in parameters.items()})


def _accepted(values: list[Any]) -> AnyOf:
    kept = tuple(_nested(value) for value in values if not _is_blank(value))
    # A list of nothing but "" accepts the empty text and nothing at all alike.
    return AnyOf(kept or tuple(values[:1]), len(kept) < len(values))


def _nested(value: Any) -> Any:
    """Objects within accepted values have lists of accepted values themselves, or plain values."""
    if isinstance(value, Mapping):
        return {k: _accepted(v) if isinstance(v, list) else _nested(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_nested(item) for item in value]
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
