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
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from itertools import chain
from typing import Any

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
    # Names whatever their case; a place that is -1 takes the last element, which is no name.
    spelled, names = _Numbers(), _Numbers()
    written = [[spelled[x.name] for x in side] for side in (calls, references)]
    name = np.array([names[x.lower()] for x in spelled], np.int64)
    called = np.append(name[written[0]], -1)[call_at]
    wanted = np.append(name[written[1]], -2)[reference_at][which]
    out = np.zeros((*called.shape, wanted.shape[1]))
    b, i, j = np.nonzero(called[:, :, None] == wanted[:, None, :])
    pairs = call_at[b, i], reference_at[which[b], j]
    out[b, i, j] = _of_pairs(calls, references, *pairs, equal)
    return torch.from_numpy(out)


def _of_pairs(
    calls: Sequence[ToolCall], references: Sequence[ToolCall], c: _Array, r: _Array, equal: Equal
) -> _Array:
    """Similarities ``[N]`` of calls ``c [N]`` to references ``r [N]`` of the same names."""
    out, left = np.zeros(len(c)), np.arange(len(c))
    if equal is operator.eq:
        with suppress(TypeError):  # of a value that is not of JSON and cannot be hashed
            out, left = _counted(calls, references, c, r)
    for k in left.tolist():
        out[k] = tool_similarity(calls[c[k]], references[r[k]], equal)
    return out


def _counted(
    calls: Sequence[ToolCall], references: Sequence[ToolCall], c: _Array, r: _Array
) -> tuple[_Array, _Array]:
    """Similarities ``[N]`` from numbers of parameters that agree, and the pairs that have none."""
    keys, values = _Numbers(), _Numbers()
    sizes, key, value = _parameters([x.arguments for x in calls], keys)
    number = _numbered(values, value)
    gold_sizes, gold_key, patterns = _parameters([x.arguments for x in references], keys)
    owner = np.repeat(np.arange(len(references)), gold_sizes)
    optional = np.array([_optional(p) for p in patterns], bool)
    nested = np.bincount(owner[[_looks_within(p) for p in patterns]], minlength=len(references))
    accepted = [(k, v) for k, p in enumerate(patterns) for v in _values(p)]
    at = np.array([k for k, _ in accepted], np.int64)
    gold_number = _numbered(values, [v for _, v in accepted])
    # A parameter with its value is one number; of values that are accepted twice one counts.
    item, gold_item = key * len(values) + number, gold_key[at] * len(values) + gold_number
    gold_owner, gold_item = np.unique(np.stack([owner[at], gold_item]), axis=1)

    def gold(owners: _Array, numbers: _Array) -> _Array:
        return _padded(np.bincount(owners, minlength=len(references)), numbers, -2)[r]

    given = _padded(sizes, key, -1)[c]
    common = _agreeing(given, gold(owner, gold_key))
    wanted = np.bincount(owner[~optional], minlength=len(references))[r]
    wanted += _agreeing(given, gold(owner[optional], gold_key[optional]))
    right = _agreeing(_padded(sizes, item, -1)[c], gold(gold_owner, gold_item))
    union = wanted + sizes[c] - common
    share = np.where(union > 0, common / np.maximum(union, 1), 1.0)
    return (1 + share + right) / (2 + wanted), np.flatnonzero(nested[r])


class _Numbers(dict[Any, int]):
    """Numbers things, equal ones alike, in the order in which they are asked for."""

    def __missing__(self, thing: Any) -> int:
        number = self[thing] = len(self)
        return number


def _parameters(
    arguments: Sequence[Mapping[str, Any]], keys: _Numbers
) -> tuple[_Array, _Array, list[Any]]:
    """How many parameters each call has, and the numbers of their names and the values of all."""
    sizes = np.fromiter(map(len, arguments), np.int64, len(arguments))
    key = np.fromiter(map(keys.__getitem__, chain.from_iterable(arguments)), np.int64, sizes.sum())
    return sizes, key, list(chain.from_iterable(x.values() for x in arguments))


def _numbered(numbers: _Numbers, values: Sequence[Any]) -> _Array:
    try:
        found = list(map(numbers.__getitem__, values))
    except TypeError:  # lists and objects among them
        found = [numbers[_frozen(value)] for value in values]
    return np.array(found, np.int64)


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
