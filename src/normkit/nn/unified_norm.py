"""Unified Normalization.

Unified Normalization for Accelerating and Stabilizing Transformers (Yang et al., 2022),
arXiv 2208.01313.

    z = x / sqrt(var + eps),   y = z * weight + bias

per channel, where in evaluation ``var`` is a running mean square, so that the layer is an affine
map that goes into the next linear layer. In training ``var`` is the geometric mean of the mean
squares of the last M batches, ``c`` of the derivative (see :mod:`normkit.nn._running`) is a running
average of the means of ``g z`` of the last M, and a batch whose window has

    arithmetic mean - geometric mean  >  M Var(sqrt(window before))

in some channel is an outlier: it is divided by its own mean square and derived exactly, and leaves
the running value in the windows. So are all batches where M = 1.

Shapes: B batch, N tokens, C channels, M window.
Differences from the authors' code: masked positions count in the derivative's means no more than in
the forward's; outliers are looked for once the window is full; channels may be in any dimension;
statistics may be taken over processes; nothing waits for the device.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from normkit.errors import InputError
from normkit.functional.channels import channel_products
from normkit.nn._running import RunningNorm, derivatives, divide, mean_product

RATIO_AFTER = 1000
"""Iterations before the derivative is corrected for ``var`` being off its running value."""

RATIO_BOUNDS = (0.2, 5.0)

_OFFICIAL = {
    "ema_gz": "running_grad",
    "iters": "num_batches_tracked",
    "buffer_x2": "window",
    "buffer_gz": "grad_window",
    "skip_counter": "num_batches_filtered",
}


class UnifiedNorm(RunningNorm):
    r"""Divide channels by a geometric mean of recent mean squares: ``x / sqrt(var) * w + b``.

    Args:
        num_features: number of channels C.
        eps: added to the mean square, in units of the input squared.
        momentum: weight of the newest batch in the running statistics (the authors write one minus
            this).
        affine: whether there are a gain and a shift per channel.
        window_size: batches M whose statistics are averaged; with 1 every batch stands alone.
        warmup: iterations before averaging.
        filter_outliers: whether batches far from their predecessors stand alone; the authors advise
            True for images and False for text.
        channel_dim: dimension of the channels: -1 for tokens ``[*, C]``, 1 for images
            ``[B, C, *]``.
        sync: take statistics over all processes of ``torch.distributed``, in both directions.
        device: of parameters and buffers.
        dtype: of parameters and buffers.

    Raises:
        InputError: for a size below one, a negative eps or warmup, or a momentum outside (0, 1].

    Source:
        arXiv 2208.01313, section 4, and the authors' code.
    """

    window: Tensor
    grad_window: Tensor
    num_batches_filtered: Tensor

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float = 0.1,
        affine: bool = True,
        window_size: int = 4,
        warmup: int = 4000,
        filter_outliers: bool = False,
        channel_dim: int = -1,
        sync: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            num_features, eps, momentum, affine, warmup, channel_dim, sync, device, dtype
        )
        if window_size < 1:
            raise InputError(f"window_size must be at least 1, got {window_size}")
        self.window_size = window_size
        self.filter_outliers = filter_outliers
        for name in ("window", "grad_window"):
            values = torch.empty(window_size, num_features, device=device, dtype=dtype)
            self.register_buffer(name, values)
        filtered = torch.empty((), device=device, dtype=torch.int64)
        self.register_buffer("num_batches_filtered", filtered)
        self.reset_parameters()

    def reset_running_stats(self) -> None:
        """Forget all batches."""
        super().reset_running_stats()
        for buffer in (self.window, self.grad_window, self.num_batches_filtered):
            buffer.zero_()

    def normalize(self, x: Tensor, square: Tensor, count: Tensor) -> Tensor:
        """Normalize a batch and enter its statistics in the windows."""
        observe = _observe_opaquely if torch.compiler.is_compiling() else _observe
        rstd, ratio, phase = observe(
            square,
            count,
            self.running_var,
            self.window,
            self.num_batches_tracked,
            self.num_batches_filtered,
            self.eps,
            self.momentum,
            self.warmup,
            self.filter_outliers,
        )
        options = (self.channel_dim, self.momentum, self.sync)
        state = (count, phase, self.running_grad, self.grad_window)
        return _UnifiedNorm.apply(  # type: ignore[no-any-return, no-untyped-call]
            x, self.weight, self.bias, rstd, ratio, *state, *options
        )

    def extra_repr(self) -> str:
        """The constructor's arguments."""
        text = f"{super().extra_repr()}, window_size={self.window_size}"
        return f"{text}, filter_outliers={self.filter_outliers}"


