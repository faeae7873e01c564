"""Norms over trailing dimensions, with derivatives that save the input and the moments of a row.

LayerNorm: Layer Normalization (Ba, Kiros, Hinton, 2016), arXiv 1607.06450.
RMSNorm: Root Mean Square Layer Normalization (Zhang and Sennrich, 2019), arXiv 1910.07467.
CRMSNorm: Pre-RMSNorm and Pre-CRMSNorm Transformers (Jiang et al., 2023), arXiv 2305.14858.

    layer_norm(x) = (x - mean(x)) / sqrt(var(x) + eps) * weight + bias
    rms_norm(x)   = x / sqrt(mean(x^2) + eps) * weight + bias
    crms_norm(z)  = z / sqrt((sum z^2 + (sum z)^2) / d + eps),  z the first d-1 of d coordinates
                                                                that sum to zero

Statistics are accumulated in float32 for half input, and the result is rounded once. Under
torch.compile and torch.export the formula itself is traced, for the compiler to fuse; so it is
under transforms of torch.func and in forward-mode differentiation. In eager mode on the CPU, where
torch composes rms_norm of a dozen passes, the derivative is LayerNorm's fused kernel with the mean
held at zero. With ``g = grad * weight`` and ``xhat = (x - mean) rstd`` that kernel gives
``rstd (g - mean(g) - xhat mean(g xhat))``; RMSNorm's derivative lacks ``mean(g)``, which one pass
adds back.

That kernel adds the rows' shares of the weight's gradient up in the dtype of the input: over 4096
rows of bfloat16 five to seven percent of it is lost (torch 2.13, relative root mean square). Here
they are added up in float32, for LayerNorm too.

Shapes: ``*`` leading dimensions; D the product of ``normalized_shape``, or the last dimension.
Differences from the authors' code: a bias where wanted, no partial RMSNorm.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import functional as F

from normkit.errors import InputError

_HALF = (torch.float16, torch.bfloat16)


def layer_norm(
    x: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    r"""Center and scale: ``(x - mean(x)) / sqrt(var(x) + eps) * weight + bias``.

    This is ``torch.nn.functional.layer_norm``, but that gradients of ``weight`` and ``bias`` for
    half input on the CPU are accumulated in float32.

    Args:
        x: ``[*, *normalized_shape]``, floating point.
        normalized_shape: the trailing dimensions that form a group.
        weight: gain ``[*normalized_shape]``.
        bias: shift ``[*normalized_shape]``.
        eps: added to the variance, in units of ``x^2``.

    Returns:
        Tensor shaped and typed like ``x``.

    Raises:
        InputError: for integer ``x``, or one that does not end in ``normalized_shape``.

    Source:
        arXiv 1607.06450, equations 3 and 4.
    """
    shape = tuple(normalized_shape)
    check_normalized(x, shape)
    exact = x.dtype not in _HALF or x.device.type != "cpu" or (weight is None and bias is None)
    if exact or _traced(x, weight, bias):
        return F.layer_norm(x, shape, weight, bias, eps)
    out, *_ = _HalfLayerNorm.apply(x, weight, bias, len(shape), eps)  # type: ignore[no-untyped-call]
    return out  # type: ignore[no-any-return]


def rms_norm(
    x: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float | None = None,
) -> Tensor:
    r"""Divide by the root mean square: ``x / sqrt(mean(x^2) + eps) * weight + bias``.

    Args:
        x: ``[*, *normalized_shape]``, floating point.
        normalized_shape: the trailing dimensions that form a group.
        weight: gain ``[*normalized_shape]``.
        bias: shift ``[*normalized_shape]``.
        eps: added to the mean square, in units of ``x^2``; None takes the machine epsilon of the
            dtype of the statistics, as torch does.

    Returns:
        Tensor shaped and typed like ``x``.

    Raises:
        InputError: for integer ``x``, or one that does not end in ``normalized_shape``.

    Source:
        arXiv 1910.07467, equation 4.
    """
    shape = tuple(normalized_shape)
    check_normalized(x, shape)
    if eps is None:
        eps = torch.finfo(_accumulator(x)).eps
    if _traced(x, weight, bias):
        return _rms_formula(x, len(shape), weight, bias, eps)
    if x.device.type != "cpu":  # torch has a fused kernel there
        out = F.rms_norm(x, shape, weight, eps)
        return out if bias is None else out + bias
    out, _ = _RMSNorm.apply(x, weight, bias, len(shape), eps)  # type: ignore[no-untyped-call]
    return out  # type: ignore[no-any-return]


def crms_norm(z: Tensor, eps: float = 1e-5) -> Tensor:
    r"""RMSNorm of a zero-sum vector that is kept without its last coordinate.

    ``z / sqrt((sum z^2 + (sum z)^2) / d + eps)`` with d one more than the size of ``z``: the
    coordinate left out is ``-sum(z)``.

    Args:
        z: ``[*, d-1]``, floating point.
        eps: added to the mean square, in units of ``z^2``.

    Returns:
        ``[*, d-1]``, typed like ``z``: the first d-1 coordinates of RMSNorm of the whole vector.

    Raises:
        InputError: for integer or scalar ``z``.

    Source:
        arXiv 2305.14858, section 3.3.
    """
    check_normalized(z, z.shape[-1:])
    if _traced(z):
        return _crms_formula(z, eps)
    out, *_ = _CRMSNorm.apply(z, eps)  # type: ignore[no-untyped-call]
    return out  # type: ignore[no-any-return]


def compress(x: Tensor) -> Tensor:
    """Leave out the last coordinate of vectors that sum to zero: ``[*, d]`` to ``[*, d-1]``.

    Args:
        x: vectors whose sum over the last dimension is zero; this is not checked.

    Raises:
        InputError: where there is no coordinate to leave out.
    """
    if x.dim() == 0 or x.shape[-1] < 2:
        raise InputError(f"x must have at least two coordinates, got shape {tuple(x.shape)}")
    return x[..., :-1]


def complete(z: Tensor) -> Tensor:
    """Bring back the coordinate that :func:`compress` left out: ``[*, d-1]`` to ``[*, d]``.

    Args:
        z: the first d-1 coordinates; the last becomes ``-sum(z)``.

    Raises:
        InputError: for a scalar.
    """
    if z.dim() == 0:
        raise InputError("z must have at least one dimension, got a scalar")
    return torch.cat([z, -z.sum(-1, keepdim=True)], -1)


def check_normalized(x: Tensor, normalized_shape: tuple[int, ...]) -> None:
    """Check that ``x`` is floating point and ends in ``normalized_shape``.

    Raises:
        InputError: where it is not or does not.
    """
    if not x.is_floating_point():
        raise InputError(f"x must be floating point, got {x.dtype}")
    k = len(normalized_shape)
    if k == 0 or x.dim() < k or tuple(x.shape[-k:]) != normalized_shape:
        raise InputError(
            f"x must end in normalized_shape {normalized_shape}, got shape {tuple(x.shape)}"
        )


def _traced(*tensors: Tensor | None) -> bool:
    """Whether something other than plain reverse mode watches these tensors."""
    return (
        torch.compiler.is_compiling()
        or torch._C._are_functorch_transforms_active()
        or any(t is not None and _dual(t) for t in tensors)
    )


def _dual(t: Tensor) -> bool:
    return forward_ad.unpack_dual(t).tangent is not None  # type: ignore[no-untyped-call]


def _accumulator(x: Tensor) -> torch.dtype:
    return torch.float32 if x.dtype in _HALF else x.dtype


def _rms_formula(
    x: Tensor, k: int, weight: Tensor | None, bias: Tensor | None, eps: float
) -> Tensor:
    wide = x.to(_accumulator(x))
    power = wide.square().mean(tuple(range(-k, 0)), keepdim=True)
    out = wide * (power + eps).rsqrt()
    if weight is not None:
        out = out * weight
    if bias is not None:
        out = out + bias
    return out.to(x.dtype)


def _crms_formula(z: Tensor, eps: float) -> Tensor:
    wide = z.to(_accumulator(z))
    power = wide.square().sum(-1, keepdim=True) + wide.sum(-1, keepdim=True).square()
    return (wide * (power / (z.shape[-1] + 1) + eps).rsqrt()).to(z.dtype)


class _HalfLayerNorm(torch.autograd.Function):
    """LayerNorm of half input whose parameters' gradients are accumulated in float32."""

    @staticmethod
    def forward(
        x: Tensor, weight: Tensor | None, bias: Tensor | None, k: int, eps: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        # Parameters in float32 make the kernel keep its moments in float32.
        gain, shift = (None if p is None else p.float() for p in (weight, bias))
        return torch.native_layer_norm(x, x.shape[x.dim() - k :], gain, shift, eps)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        x, weight, bias, ctx.k, ctx.eps = inputs
        ctx.mark_non_differentiable(*output[1:])
        ctx.save_for_backward(x, weight, *output[1:])
        ctx.bias_dtype = None if bias is None else bias.dtype

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_: Tensor) -> Any:
        x, weight, mean, rstd = ctx.saved_tensors
        wanted = list(ctx.needs_input_grad[:3])
        if torch.is_grad_enabled():
            mean = x.float().mean(tuple(range(-ctx.k, 0)), keepdim=True)
            found = _rms_derivative(x - mean, weight, grad, ctx.k, ctx.eps)
            dx = found[0] - found[0].mean(tuple(range(-ctx.k, 0)), keepdim=True)
            return _typed((dx, *found[1:]), x, weight, ctx.bias_dtype, wanted)
        found = _kernel(x, weight, grad, mean, rstd, ctx.k, wanted)
        return _typed(found, x, weight, ctx.bias_dtype, wanted)


