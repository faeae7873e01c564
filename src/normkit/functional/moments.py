"""The one idea: statistics over a group of numbers, dense or ragged, and normalization by them.

A group is described by a *center* and a *scale*; normalizing is ``(x - center) / scale``.

============  ======  =====================================================================
kind          center  scale
============  ======  =====================================================================
"std"         mean    standard deviation, ``sqrt(sum (x - mean)^2 / (n - ddof))``
"rms"         0       root mean square, ``sqrt(mean x^2)``
"l1"          mean    mean absolute deviation, ``mean |x - mean|``
"quadratic"   0       mean square, ``mean x^2``: the statistic that PowerNorm and Unified
                      Normalization smooth *before* taking the root
============  ======  =====================================================================

Half-precision input is accumulated in float32. Deviations are taken from a member of the group
before they are averaged, so that a constant group has exactly its value as center and exactly zero
as deviation, at any offset; the derivative of a root at zero is taken as zero.

Shapes: ``*`` any dimensions of ``x``; N rows of a ragged batch; S segments; D trailing features.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from normkit.errors import InputError

Kind = Literal["std", "rms", "l1", "quadratic"]
KINDS: tuple[Kind, ...] = ("std", "rms", "l1", "quadratic")
_CENTERED = ("std", "l1")


class Moments(NamedTuple):
    """Statistics of groups.

    Attributes:
        center: what is subtracted; zero for the kinds without centering.
        scale: what is divided by, before any ``eps``.
        n: number of members per group, in the dtype of the statistics.
    """

    center: Tensor
    scale: Tensor
    n: Tensor


def moments(
    x: Tensor,
    dim: int | Sequence[int],
    mask: Tensor | None = None,
    kind: Kind = "std",
    ddof: int = 0,
) -> Moments:
    r"""Statistics of ``x`` over ``dim``, kept as dimensions of size one.

    ``center = mean(x)`` and ``scale = sqrt(sum((x - center)^2) / (n - ddof))`` for ``kind="std"``;
    the table at the head of this module has the other kinds.

    Args:
        x: values, floating point, any shape.
        dim: the dimension or dimensions that form a group.
        mask: True where a value belongs to its group; broadcastable to ``x``.
        kind: which statistic.
        ddof: subtracted from the count in the divisor of ``"std"`` (1 for the sample deviation).
            A group with no more than ``ddof`` members has scale zero.

    Returns:
        :class:`Moments` of tensors shaped like ``x`` with every ``dim`` of size one, in float32 for
        half-precision ``x``, else in the dtype of ``x``. A group without members has center,
        scale and n zero.

    Raises:
        InputError: for integer ``x``, an unknown ``kind``, a bad ``dim``, ``mask`` or ``ddof``.
    """
    dims = _check(x, dim, mask, kind, ddof)
    x = _accumulable(x)
    if mask is None:
        size = 1
        for d in dims:
            size *= x.shape[d]
        count = x.new_full([1 if d in dims else n for d, n in enumerate(x.shape)], float(size))
        if size == 0:
            return Moments(torch.zeros_like(count), torch.zeros_like(count), count)
        kept = x
    else:
        mask = mask.expand(x.shape)
        count = mask.to(x.dtype).sum(dims, keepdim=True)
        # A masked NaN must reach neither the sum nor, as 0 * NaN, the gradient.
        kept = x.masked_fill(~mask, 0)
    divisor = count.clamp(min=1)

    if kind not in _CENTERED:
        power = kept.square().sum(dims, keepdim=True) / divisor
        scale = power if kind == "quadratic" else _sqrt(power)
        return Moments(torch.zeros_like(power), scale, count)

    with torch.no_grad():
        reference = _reference(x, dims, mask)
    deviation = kept - reference
    if mask is not None:
        deviation = deviation.masked_fill(~mask, 0)
    shift = deviation.sum(dims, keepdim=True) / divisor
    deviation = deviation - shift
    if mask is not None:
        deviation = deviation.masked_fill(~mask, 0)
    center = reference + shift
    if kind == "l1":
        return Moments(center, deviation.abs().sum(dims, keepdim=True) / divisor, count)
    spread = deviation.square().sum(dims, keepdim=True)
    return Moments(center, _deviation(spread, count, ddof), count)


def normalize(
    x: Tensor,
    dim: int | Sequence[int],
    mask: Tensor | None = None,
    kind: Kind = "std",
    ddof: int = 0,
    eps: float = 1e-8,
) -> Tensor:
    r"""Center and scale ``x`` over ``dim``: ``(x - center) / (scale + eps)``.

    Args:
        x: values, floating point, any shape.
        dim: the dimension or dimensions that form a group.
        mask: True where a value belongs to its group; broadcastable to ``x``.
        kind: which statistic; ``"quadratic"`` divides by the root of its scale, as ``"rms"`` does.
        ddof: see :func:`moments`.
        eps: added to the scale, in units of ``x``.

    Returns:
        Tensor shaped and typed like ``x``; masked values and constant centered groups are exactly
        zero.

    Raises:
        InputError: as :func:`moments`.
    """
    center, scale, _ = moments(x, dim, mask, kind, ddof)
    if kind == "quadratic":
        scale = _sqrt(scale)
    values = _accumulable(x)
    if mask is not None:
        values = values.masked_fill(~mask.expand(x.shape), 0)
    out = (values - center) / (scale + eps)
    if mask is not None:
        out = out.masked_fill(~mask.expand(x.shape), 0)
    return out.to(x.dtype)


def segment_moments(
    x: Tensor,
    segment_ids: Tensor,
    num_segments: int,
    mask: Tensor | None = None,
    kind: Kind = "std",
    ddof: int = 0,
) -> Moments:
    r"""Statistics of the rows of ``x`` by segment: the ragged twin of :func:`moments`.

    Args:
        x: values ``[N]`` or ``[N, *D]``, floating point; each trailing feature has its own
            statistics.
        segment_ids: segment of each row ``[N]``, integers in ``0..num_segments-1``, any order. A
            value outside that range is an error on the CPU and undefined elsewhere.
        num_segments: number of segments S.
        mask: True where a row belongs to its segment ``[N]``.
        kind: which statistic.
        ddof: see :func:`moments`.

    Returns:
        :class:`Moments` with ``center`` and ``scale`` ``[S, *D]`` and ``n`` ``[S]`` (with a
        one for each trailing dimension). A segment without members has all three zero.

    Raises:
        InputError: for integer ``x``, an unknown ``kind``, ids or a mask of another length, a
            negative ``num_segments`` or ``ddof``.
    """
    _check_segments(x, segment_ids, num_segments, mask, kind, ddof)
    x = _accumulable(x)
    tail = (1,) * (x.dim() - 1)
    ids = segment_ids.reshape(-1, *tail).expand(x.shape)

    def total(values: Tensor) -> Tensor:
        empty = values.new_zeros((num_segments, *values.shape[1:]))
        return empty.scatter_add(0, ids, values)

    if mask is None:
        member = None
        ones = x.new_ones(x.shape[0])
    else:
        member = mask.reshape(-1, *tail).expand(x.shape)
        x = x.masked_fill(~member, 0)
        ones = mask.to(x.dtype)
    count = x.new_zeros(num_segments).scatter_add(0, segment_ids, ones).reshape(-1, *tail)
    divisor = count.clamp(min=1)

    if kind not in _CENTERED:
        power = total(x.square()) / divisor
        scale = power if kind == "quadratic" else _sqrt(power)
        return Moments(torch.zeros_like(power), scale, count)

    with torch.no_grad():
        lowest = x if member is None else x.masked_fill(~member, -torch.inf)
        reference = x.new_full((num_segments, *x.shape[1:]), -torch.inf)
        reference = reference.scatter_reduce(0, ids, lowest, "amax", include_self=True)
        # Empty segments keep -inf, and an infinite member would turn every deviation into NaN.
        reference = torch.where(torch.isinf(reference), 0, reference)
    deviation = x - reference.gather(0, ids)
    if member is not None:
        deviation = deviation.masked_fill(~member, 0)
    shift = total(deviation) / divisor
    deviation = deviation - shift.gather(0, ids)
    if member is not None:
        deviation = deviation.masked_fill(~member, 0)
    center = reference + shift
    if kind == "l1":
        return Moments(center, total(deviation.abs()) / divisor, count)
    return Moments(center, _deviation(total(deviation.square()), count, ddof), count)


def segment_normalize(
    x: Tensor,
    segment_ids: Tensor,
    num_segments: int,
    mask: Tensor | None = None,
    kind: Kind = "std",
    ddof: int = 0,
    eps: float = 1e-8,
) -> Tensor:
    r"""Center and scale each row by its segment: ``(x - center[s]) / (scale[s] + eps)``.

    Args:
        x: values ``[N]`` or ``[N, *D]``, floating point.
        segment_ids: segment of each row ``[N]``.
        num_segments: number of segments S.
        mask: True where a row belongs to its segment ``[N]``.
        kind: which statistic; ``"quadratic"`` divides by the root of its scale.
        ddof: see :func:`moments`.
        eps: added to the scale, in units of ``x``.

    Returns:
        Tensor shaped and typed like ``x``; masked rows and constant centered segments (segments of
        one among them) are exactly zero.

    Raises:
        InputError: as :func:`segment_moments`.
    """
    center, scale, _ = segment_moments(x, segment_ids, num_segments, mask, kind, ddof)
    if kind == "quadratic":
        scale = _sqrt(scale)
    tail = (1,) * (x.dim() - 1)
    ids = segment_ids.reshape(-1, *tail).expand(x.shape)
    values = _accumulable(x)
    if mask is None:
        out = (values - center.gather(0, ids)) / (scale.gather(0, ids) + eps)
    else:
        outside = ~mask.reshape(-1, *tail).expand(x.shape)
        values = values.masked_fill(outside, 0)
        out = (values - center.gather(0, ids)) / (scale.gather(0, ids) + eps)
        out = out.masked_fill(outside, 0)
    return out.to(x.dtype)


def _accumulable(x: Tensor) -> Tensor:
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def _sqrt(power: Tensor) -> Tensor:
    """Square root whose derivative at zero is zero instead of infinite."""
    positive = power > 0
    return torch.where(
        positive, torch.where(positive, power, 1).sqrt(), torch.where(torch.isnan(power), power, 0)
    )


def _deviation(spread: Tensor, count: Tensor, ddof: int) -> Tensor:
    enough = count > ddof
    variance = spread / torch.where(enough, count - ddof, 1)
    return _sqrt(torch.where(enough, variance, 0))


def _reference(x: Tensor, dims: tuple[int, ...], mask: Tensor | None) -> Tensor:
    """Return one finite member of each group (zero where there is none)."""
    if mask is None:
        reference = x
        for d in dims:
            reference = reference.narrow(d, 0, 1)
    else:
        reference = x.masked_fill(~mask, -torch.inf).amax(dims, keepdim=True)
    return torch.where(torch.isfinite(reference), reference, 0)


def _check(
    x: Tensor, dim: int | Sequence[int], mask: Tensor | None, kind: str, ddof: int
) -> tuple[int, ...]:
    _check_common(x, mask, kind, ddof)
    dims: list[int] = []
    for d in (dim,) if isinstance(dim, int) else tuple(dim):
        if not -x.dim() <= d < x.dim():
            raise InputError(f"dim {d} is out of range for x of shape {tuple(x.shape)}")
        dims.append(d % x.dim())
    if not dims or len(set(dims)) != len(dims):
        raise InputError(f"dim must name at least one dimension, each once; got {dim!r}")
    if mask is not None:
        try:
            fits = mask.expand(x.shape).shape == x.shape
        except RuntimeError:
            fits = False
        if not fits:
            raise InputError(
                f"mask of shape {tuple(mask.shape)} does not broadcast to x {tuple(x.shape)}"
            )
    return tuple(dims)


def _check_segments(
    x: Tensor, segment_ids: Tensor, num_segments: int, mask: Tensor | None, kind: str, ddof: int
) -> None:
    _check_common(x, mask, kind, ddof)
    if x.dim() < 1:
        raise InputError("x must have at least one dimension, got a scalar")
    if segment_ids.dtype != torch.int64:
        raise InputError(f"segment_ids must be int64, got {segment_ids.dtype}")
    if num_segments < 0:
        raise InputError(f"num_segments must be at least 0, got {num_segments}")
    for name, rows in (("segment_ids", segment_ids), ("mask", mask)):
        if rows is not None and rows.shape != x.shape[:1]:
            raise InputError(f"{name} must have shape ({x.shape[0]},), got {tuple(rows.shape)}")


def _check_common(x: Tensor, mask: Tensor | None, kind: str, ddof: int) -> None:
    if not x.is_floating_point():
        raise InputError(f"x must be floating point, got {x.dtype}")
    if kind not in KINDS:
        raise InputError(f"kind must be one of {', '.join(KINDS)}; got {kind!r}")
    if ddof < 0:
        raise InputError(f"ddof must be at least 0, got {ddof}")
    if mask is not None and mask.dtype != torch.bool:
        raise InputError(f"mask must be bool, got {mask.dtype}")
