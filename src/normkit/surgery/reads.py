"""Who reads the output of a layer: learned from one forward pass.

A name says nothing certain about data flow. So every torch function that is called during a forward
pass on sample inputs is watched, also those that no module wraps (an addition, an indexing), and
each tensor that it is given is traced back to the layer that returned it. torch.fx would see the
paths that the sample does not take, but it cannot trace most models of transformers.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

_ADDITIONS = ("add", "add_", "__add__", "__radd__", "__iadd__")
OUTPUT = "output"


@dataclass(frozen=True)
class Read:
    """One use of a layer's output.

    Attributes:
        reader: path of the innermost module whose forward used it; empty for the whole model.
        function: name of the torch function; :data:`OUTPUT` if the model returned it.
    """

    reader: str
    function: str

    @property
    def is_addition(self) -> bool:
        """Whether the output went into a sum, as a residual does."""
        return self.function in _ADDITIONS

    def __str__(self) -> str:
        return self.reader or f"the model's {self.function}"


class DataFlow:
    """What was read from whom in one forward pass.

    Attributes:
        calls: how often each module ran.
    """

    def __init__(self) -> None:
        self.calls: dict[str, int] = defaultdict(int)
        self._made: dict[str, int] = {}
        self._took: dict[str, int] = {}
        self._reads: dict[int, list[Read]] = defaultdict(list)

    def readers(self, path: str) -> list[Read]:
        """Every use of what the layer at ``path`` returned."""
        return self._reads[self._made[path]] if path in self._made else []

    def producer(self, path: str) -> str | None:
        """Path of the layer whose output was the first input of the layer at ``path``."""
        wanted = self._took.get(path)
        return next((p for p, made in self._made.items() if made == wanted and p != path), None)


def watch(model: nn.Module, inputs: Mapping[str, Any] | Sequence[Any]) -> DataFlow:
    """Run ``model`` once in evaluation mode and return who read whose output.

    Args:
        model: any module; its mode is as before afterwards.
        inputs: keyword arguments as a mapping, or positional ones as a sequence.
    """
    flow, stack, alive = DataFlow(), [""], []

    class Recorder(TorchFunctionMode):
        def __torch_function__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            out = func(*args, **(kwargs or {}))
            name = getattr(func, "__name__", str(func))
            given = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
            made = [x for x in tree_leaves(out) if isinstance(x, Tensor)]
            same = len(made) == 1 and any(made[0] is x for x in given) and not name.endswith("_")
            if made and not same:
                for x in given:
                    flow._reads[id(x)].append(Read(stack[-1], name))
            alive.extend(made)  # an id stays unique while its tensor lives
            return out

    def enter(path: str) -> Callable[..., None]:
        def hook(_module: nn.Module, args: Any, kwargs: Any) -> None:
            stack.append(path)
            flow.calls[path] += 1
            first = next((x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)), None)
            if first is not None:
                alive.append(first)
                flow._took[path] = id(first)

        return hook

    def leave(path: str) -> Callable[..., None]:
        def hook(_module: nn.Module, _args: Any, out: Any) -> None:
            stack.pop()
            if isinstance(out, Tensor):
                alive.append(out)
                if id(out) not in flow._made.values():  # its maker's own steps are no reads
                    flow._reads.pop(id(out), None)
                flow._made[path] = id(out)

        return hook

    handles = []
    for path, module in model.named_modules():
        if path:
            handles.append(module.register_forward_pre_hook(enter(path), with_kwargs=True))
            handles.append(module.register_forward_hook(leave(path)))
    try:
        with Recorder():
            out = run(model, inputs)
    finally:
        for handle in handles:
            handle.remove()
    for x in out:
        flow._reads[id(x)].append(Read("", OUTPUT))
    return flow


def run(model: nn.Module, inputs: Mapping[str, Any] | Sequence[Any]) -> list[Tensor]:
    """Run ``model`` without gradient and in evaluation mode; return the tensors of its output."""
    with evaluating(model), torch.no_grad():
        out = model(**inputs) if isinstance(inputs, Mapping) else model(*inputs)
    return list(_tensors(out))


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put ``model`` in evaluation mode, and every module back in its own mode afterwards."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


def _tensors(out: Any) -> Iterator[Tensor]:
    for leaf in tree_leaves(dict(out) if isinstance(out, Mapping) else out):
        if isinstance(leaf, Tensor) and leaf.is_floating_point():
            yield leaf


def largest_difference(a: Sequence[Tensor], b: Sequence[Tensor]) -> float:
    """Largest absolute difference of two lists of outputs."""
    gaps = [float((x.double() - y.double()).abs().max()) for x, y in zip(a, b, strict=True)]
    return max(gaps, default=0.0)
