"""Statistics and scaling per channel, over all other dimensions: what batch-wise norms share.

Shapes: ``x`` has any dimensions, one of which, ``dim``, is the channels C; vectors are ``[C]``.
Half input is accumulated in float32 and rounded once.

On the CPU kernels of torch's BatchNorm do the work, which read each tensor once: with statistics
held at zero and one its derivative by gain and shift is ``sum(a b)`` and ``sum(a)``, and its
evaluation is ``x * scale + shift``. Compiled graphs call the first of them too: the compiler
(torch 2.13) walks down the columns for such sums, several times as long.
"""

from __future__ import annotations

from math import prod

import torch
import torch.distributed as dist
from torch import Tensor

from normkit.errors import InputError
from normkit.functional._capture import compiled_for_cpu, eager_on_cpu, graph_operator

BLOCK = 4096
"""Rows that are added up one after the other in float32, before the sums of blocks are added."""


def check_channels(x: Tensor, channels: int, dim: int) -> None:
    """Check that ``x`` is floating point and has ``channels`` in dimension ``dim``.

    Raises:
        InputError: where it is not or has not.
    """
    if not x.is_floating_point():
        raise InputError(f"x must be floating point, got {x.dtype}")
    if not -x.dim() <= dim < x.dim() or x.dim() < 2 or x.shape[dim] != channels:
        raise InputError(
            f"x must have a batch and {channels} channels in dimension {dim}, "
            f"got shape {tuple(x.shape)}"
        )


def spread_mask(mask: Tensor, x: Tensor) -> Tensor:
    """Give a mask of leading dimensions the dimensions of ``x``.

    Args:
        mask: bool, with the leading dimensions of ``x`` or broadcastable to it.
        x: what is masked.

    Returns:
        The mask with dimensions of size one where it had none.

    Raises:
        InputError: for a mask that is not bool or does not broadcast.
    """
    if mask.dtype != torch.bool:
        raise InputError(f"mask must be bool, got {mask.dtype}")
    whole = mask[(..., *(None,) * (x.dim() - mask.dim()))]
    if whole.dim() != x.dim() or any(
        m not in (1, n) for m, n in zip(whole.shape, x.shape, strict=True)
    ):
        raise InputError(
            f"mask must have the leading dimensions of x {tuple(x.shape)}, got {tuple(mask.shape)}"
        )
    return whole


def mean_square(x: Tensor, dim: int, mask: Tensor | None, sync: bool) -> tuple[Tensor, Tensor]:
    """Mean square of every channel, ``mean(x^2)``, and the number of values behind it.

    Args:
        x: any shape, C channels in dimension ``dim``; zero where ``mask`` is False.
        dim: dimension of the channels.
        mask: True where a value counts; dimensions as ``x``.
        sync: take the values of all processes of ``torch.distributed`` together.

    Returns:
        Mean square ``[C]``, zero where nothing counts, and count ``[C]``, in the dtype of the
        statistics.
    """
    total, _ = channel_products(x, x, dim)
    if mask is None:
        count = torch.full_like(total, x.numel() // x.shape[dim])
    else:  # summed before it is spread: it is usually far smaller than x
        others = _others(x, dim)
        repeats = prod([x.shape[d] for d in others if mask.shape[d] == 1])
        count = (mask.sum(others) * repeats).to(total.dtype).expand_as(total)
    if sync and dist.is_initialized():
        both = torch.stack([total, count])
        dist.all_reduce(both)
        total, count = both.unbind()
    return total / count.clamp(min=1), count


def channel_products(a: Tensor, b: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """Sums of ``a * b`` and of ``a`` over all dimensions but ``dim``, both ``[C]``.

    Args:
        a: any shape, C channels in dimension ``dim``.
        b: shaped like ``a``.
        dim: dimension of the channels.

    Returns:
        Both in float32 for half ``b``, else in the dtype of ``b``.
    """
    if a.dtype == b.dtype and compiled_for_cpu(b):
        return _products_in_graph(a, b, dim)  # type: ignore[no-any-return]
    if a.dtype == b.dtype and eager_on_cpu(b):
        return _products(a, b, dim)
    dtype, others = _statistics(b), _others(b, dim)
    return (a.to(dtype) * b).sum(others), a.sum(others, dtype=dtype)


def scale_channels(x: Tensor, scale: Tensor, shift: Tensor | None, dim: int) -> Tensor:
    """``x * scale + shift`` per channel, shaped and typed like ``x``."""
    dtype = _statistics(x)
    if x.dtype != dtype and eager_on_cpu(x) and x.numel():
        # One pass in half precision; torch's other operations convert value by value.
        scale = scale.to(dtype)
        shift = None if shift is None else shift.to(dtype)
        rows = _channels_are_last(x, dim)
        flat, one = _flat(x, dim, rows), torch.ones_like(scale)
        out = torch.native_batch_norm(
            flat, scale, shift, torch.zeros_like(one), one, False, 0.0, 0.0
        )[0]
        return out.view(x.movedim(dim, -1).shape).movedim(-1, dim) if rows else out.view(x.shape)
    scale = along(scale, x, dim)
    if shift is None:
        return (x * scale).to(x.dtype)
    return torch.addcmul(along(shift, x, dim), x, scale).to(x.dtype)


def along(vector: Tensor, x: Tensor, dim: int) -> Tensor:
    """View ``[C]`` so that it broadcasts along dimension ``dim`` of ``x``."""
    shape = [1] * x.dim()
    shape[dim] = -1
    return vector.reshape(shape)


def _statistics(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _others(x: Tensor, dim: int) -> tuple[int, ...]:
    return tuple(d for d in range(x.dim()) if d != dim % x.dim())


def _products(a: Tensor, b: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    if not b.numel():
        zero = b.new_zeros(b.shape[dim], dtype=_statistics(b))
        return zero, zero.clone()
    rows = _channels_are_last(b, dim)
    blocks = zip(*(torch.split(_flat(t, dim, rows), BLOCK) for t in (a, b)), strict=True)
    product, total = zip(*(_block_products(*pair) for pair in blocks), strict=True)
    return torch.stack(product).sum(0), torch.stack(total).sum(0)


def _block_products(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    zero = b.new_zeros(b.shape[1], dtype=_statistics(b))
    one = torch.ones_like(zero)
    _, product, total = torch.ops.aten.native_batch_norm_backward(
        a,
        b,
        one,
        zero,
        one,
        None,
        None,
        False,  # by the statistics given
        0.0,
        [False, True, True],
    )
    return product, total


def _empty_products(a: Tensor, b: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    product = b.new_empty(b.shape[dim], dtype=_statistics(b))
    return product, torch.empty_like(product)


_products_in_graph = graph_operator(
    "channel_products(Tensor a, Tensor b, int dim) -> (Tensor, Tensor)", _products, _empty_products
)


def _channels_are_last(x: Tensor, dim: int) -> bool:
    """Whether memory has the channels of a position side by side."""
    return x.movedim(dim, -1).is_contiguous()


def _flat(x: Tensor, dim: int, rows: bool) -> Tensor:
    """Rows of channels ``[N, C]``, or what comes before, the channels, and after: ``[N, C, L]``."""
    if rows:
        return x.movedim(dim, -1).reshape(-1, x.shape[dim]).contiguous()
    dim %= x.dim()
    return x.reshape(prod(x.shape[:dim]), x.shape[dim], -1).contiguous()
