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

Gradients of weight and bias are sums over rows. For float32 on the CPU the compiler (torch 2.13)
walks down the columns for them, which takes longer than all the rest, and twice over each row for
LayerNorm's moments: compiled graphs call the kernel for both. For half input that kernel adds up in
half precision: over 4096 rows of bfloat16 five to seven percent is lost (relative root mean
square). Here they are added up in float32, for LayerNorm too.

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
from normkit.functional._capture import compiled_for_cpu, eager_on_cpu, graph_operator
from normkit.functional.channels import along, channel_products, scale_channels

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
    affine = weight is not None or bias is not None
    ours = eager_on_cpu(x) if x.dtype in _HALF else compiled_for_cpu(x)
    if not affine or not ours or _watched(x, weight, bias):
        return F.layer_norm(x, shape, weight, bias, eps)
    if not torch.is_grad_enabled():
        return _layer_norm(x, weight, bias, len(shape), eps)[0]
    out, *_ = _LayerNorm.apply(x, weight, bias, len(shape), eps)  # type: ignore[no-untyped-call]
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
    traced = torch.compiler.is_compiling() and not _compiled_with_sums(x)
    if traced or _watched(x, weight, bias):
        return _rms_formula(x, len(shape), weight, bias, eps)[0]
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
    if torch.compiler.is_compiling() or _watched(z):
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


def _compiled_with_sums(x: Tensor) -> bool:
    """Whether a compiled derivative would have sums over rows that the kernel is faster at."""
    return compiled_for_cpu(x) and torch.is_grad_enabled() and x.dtype not in _HALF


def _watched(*tensors: Tensor | None) -> bool:
    """Whether something other than plain reverse mode watches these tensors."""
    if torch._C._are_functorch_transforms_active():
        return True
    return not torch.compiler.is_compiling() and any(t is not None and _dual(t) for t in tensors)


def _dual(t: Tensor) -> bool:
    return forward_ad.unpack_dual(t).tangent is not None  # type: ignore[no-untyped-call]


def _accumulator(x: Tensor) -> torch.dtype:
    return torch.float32 if x.dtype in _HALF else x.dtype


def _trailing(k: int) -> tuple[int, ...]:
    return tuple(range(-k, 0))


