r"""How much a predicted tool call resembles a reference call.

MatchTIR (arXiv 2601.10712). The similarity of a predicted call p to a reference call g is 0 where
their names differ, whatever the case, and else

``s = (1 + J(keys g, keys p) + sum_k [p[k] == g[k]]) / (2 + |g|)``,

J the Jaccard index of the parameter names, k over the parameters of g.

Differences from the authors' code: a parameter that may be left out and was is as if the reference
did not have it; arguments are compared as values, not parsed anew for every pair. The similarities
of a batch are counted all at once: every parameter with its value becomes a number, and numbers are
compared.

Shapes: B dialogues; m predicted calls; n reference calls; C all predicted calls; R all reference
calls; N pairs of calls whose names are equal.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from itertools import chain
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from normkit.rl.tool_calls import AnyOf, ToolCall

Equal = Callable[[Any, Any], bool]
_Array = npt.NDArray[Any]


def tool_similarity(predicted: ToolCall, gold: ToolCall, equal: Equal = operator.eq) -> float:
    """Similarity of a predicted to a reference call, in 0..1 (formula: head of this module).

    Args:
        predicted: what the model called.
        gold: what it should have; values may be :class:`~normkit.rl.tool_calls.AnyOf`.
        equal: compares two values; by default Python's ``==``, for which ``3 != "3"``, but
            ``1 == 1.0 == True``.
    """
    if predicted.name.lower() != gold.name.lower():
        return 0.0
    given = predicted.arguments
    wanted = {k: v for k, v in gold.arguments.items() if k in given or not _optional(v)}
    right = sum(k in given and accepts(v, given[k], equal) for k, v in wanted.items())
    common = len(wanted.keys() & given.keys())
    union = len(wanted) + len(given) - common
    return (1 + (common / union if union else 1.0) + right) / (2 + len(wanted))


def accepts(pattern: Any, value: Any, equal: Equal = operator.eq) -> bool:
    """Whether a value is the one of a reference, or one of those it accepts."""
    if isinstance(pattern, AnyOf):
        return any(accepts(one, value, equal) for one in pattern.values)
    if isinstance(pattern, dict) and isinstance(value, dict):
        required = {k for k, v in pattern.items() if not _optional(v)}
        return required <= value.keys() <= pattern.keys() and all(
            accepts(pattern[k], v, equal) for k, v in value.items()
        )
    if isinstance(pattern, list) and isinstance(value, list):
        return len(pattern) == len(value) and all(
            accepts(p, v, equal) for p, v in zip(pattern, value, strict=True)
        )
    return bool(equal(pattern, value))


def similarity_matrix(
    predicted: Sequence[ToolCall], gold: Sequence[ToolCall], equal: Equal = operator.eq
) -> Tensor:
    """Similarities ``[m, n]``, float64."""
    return similarities(predicted, [len(predicted)], [gold], equal)[0]


def similarities(
    calls: Sequence[ToolCall],
    sizes: Sequence[int] | _Array,
    gold: Sequence[Sequence[ToolCall]],
    equal: Equal = operator.eq,
) -> Tensor:
    """Similarities of many dialogues at once.

    Args:
        calls: predicted calls of all dialogues, one dialogue after the other ``[C]``.
        sizes: how many each dialogue has ``[B]``.
        gold: reference calls of each dialogue; dialogues that share a list share its work.
        equal: compares two values; with one that is not Python's ``==``, pairs are compared one by
            one.

    Returns:
        ``[B, m, n]``, float64, padded with 0 to the longest of each side.
    """
    shared = {id(references): references for references in gold}
    number = {key: k for k, key in enumerate(shared)}
    which = np.array([number[id(references)] for references in gold], np.int64)
    references = list(chain.from_iterable(shared.values()))
    call_at = _places(sizes)
    reference_at = _places([len(x) for x in shared.values()])
    spelled, keys, values = _Numbers(), _Numbers(), _Numbers()
    ours = _read(calls, spelled, keys, values)
    theirs = _read(references, spelled, keys, values, patterns=True)
    # Names whatever their case; a place that is -1 takes the last element, which is no name.
    names = _Numbers()
    name = np.array([names[x.lower()] for x in spelled], np.int64)
    called = np.append(name[ours.name], -1)[call_at]
    wanted = np.append(name[theirs.name], -2)[reference_at][which]
    out = np.zeros((*called.shape, wanted.shape[1]))
    b, i, j = np.nonzero(called[:, :, None] == wanted[:, None, :])
    c, r = call_at[b, i], reference_at[which[b], j]
    found, left = np.zeros(len(c)), np.arange(len(c))
    if equal is operator.eq:
        found, left = _counted(ours, theirs, values, c, r)
    for k in left.tolist():
        found[k] = tool_similarity(calls[c[k]], references[r[k]], equal)
    out[b, i, j] = found
    return torch.from_numpy(out)


class _Numbers(dict[Any, int]):
    """Numbers things, equal ones alike, in the order in which they are asked for."""

    def __missing__(self, thing: Any) -> int:
        number = self[thing] = len(self)
        return number


class _Side(NamedTuple):
    """Calls in numbers.

    Attributes:
        name: of each call.
        sizes: how many parameters each has.
        key: name of each parameter, call by call.
        value: number of its value, -1 where there is none; of a reference, the pattern itself.
    """

    name: _Array
    sizes: _Array
    key: _Array
    value: list[Any]


def _read(
    calls: Sequence[ToolCall],
    names: _Numbers,
    keys: _Numbers,
    values: _Numbers,
    patterns: bool = False,
) -> _Side:
    """Number calls in one pass: what takes time is to touch them."""
    name, sizes, key, value = [], [], [], []
    for call in calls:
        given = call.arguments
        name.append(names[call.name])
        sizes.append(len(given))
        for k, v in given.items():
            key.append(keys[k])
            value.append(v if patterns else _number(values, v))
    return _Side(
        np.array(name, np.int64), np.array(sizes, np.int64), np.array(key, np.int64), value
    )


def _number(values: _Numbers, value: Any) -> int:
    """Number of a value; -1 for one that is not of JSON and cannot be hashed."""
    try:
        return values[value]
    except TypeError:
        try:
            return values[_frozen(value)]
        except TypeError:
            return -1


def _counted(
    ours: _Side, theirs: _Side, values: _Numbers, c: _Array, r: _Array
) -> tuple[_Array, _Array]:
    """Similarities ``[N]`` from numbers of parameters that agree, and the pairs that have none.

    The pairs are those of calls ``c [N]`` and references ``r [N]``, of equal names.
    """
    size = len(theirs.sizes)
    owner = np.repeat(np.arange(size), theirs.sizes)
    optional = np.array([_optional(p) for p in theirs.value], bool)
    accepted = [(k, _number(values, v)) for k, p in enumerate(theirs.value) for v in _values(p)]
    at, number = np.array(accepted, np.int64).reshape(-1, 2).T
    value = np.array(ours.value, np.int64)
    looked = np.array([_looks_within(p) for p in theirs.value], bool)
    looked[at[number < 0]] = True
    odd = np.repeat(np.arange(len(ours.sizes)), ours.sizes)[value < 0]
    # A parameter with its value is one number; of values that are accepted twice one counts.
    item, wanted_item = ours.key * len(values) + value, theirs.key[at] * len(values) + number
    item_owner, wanted_item = np.unique(np.stack([owner[at], wanted_item]), axis=1)

    def gold(owners: _Array, numbers: _Array) -> _Array:
        return _padded(np.bincount(owners, minlength=size), numbers, -2)[r]

    given = _padded(ours.sizes, ours.key, -1)[c]
    common = _agreeing(given, gold(owner, theirs.key))
    wanted = np.bincount(owner[~optional], minlength=size)[r]
    wanted += _agreeing(given, gold(owner[optional], theirs.key[optional]))
    right = _agreeing(_padded(ours.sizes, item, -1)[c], gold(item_owner, wanted_item))
    union = wanted + ours.sizes[c] - common
    share = np.where(union > 0, common / np.maximum(union, 1), 1.0)
    left = np.isin(r, owner[looked]) | np.isin(c, odd)
    return (1 + share + right) / (2 + wanted), np.flatnonzero(left)


def _frozen(value: Any) -> Any:
    """A stand-in for a value of JSON that can be hashed; two are equal where the values are.

    A NaN within equals nothing, since lists are compared element by element.
    """
    if isinstance(value, list):
        return list, tuple(map(_frozen, value))
    if isinstance(value, dict):
        return dict, frozenset((key, _frozen(inner)) for key, inner in value.items())
    return value if value == value else object()  # noqa: PLR0124


def _values(pattern: Any) -> list[Any]:
    """The values that a pattern accepts. What does not equal itself (NaN) no value equals."""
    if isinstance(pattern, AnyOf):
        return [value for one in pattern.values for value in _values(one)]
    return [pattern] if pattern == pattern else []  # noqa: PLR0124


def _looks_within(pattern: Any, inside: bool = False) -> bool:
    """Whether a list or an object of a pattern holds patterns, so that it must be looked into."""
    if isinstance(pattern, AnyOf):
        return inside or any(map(_looks_within, pattern.values))
    if isinstance(pattern, (list, dict)):
        inner = pattern.values() if isinstance(pattern, dict) else pattern
        return any(_looks_within(one, inside=True) for one in inner)
    return False


def _agreeing(left: _Array, right: _Array) -> _Array:
    """How many numbers two rows share ``[N]``; in none of them does a number stand twice."""
    total = np.zeros(len(left), np.int64)
    for a in left.T:
        for b in right.T:
            total += a == b
    return total


def _places(sizes: Sequence[int] | _Array) -> _Array:
    """Places in a chain of lists of those sizes, a row per list; -1 beyond its end."""
    sizes = np.asarray(sizes, np.int64)
    return _padded(sizes, np.arange(sizes.sum()), -1)


def _padded(sizes: _Array, flat: Any, pad: int) -> _Array:
    """Rows of the given sizes, filled up with ``pad``."""
    width = int(sizes.max(initial=0))
    out = np.full((len(sizes), width), pad, np.int64)
    out[np.arange(width) < sizes[:, None]] = flat
    return out


def _optional(pattern: Any) -> bool:
    return isinstance(pattern, AnyOf) and pattern.optional