class _RMSNorm(torch.autograd.Function):
    """RMSNorm that saves ``x``, ``weight`` and one root a row.

    A second derivative differentiates the formula, since the saved root is a constant to autograd.
    """

    @staticmethod
    def forward(
        x: Tensor, weight: Tensor | None, bias: Tensor | None, k: int, eps: float
    ) -> tuple[Tensor, Tensor]:
        dims = tuple(range(-k, 0))
        size = x.shape[-k:].numel()
        length = torch.linalg.vector_norm(x, dim=dims, keepdim=True, dtype=_accumulator(x))
        rstd = length.square_().div_(size).add_(eps).rsqrt_()
        out = x * rstd
        if weight is not None:
            out.mul_(weight)
        if bias is not None:
            out.add_(bias)
        return out.to(x.dtype), rstd

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        x, weight, bias, ctx.k, ctx.eps = inputs
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(x, weight, output[1])
        ctx.bias_dtype = None if bias is None else bias.dtype

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> Any:
        x, weight, rstd = ctx.saved_tensors
        wanted = list(ctx.needs_input_grad[:3])
        if torch.is_grad_enabled():
            found = _rms_derivative(x, weight, grad, ctx.k, ctx.eps)
            return _typed(found, x, weight, ctx.bias_dtype, wanted)
        dx, dw, db = _kernel(x, weight, grad, torch.zeros_like(rstd), rstd, ctx.k, wanted)
        if wanted[0]:
            # The kernel took rstd * mean(grad * weight) off every member of a row.
            rows = grad.flatten(-ctx.k)
            gain = rows.new_ones(rows.shape[-1]) if weight is None else weight.flatten()
            mean = rows @ gain.to(rows.dtype) / rows.shape[-1]
            dx.add_(mean.reshape(rstd.shape) * rstd)
        return _typed((dx, dw, db), x, weight, ctx.bias_dtype, wanted)


