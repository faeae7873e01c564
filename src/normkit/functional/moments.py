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

Half-precision input is accumulated in float32, ragged sums in float64. Deviations are taken from a
member of the group before they are averaged, so that a constant group has exactly its value as
center and exactly zero as deviation, at any offset; the derivative of a root at zero is taken as
zero.

Shapes: ``*`` any dimensions of ``x``; N rows of a ragged batch; S segments; D trailing features.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
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
    return _dense(x, dim, mask, kind, ddof)[1]


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
    deviation, (_, scale, _) = _dense(x, dim, mask, kind, ddof)
    out = deviation / _divisor(scale, kind, eps)
    if mask is not None:  # a NaN in the group has made them NaN
        out = out.masked_fill(~mask, 0)
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
    return _ragged(x, segment_ids, num_segments, mask, kind, ddof)[1]


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
    deviation, (_, scale, _) = _ragged(x, segment_ids, num_segments, mask, kind, ddof)
    out = deviation / _divisor(scale, kind, eps).index_select(0, segment_ids)
    if mask is not None:
        out = out.masked_fill(~_rowwise(mask, x), 0)
    return out.to(x.dtype)


def _dense(
    x: Tensor, dim: int | Sequence[int], mask: Tensor | None, kind: str, ddof: int
) -> tuple[Tensor, Moments]:
    dims = _check(x, dim, mask, kind, ddof)
    x = _accumulable(x)
    if mask is None:
        size = math.prod([x.shape[d] for d in dims])
        count = x.new_full([1 if d in dims else n for d, n in enumerate(x.shape)], float(size))
        if size == 0:
            return x, Moments(torch.zeros_like(count), torch.zeros_like(count), count)
    else:
        count = mask.expand(x.shape).sum(dims, keepdim=True).to(x.dtype)

    def member() -> Tensor:
        if mask is not None:
            return x.masked_fill(~mask, -torch.inf).amax(dims, keepdim=True)
        first = x
        for d in dims:
            first = first.narrow(d, 0, 1)
        return first

    def total(values: Tensor) -> Tensor:
        return values.sum(dims, keepdim=True)

    return _statistics(x, mask, kind, ddof, count, member, total, lambda group: group)


def _ragged(
    x: Tensor, segment_ids: Tensor, num_segments: int, mask: Tensor | None, kind: str, ddof: int
) -> tuple[Tensor, Moments]:
    _check_segments(x, segment_ids, num_segments, mask, kind, ddof)
    x = _accumulable(x)
    ids = _rowwise(segment_ids, x).expand(x.shape)
    shape = (num_segments, *x.shape[1:])
    # Counted as integers: float32 counts no further than 2^24.
    ones = torch.ones_like(segment_ids) if mask is None else mask.long()
    counted = ones.new_zeros(num_segments).scatter_add(0, segment_ids, ones)
    count = _rowwise(counted, x).to(x.dtype)
    inside = None if mask is None else _rowwise(mask, x)

    def member() -> Tensor:
        values = x if inside is None else x.masked_fill(~inside, -torch.inf)
        return x.new_full(shape, -torch.inf).scatter_reduce(0, ids, values, "amax")

    # A scatter adds one value after the other: in float32 a million of them lose four digits.
    wide = x.dtype if x.device.type == "mps" else torch.float64

    def total(values: Tensor) -> Tensor:
        empty = values.new_zeros(shape, dtype=wide)
        return empty.scatter_add(0, ids, values.to(wide)).to(values.dtype)

    def spread(group: Tensor) -> Tensor:
        return group.index_select(0, segment_ids)

    return _statistics(x, inside, kind, ddof, count, member, total, spread)


def _statistics(
    x: Tensor,
    mask: Tensor | None,
    kind: str,
    ddof: int,
    count: Tensor,
    member: Callable[[], Tensor],
    total: Callable[[Tensor], Tensor],
    spread: Callable[[Tensor], Tensor],
) -> tuple[Tensor, Moments]:
    """Deviations from the centers, zero where masked, and the moments.

    Args:
        x: values.
        mask: broadcastable to ``x``.
        kind: which statistic.
        ddof: subtracted from the count.
        count: members per group.
        member: returns one member of each group, or an infinity where there is none.
        total: sums values by group.
        spread: gives every value the number of its group.
    """

    def kept(values: Tensor) -> Tensor:
        # Filled, not multiplied: a masked NaN must reach neither the sums nor the gradient.
        return values if mask is None else values.masked_fill(~mask, 0)

    divisor = count.clamp(min=1)
    if kind not in _CENTERED:
        x = kept(x)
        power = total(x.square()) / divisor
        scale = power if kind == "quadratic" else _sqrt(power)
        return x, Moments(torch.zeros_like(power), scale, count)
    with torch.no_grad():
        reference = member()
        # An infinite member would turn every deviation of its group into NaN.
        reference = torch.where(torch.isinf(reference), 0, reference)
    deviation = kept(x - spread(reference))
    shift = total(deviation) / divisor
    deviation = kept(deviation - spread(shift))
    if kind == "l1":
        scale = total(deviation.abs()) / divisor
    else:
        enough = count > ddof
        variance = total(deviation.square()) / torch.where(enough, count - ddof, 1)
        scale = _sqrt(torch.where(enough, variance, 0))
    return deviation, Moments(reference + shift, scale, count)


def _divisor(scale: Tensor, kind: str, eps: float) -> Tensor:
    """What deviations are divided by; one instead of zero, so that 0 / 0 is 0."""
    divisor = (_sqrt(scale) if kind == "quadratic" else scale) + eps
    return torch.where(divisor == 0, 1, divisor)


def _rowwise(rows: Tensor, x: Tensor) -> Tensor:
    """Give ``[N]`` a dimension of size one for each trailing dimension of ``x``."""
    return rows.reshape(-1, *(1,) * (x.dim() - 1))


def _accumulable(x: Tensor) -> Tensor:
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def _sqrt(power: Tensor) -> Tensor:
    """Square root whose derivative at zero is zero instead of infinite."""
    positive = power > 0
    return torch.where(
        positive, torch.where(positive, power, 1).sqrt(), torch.where(torch.isnan(power), power, 0)
    )


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
