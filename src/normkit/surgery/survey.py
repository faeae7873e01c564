"""What norms a model has: where, how large, and what they cost.

Time is the median over repeated forward passes of what is spent inside each norm. Memory is what
autograd keeps for the backward pass: bytes of distinct tensors, parameters not counted.
"""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from normkit.errors import NormkitError
from normkit.surgery.fold import fold
from normkit.surgery.linear import is_conv, is_linear
from normkit.surgery.norms import norm_layers
from normkit.surgery.reads import DataFlow, evaluating, run, watch
from normkit.surgery.recenter import TARGETS, Target, recenter
from normkit.surgery.refusals import find_streams

CONVERSIONS: tuple[Target | Literal["folded"], ...] = (*TARGETS, "folded")
Inputs = Mapping[str, Any] | Sequence[Any]


@dataclass(frozen=True)
class NormRow:
    """One norm.

    Attributes:
        name: its path.
        kind: its class.
        place: "pre" (linear layers read it), "post" (it is added to the residual stream), "other".
        readers: who reads its output.
        shape: sizes of what it normalizes over, or its number of channels.
        parameters: number of its parameters.
        seconds: median time in it per forward pass.
        saved_bytes: what autograd keeps for its backward pass.
    """

    name: str
    kind: str
    place: str
    readers: tuple[str, ...]
    shape: tuple[int, ...]
    parameters: int
    seconds: float
    saved_bytes: int


@dataclass(frozen=True)
class Survey:
    """The norms of a model and the whole they are part of.

    Attributes:
        norms: one row each, in the order of registration.
        parameters: number of parameters of the model.
        seconds: median time of a forward pass.
        saved_bytes: what autograd keeps for a backward pass.
        conversions: for each conversion, "yes", or why it does not apply.
    """

    norms: tuple[NormRow, ...]
    parameters: int
    seconds: float
    saved_bytes: int
    conversions: Mapping[str, str]

    def share(self, of: str) -> float:
        """Share of all norms in "parameters", "seconds" or "saved_bytes"."""
        total = getattr(self, of)
        return float(sum(getattr(row, of) for row in self.norms) / total) if total else 0.0


def survey(model: nn.Module, inputs: Inputs, repeats: int = 5) -> Survey:
    """Find and measure the norms of ``model``, and try every conversion on a copy of it.

    Args:
        model: any model; it is not changed.
        inputs: keyword arguments as a mapping, or positional ones as a sequence.
        repeats: forward passes that are timed.

    Returns:
        The survey.
    """
    norms = norm_layers(model)
    flow = watch(model, inputs)
    seconds, whole = _time(model, norms, inputs, repeats)
    saved, all_saved = _saved_bytes(model, norms, inputs)
    rows = [
        NormRow(
            name=path,
            kind=type(norm).__name__,
            place=_place(model, flow, path),
            readers=tuple(dict.fromkeys(str(read) for read in flow.readers(path))),
            shape=_shape(norm),
            parameters=sum(p.numel() for p in norm.parameters()),
            seconds=seconds[path],
            saved_bytes=saved[path],
        )
        for path, norm in norms.items()
    ]
    total = sum(p.numel() for p in model.parameters())
    return Survey(tuple(rows), total, whole, all_saved, conversions(model, inputs))


def conversions(model: nn.Module, inputs: Inputs) -> dict[str, str]:
    """Try each conversion on a copy of ``model``; say "yes", with a count, or why not."""
    found: dict[str, str] = {}
    for name in CONVERSIONS:
        refused = name != "folded" and not find_streams(model)  # before anything is changed
        trial = model if refused else copy.deepcopy(model).eval()
        try:
            if name == "folded":
                report = fold(trial, inputs)
            else:
                report = recenter(trial, name, inputs=inputs)
        except NormkitError as reason:
            found[name] = f"no: {str(reason).removeprefix('model: ')}"
        else:
            done, left = len(report.changed), len(report.skipped)
            found[name] = f"yes ({done} layers changed, {left} left)" if done else "no: none folds"
    return found


def _place(model: nn.Module, flow: DataFlow, path: str) -> str:
    reads = flow.readers(path)
    if any(read.is_addition for read in reads):
        return "post"
    into = [model.get_submodule(read.reader) for read in reads]
    return "pre" if into and all(is_linear(r) or is_conv(r) for r in into) else "other"


def _shape(norm: Any) -> tuple[int, ...]:
    if hasattr(norm, "normalized_shape"):
        return tuple(norm.normalized_shape)
    size = getattr(norm, "num_features", None) or getattr(norm, "num_channels", None)
    if size:
        return (int(size),)
    weight = getattr(norm, "weight", None)
    return () if weight is None else tuple(weight.shape)


def _time(
    model: nn.Module, norms: Mapping[str, nn.Module], inputs: Inputs, repeats: int
) -> tuple[dict[str, float], float]:
    spent: dict[str, list[float]] = {path: [] for path in norms}
    started: dict[str, float] = {}
    now: dict[str, float] = {}

    def enter(path: str) -> None:
        started[path] = time.perf_counter()

    def leave(path: str) -> None:
        now[path] = now.get(path, 0.0) + time.perf_counter() - started[path]

    run(model, inputs)  # warms up
    whole = []
    with _around(norms, enter, leave):
        for _ in range(repeats):
            now.clear()
            start = time.perf_counter()
            run(model, inputs)
            whole.append(time.perf_counter() - start)
            for path, taken in spent.items():
                taken.append(now.get(path, 0.0))
    medians = {path: statistics.median(taken) for path, taken in spent.items()}
    return medians, statistics.median(whole)


def _saved_bytes(
    model: nn.Module, norms: Mapping[str, nn.Module], inputs: Inputs
) -> tuple[dict[str, int], int]:
    saved = dict.fromkeys(norms, 0)
    inside: list[str] = []
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    seen: dict[int, Tensor] = {}
    total = 0

    def pack(x: Tensor) -> Tensor:
        nonlocal total
        place = x.untyped_storage().data_ptr()
        if place not in weights and place not in seen:
            seen[place] = x  # alive, so that its place is not used again
            size = x.numel() * x.element_size()
            total += size
            if inside:
                saved[inside[-1]] += size
        return x

    def leave(_path: str) -> None:
        inside.pop()

    with (
        _around(norms, inside.append, leave),
        evaluating(model),
        torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x),
    ):
        _ = model(**inputs) if isinstance(inputs, Mapping) else model(*inputs)
    return saved, total


@contextmanager
def _around(
    norms: Mapping[str, nn.Module], enter: Callable[[str], None], leave: Callable[[str], None]
) -> Iterator[None]:
    """Call ``enter`` and ``leave`` with the path of each norm around its forward."""
    handles = []
    for path, norm in norms.items():
        handles.append(norm.register_forward_pre_hook(lambda *_, p=path: enter(p)))
        handles.append(norm.register_forward_hook(lambda *_, p=path: leave(p)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