def _kernel(
    x: Tensor,
    weight: Tensor | None,
    grad: Tensor,
    mean: Tensor,
    rstd: Tensor,
    k: int,
    wanted: list[bool],
) -> Any:
    """Derivatives of ``(x - mean) rstd weight + bias`` where mean and rstd are LayerNorm's."""
    shape, leading = x.shape[x.dim() - k :], list(range(x.dim() - k))
    wide = rstd.new_ones(shape) if weight is None else weight.to(rstd.dtype).contiguous()
    half = x.dtype in _HALF
    dx, dw, db = torch.ops.aten.native_layer_norm_backward(
        grad.contiguous(),
        x.contiguous(),
        shape,
        mean,
        rstd,
        wide,
        wide,
        [wanted[0], wanted[1] and not half, wanted[2] and not half],
    )
    if half and wanted[1]:
        dw = (x - mean).mul_(rstd).mul_(grad).sum(leading)
    if half and wanted[2]:
        db = grad.sum(leading, dtype=rstd.dtype)
    return dx, dw, db


def _typed(
    found: Any, x: Tensor, weight: Tensor | None, bias: torch.dtype | None, wanted: list[bool]
) -> Any:
    """Gradients in the dtypes of what they belong to, and None for ``k`` and ``eps``."""
    dtypes = (x.dtype, None if weight is None else weight.dtype, bias)
    kept = (
        g.to(dtype) if want else None for g, dtype, want in zip(found, dtypes, wanted, strict=True)
    )
    return (*kept, None, None)


def _rms_derivative(x: Tensor, weight: Tensor | None, grad: Tensor, k: int, eps: float) -> Any:
    """First derivatives as a formula that can be differentiated again."""
    dims = tuple(range(-k, 0))
    leading = list(range(x.dim() - k))
    wide, grad = x.to(_accumulator(x)), grad.to(_accumulator(x))
    rstd = (wide.square().mean(dims, keepdim=True) + eps).rsqrt()
    xhat = wide * rstd
    g = grad if weight is None else grad * weight
    dx = rstd * (g - xhat * (g * xhat).mean(dims, keepdim=True))
    return dx, (grad * xhat).sum(leading), grad.sum(leading)


class _CRMSNorm(torch.autograd.Function):
    """CRMSNorm that saves ``z``, its sum and one root a row."""

    @staticmethod
    def forward(z: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
        dtype = _accumulator(z)
        total = z.sum(-1, keepdim=True, dtype=dtype)
        length = torch.linalg.vector_norm(z, dim=-1, keepdim=True, dtype=dtype)
        power = length.square_().addcmul_(total, total).div_(z.shape[-1] + 1)
        rstd = power.add_(eps).rsqrt_()
        return (z * rstd).to(z.dtype), total, rstd

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        z, ctx.eps = inputs
        ctx.mark_non_differentiable(*output[1:])
        ctx.save_for_backward(z, *output[1:])

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_: Tensor) -> Any:
        z, total, rstd = ctx.saved_tensors
        wide, grad = z.to(rstd.dtype), grad.to(rstd.dtype)
        if torch.is_grad_enabled():
            total = wide.sum(-1, keepdim=True)
            power = wide.square().sum(-1, keepdim=True) + total.square()
            rstd = (power / (z.shape[-1] + 1) + ctx.eps).rsqrt()
        along = torch.linalg.vecdot(grad, wide).unsqueeze(-1) * rstd.pow(3) / (z.shape[-1] + 1)
        dz = torch.addcmul(grad * rstd, wide + total, along, value=-1)
        return dz.to(z.dtype), None