def from_official(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename the entries of a state dict of the authors' code (``UN1d``).

    Args:
        state: of a layer or a whole model; entries of other layers are left as they are.

    Returns:
        The state dict of a model with :class:`UnifiedNorm` in the same places.
    """
    renamed = {}
    for name, value in state.items():
        path, dot, last = name.rpartition(".")
        counter = last in ("iters", "skip_counter")
        renamed[path + dot + _OFFICIAL.get(last, last)] = value.reshape(()) if counter else value
    return renamed


def _observe(
    square: Tensor,
    count: Tensor,
    running_var: Tensor,
    window: Tensor,
    steps: Tensor,
    filtered: Tensor,
    eps: float,
    momentum: float,
    warmup: int,
    filter_outliers: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Enter a batch in the statistics.

    Returns:
        ``1 / sqrt(var + eps)`` and the derivative's ratio, both ``[C]``, and for the derivative
        the slot of the windows and whether the batch counts, is averaged, and stands alone: four
        integers.
    """
    size = window.shape[0]
    fresh = count > 0
    steps.add_(fresh.any())
    slot = (steps % size).reshape(1)
    running, kept = running_var.to(square.dtype), window.to(square.dtype)
    spread = kept.sqrt().var()
    kept = kept.index_copy(0, slot, torch.where(fresh, square, kept.index_select(0, slot)))
    geometric = kept.log().mean(0).exp()
    settled = (steps > size) & (steps >= warmup)
    outlier = torch.zeros_like(settled)
    if filter_outliers:
        outlier = settled & (kept.mean(0) - geometric > size * spread).any()
    alone = outlier if size > 1 else torch.ones_like(outlier)
    averaged = settled & ~alone
    var = torch.where(fresh, torch.where(averaged, geometric, square), running)
    ratio = ((var + eps) / (running + eps)).sqrt().clamp(*RATIO_BOUNDS)
    corrected = (steps > max(RATIO_AFTER, warmup)) & ~alone
    ratio = torch.where(corrected, ratio, torch.ones_like(ratio))
    slots = kept.index_select(0, slot)
    window.index_copy_(0, slot, torch.where(outlier, running, slots).to(window.dtype))
    running_var.copy_(running + momentum * (var - running))
    filtered.add_(outlier)
    phase = torch.stack([slot[0], *(flag.long() for flag in (fresh.any(), averaged, alone))])
    return (var + eps).rsqrt(), ratio, phase


# The compiler would compute what the derivative needs anew from buffers that have moved since.
_observe_opaquely = torch.library.custom_op(
    "normkit::unified_norm_observe",
    _observe,
    mutates_args=("running_var", "window", "steps", "filtered"),
)


@_observe_opaquely.register_fake
def _(square: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    phase = square.new_empty(4, dtype=torch.int64)
    return torch.empty_like(square), torch.empty_like(square), phase


def _reflect(
    product: Tensor, phase: Tensor, running_grad: Tensor, window: Tensor, momentum: float
) -> Tensor:
    """Enter a batch's ``mean(g z)`` in the statistics of the derivative and return ``c``."""
    slot, (fresh, averaged, alone) = phase[:1], phase[1:].bool()
    running, kept = running_grad.to(product.dtype), window.to(product.dtype)
    entry = torch.where(alone, running, product)
    entry = torch.where(fresh, entry, kept.index_select(0, slot)[0])
    kept = kept.index_copy(0, slot, entry[None])
    mean = torch.where(averaged, kept.mean(0), product)
    moved = torch.where(fresh, running + momentum * (mean - running), running)
    window.index_copy_(0, slot, entry[None].to(window.dtype))
    running_grad.copy_(moved)
    return torch.where(alone, mean, moved)


class _UnifiedNorm(torch.autograd.Function):
    """``x * rstd * weight + bias``, derived by the recurrence; saves ``x`` and vectors."""

    # In one function: under inference_mode torch.compile (2.13) mistakes a forward without ctx.
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        rstd: Tensor,
        ratio: Tensor,
        count: Tensor,
        phase: Tensor,
        running_grad: Tensor,
        grad_window: Tensor,
        dim: int,
        momentum: float,
        sync: bool,
    ) -> Tensor:
        ctx.save_for_backward(x, weight, rstd, ratio, count, phase)
        ctx.state = (
            running_grad,
            grad_window,
        )  # move until the derivative is taken, as they should
        ctx.dim, ctx.momentum, ctx.sync = dim, momentum, sync
        ctx.dtypes = tuple(None if p is None else p.dtype for p in (weight, bias))
        return divide(x, weight, bias, rstd, dim)

    @staticmethod
    @once_differentiable  # type: ignore[misc, untyped-decorator, unused-ignore]
    def backward(ctx: Any, grad: Tensor) -> Any:
        x, weight, rstd, ratio, count, phase = ctx.saved_tensors
        seen = rstd * ratio
        gain = seen if weight is None else seen * weight
        sums = channel_products(grad, x, ctx.dim)
        product = mean_product(gain * sums[0], count, ctx.sync)
        running_grad, window = ctx.state
        c = _reflect(product, phase, running_grad, window, ctx.momentum)
        found = derivatives(grad, x, sums, gain, seen, c * rstd.square(), ctx.dim, ctx.dtypes)
        return *found, *(None,) * 9
