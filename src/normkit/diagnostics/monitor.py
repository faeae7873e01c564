"""How large activations and gradients are, layer by layer.

Massive activations: values that are thousands of times the median (Sun et al., 2024, arXiv
2402.17762). Variance by depth: Peri-LN (Kim et al., 2025), arXiv 2502.02732.

::

    with Monitor(model, ["blocks.0", "blocks.1"]) as monitor:
        loss = model(x)
    loss.backward()
    monitor.activations["blocks.1"].ratio
    gradient_norms(model, ["blocks.0", "blocks.1"])

Shapes: T values of all leading dimensions, D size of the last one.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from torch.utils.hooks import RemovableHandle

from normkit.errors import InputError


@dataclass(frozen=True)
class Activation:
    """What is recorded of a tensor of activations ``[*, D]``.

    Attributes:
        variance: over the D values of a token, averaged over the tokens.
        mean_square: over all values.
        largest: the largest absolute value.
        median: the median absolute value (the lower one of two).
    """

    variance: float
    mean_square: float
    largest: float
    median: float

    @property
    def ratio(self) -> float:
        """``max |a| / median |a|``: how massive the most massive activation is."""
        return self.largest / self.median if self.median > 0 else math.inf


@torch.no_grad()
def activation(x: Tensor, mask: Tensor | None = None) -> Activation:
    """Measure a tensor of activations.

    Args:
        x: ``[*, D]``, floating point.
        mask: bool ``[*]``, True where a token counts.

    Returns:
        Its sizes; NaN for a tensor without values.

    Raises:
        InputError: for integers, a scalar, or a mask that does not fit.
    """
    if x.dim() == 0 or not x.is_floating_point():
        raise InputError(f"x must be floating point [*, D], got {x.dtype} {tuple(x.shape)}")
    if mask is not None:
        if mask.dtype != torch.bool or mask.shape != x.shape[:-1]:
            raise InputError(f"mask must be bool {tuple(x.shape[:-1])}, got {tuple(mask.shape)}")
        x = x[mask]
    if x.numel() == 0:
        return Activation(math.nan, math.nan, math.nan, math.nan)
    x = x.detach().to(torch.promote_types(x.dtype, torch.float32))
    size = x.abs()
    values = (x.var(-1, correction=0).mean(), x.square().mean(), size.amax(), size.median())
    return Activation(*torch.stack(values).tolist())


class Monitor:
    """Records what chosen modules of a model put out, while it is entered.

    Hooks are there between entering and leaving only; a model that is not watched runs as ever.
    Modules are watched in eager mode.

    Args:
        model: the model.
        modules: paths of the modules to watch, as in ``model.named_modules()``; "" is the model.
        mask: bool, True where a token of the outputs counts.

    Attributes:
        activations: by path, the :class:`Activation` of the latest output (of its first tensor,
            where there are several).

    Raises:
        InputError: for a path that the model does not have.
    """

    def __init__(
        self, model: nn.Module, modules: Iterable[str], mask: Tensor | None = None
    ) -> None:
        self.activations: dict[str, Activation] = {}
        self._watched = {path: _submodule(model, path) for path in modules}
        self._mask = mask
        self._handles: list[RemovableHandle] = []

    def __enter__(self) -> Monitor:
        for path, module in self._watched.items():

            def record(_module: nn.Module, _inputs: Any, output: Any, path: str = path) -> None:
                self.activations[path] = activation(tree_leaves(output)[0], self._mask)

            self._handles.append(module.register_forward_hook(record))
        return self

    def __exit__(self, *_: object) -> None:
        while self._handles:
            self._handles.pop().remove()

    def __getitem__(self, path: str) -> Activation:
        return self.activations[path]


def gradient_norms(model: nn.Module, modules: Iterable[str]) -> dict[str, float]:
    """Euclidean norm of the gradients of each module's parameters; absent ones count as zero.

    Args:
        model: the model, after a backward pass.
        modules: paths as in ``model.named_modules()``; "" is the whole model.

    Raises:
        InputError: for a path that the model does not have.
    """
    return {path: _gradient_norm(_submodule(model, path)) for path in modules}


def spikes(values: Sequence[float], factor: float = 2.0, window: int = 20) -> list[int]:
    """Places where a series leaps: above ``factor`` times the median of the values before.

    Values that are not finite are spikes too, and do not enter the medians.

    Args:
        values: one a step, such as losses or gradient norms; positive.
        factor: how many times the median.
        window: how many values before are looked at; the first ``window`` steps are no spikes.

    Returns:
        Indices of the spikes, in order.

    Raises:
        InputError: for a factor of at most one, or a window below one.
    """
    if not factor > 1:
        raise InputError(f"factor must be more than 1, got {factor}")
    if window < 1:
        raise InputError(f"window must be at least 1, got {window}")
    found = []
    for i in range(window, len(values)):
        before = [v for v in values[i - window : i] if math.isfinite(v)]
        if not math.isfinite(values[i]) or (before and values[i] > factor * median(before)):
            found.append(i)
    return found


def _submodule(model: nn.Module, path: str) -> nn.Module:
    try:
        return model.get_submodule(path)
    except AttributeError:
        raise InputError(f"modules must be paths of the model's parts, got {path!r}") from None


def _gradient_norm(module: nn.Module) -> float:
    grads = [p.grad for p in module.parameters() if p.grad is not None]
    return float(nn.utils.get_total_norm(grads)) if grads else 0.0