def _affine(xhat: Tensor, weight: Tensor | None, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    out = xhat if weight is None else xhat * weight
    return (out if bias is None else out + bias).to(dtype)


def _rms_formula(
    x: Tensor, k: int, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    wide = x.to(_accumulator(x))
    rstd = (wide.square().mean(_trailing(k), keepdim=True) + eps).rsqrt()
    return _affine(wide * rstd, weight, bias, x.dtype), rstd


def _crms_formula(z: Tensor, eps: float) -> Tensor:
    wide = z.to(_accumulator(z))
    power = wide.square().sum(-1, keepdim=True) + wide.sum(-1, keepdim=True).square()
    return (wide * (power / (z.shape[-1] + 1) + eps).rsqrt()).to(z.dtype)


def _layer_norm(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, k: int, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Output, mean and root of each row."""
    if torch.compiler.is_compiling():
        return _layer_norm_in_graph(x, weight, bias, k, eps)  # type: ignore[no-any-return]
    return _layer_norm_kernel(x, weight, bias, k, eps)


def _layer_norm_kernel(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, k: int, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    # Parameters in the dtype of the moments make the kernel keep these in float32 for half input.
    gain, shift = (None if p is None else p.to(_accumulator(x)) for p in (weight, bias))
    return torch.native_layer_norm(x, x.shape[x.dim() - k :], gain, shift, eps)


def _empty_layer_norm(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, k: int, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    mean = x.new_empty((*x.shape[: x.dim() - k], *(1,) * k), dtype=_accumulator(x))
    return x.new_empty(x.shape), mean, torch.empty_like(mean)


_layer_norm_in_graph = graph_operator(
    "layer_norm(Tensor x, Tensor? weight, Tensor? bias, int k, float eps) "
    "-> (Tensor, Tensor, Tensor)",
    _layer_norm_kernel,
    _empty_layer_norm,
)


class _LayerNorm(torch.autograd.Function):
    """LayerNorm whose parameters' gradients are summed fast and in float32."""

    @staticmethod
    def forward(
        x: Tensor, weight: Tensor | None, bias: Tensor | None, k: int, eps: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        return _layer_norm(x, weight, bias, k, eps)

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
        if torch.compiler.is_compiling():
            found: Any = _kernel_in_graph(grad, x, weight, mean, rstd, ctx.k, True)
        elif torch.is_grad_enabled():
            found = _differentiable(x, weight, grad, ctx.k, ctx.eps, centered=True)
        else:
            found = _kernel(x, weight, grad, mean, rstd, ctx.k, wanted)
        return _typed(found, x, weight, ctx.bias_dtype, wanted)


class _RMSNorm(torch.autograd.Function):
    """RMSNorm that saves ``x``, ``weight`` and one root a row."""

    @staticmethod
    def forward(
        x: Tensor, weight: Tensor | None, bias: Tensor | None, k: int, eps: float
    ) -> tuple[Tensor, Tensor]:
        if torch.compiler.is_compiling():
            return _rms_formula(x, k, weight, bias, eps)
        wide = x.to(_accumulator(x))  # first: operations on two dtypes are slow
        length = torch.linalg.vector_norm(wide, dim=_trailing(k), keepdim=True)
        rstd = length.square_().div_(x.shape[-k:].numel()).add_(eps).rsqrt_()
        out = wide * rstd if wide is x else wide.mul_(rstd)
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
        wanted, zero = list(ctx.needs_input_grad[:3]), torch.zeros_like(rstd)
        if torch.compiler.is_compiling():
            _, *sums = _kernel_in_graph(grad, x, weight, zero, rstd, ctx.k, False)
            dx = _derivative(x * rstd, rstd, weight, grad, ctx.k, centered=False)
            found: Any = (dx, *sums)
        elif torch.is_grad_enabled():
            found = _differentiable(x, weight, grad, ctx.k, ctx.eps, centered=False)
        else:
            found = _kernel(x, weight, grad, zero, rstd, ctx.k, wanted)
            if wanted[0]:
                # The kernel took rstd * mean(grad * weight) off every member of a row.
                rows = grad.flatten(-ctx.k)
                gain = rows.new_ones(rows.shape[-1]) if weight is None else weight.flatten()
                mean = rows @ gain.to(rows.dtype) / rows.shape[-1]
                found[0].add_((mean.reshape(rstd.shape) * rstd).to(x.dtype))
        return _typed(found, x, weight, ctx.bias_dtype, wanted)


def _kernel(
    x: Tensor,
    weight: Tensor | None,
    grad: Tensor,
    mean: Tensor,
    rstd: Tensor,
    k: int,
    wanted: list[bool],
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Derivatives of ``(x - mean) rstd weight + bias`` where mean and rstd are LayerNorm's."""
    shape, half = x.shape[x.dim() - k :], x.dtype in _HALF
    wide = rstd.new_ones(shape) if weight is None else weight.to(rstd.dtype).contiguous()
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
    if half and (wanted[1] or wanted[2]):
        xhat = x.to(rstd.dtype).sub_(mean).mul_(rstd)
        wide_grad, xhat = (t.reshape(-1, shape.numel()) for t in (grad.to(rstd.dtype), xhat))
        dw, db = (sums.reshape(shape) for sums in channel_products(wide_grad, xhat, -1))
    return dx, dw, db


def _derivatives(
    grad: Tensor,
    x: Tensor,
    weight: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    k: int,
    by_input: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """All three, or those by weight and bias with nothing for that by ``x``."""
    dx, dw, db = _kernel(x, weight, grad, mean, rstd, k, [by_input, True, True])
    return dx if by_input else x.new_empty(0), dw, db


def _empty_derivatives(
    grad: Tensor,
    x: Tensor,
    weight: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    k: int,
    by_input: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    shape = x.shape[x.dim() - k :]
    return x.new_empty(x.shape if by_input else 0), rstd.new_empty(shape), rstd.new_empty(shape)


_kernel_in_graph = graph_operator(
    "layer_norm_derivatives(Tensor grad, Tensor x, Tensor? weight, Tensor mean, Tensor rstd, "
    "int k, bool by_input) -> (Tensor, Tensor, Tensor)",
    _derivatives,
    _empty_derivatives,
)


def _typed(
    found: Any, x: Tensor, weight: Tensor | None, bias: torch.dtype | None, wanted: list[bool]
) -> Any:
    """Gradients in the dtypes of what they belong to, and None for ``k`` and ``eps``."""
    dtypes = (x.dtype, None if weight is None else weight.dtype, bias)
    kept = (
        g.to(dtype) if want else None for g, dtype, want in zip(found, dtypes, wanted, strict=True)
    )
    return (*kept, None, None)


def _derivative(
    xhat: Tensor, rstd: Tensor, weight: Tensor | None, grad: Tensor, k: int, *, centered: bool
) -> Tensor:
    """Derivative by ``x``, given what ``weight`` multiplies."""
    g = grad if weight is None else grad * weight
    if centered:
        g = g - g.mean(_trailing(k), keepdim=True)
    return rstd * (g - xhat * (g * xhat).mean(_trailing(k), keepdim=True))


def _differentiable(
    x: Tensor, weight: Tensor | None, grad: Tensor, k: int, eps: float, *, centered: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """First derivatives as a formula of ``x``: to autograd what was saved is constant."""
    leading = list(range(x.dim() - k))
    wide, grad = x.to(_accumulator(x)), grad.to(_accumulator(x))
    if centered:
        wide = wide - wide.mean(_trailing(k), keepdim=True)
    rstd = (wide.square().mean(_trailing(k), keepdim=True) + eps).rsqrt()
    xhat = wide * rstd
    dx = _derivative(xhat, rstd, weight, grad, k, centered=centered)
    return dx, (grad * xhat).sum(leading), grad.sum(leading)


class _CRMSNorm(torch.autograd.Function):
    """CRMSNorm that saves ``z``, its sum and one root a row."""

    @staticmethod
    def forward(z: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
        rows = z.reshape(-1, z.shape[-1])  # what sums and scales channels does so for rows
        if z.dtype in _HALF:
            power, total = channel_products(rows, rows, 0)
        else:
            power, total = torch.linalg.vector_norm(rows, dim=-1).square_(), rows.sum(-1)
        rstd = power.addcmul_(total, total).div_(z.shape[-1] + 1).add_(eps).rsqrt_()
        return scale_channels(rows, rstd, None, 0).reshape(z.shape), total, rstd

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        z, ctx.eps = inputs
        ctx.mark_non_differentiable(*output[1:])
        ctx.save_for_backward(z, *output[1:])

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_: Tensor) -> Any:
        z, total, rstd = ctx.saved_tensors
        rows, grads = (t.reshape(-1, z.shape[-1]) for t in (z, grad))
        if torch.is_grad_enabled():
            return _crms_differentiable(rows, grads, ctx.eps).reshape(z.shape).to(z.dtype), None
        pull = channel_products(grads, rows, 0)[0] * rstd.pow(3) / (z.shape[-1] + 1)
        dz = scale_channels(grads.to(rstd.dtype), rstd, -pull * total, 0)
        dz.addcmul_(rows.to(rstd.dtype), along(pull, rows, 0), value=-1)
        return dz.reshape(z.shape).to(z.dtype), None


def _crms_differentiable(rows: Tensor, grads: Tensor, eps: float) -> Tensor:
    """The derivative of CRMSNorm as a formula of its input."""
    wide, grads = rows.to(_accumulator(rows)), grads.to(_accumulator(rows))
    d, total = rows.shape[-1] + 1, wide.sum(-1, keepdim=True)
    rstd = ((wide.square().sum(-1, keepdim=True) + total.square()) / d + eps).rsqrt()
    pull = torch.linalg.vecdot(grads, wide).unsqueeze(-1) * rstd.pow(3) / d
    dz: Tensor = grads * rstd - (wide + total) * pull
    return dz
