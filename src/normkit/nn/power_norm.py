"""PowerNorm.

PowerNorm: Rethinking Batch Normalization in Transformers (Shen et al., 2020), arXiv 2003.07845.

    z  = x / sqrt(psi2 + eps),                      y = z * weight + bias
    dx = (g - nu z) / sqrt(psi2 + eps),             g = dy * weight
    psi2 <- psi2 + a (mean(x^2) - psi2)             after the forward pass
    nu   <- nu (1 - a mean(z^2)) + a mean(g z)      after the derivative

per channel, with ``a`` the momentum: this is the paper's PN-V. PN scales the channels of each token
by their root mean square first, in groups (the layer scale); in evaluation PN-V is an affine map.
During the warm-up a batch is divided by its own mean square, and in iteration t the running value
keeps only ``(1 - a) (t - 1) / t``, so that the first batch sets it.

Shapes: B batch, N tokens, C channels.
Differences from the authors' code: the derivative is divided by what the forward pass divided by,
as in the paper (the code divides it by the batch's own root after the warm-up too); masked
positions count in neither direction; ``nu`` is the paper's (the code keeps ``nu / a``); channels
may be in any dimension; statistics may be taken over processes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from normkit.errors import InputError
from normkit.functional.channels import channel_products
from normkit.functional.norms import rms_norm
from normkit.nn._running import RunningNorm, derivatives, divide, mean_product


class PowerNorm(RunningNorm):
    r"""Divide channels by a running root mean square: ``x / sqrt(psi2 + eps) * weight + bias``.

    Args:
        num_features: number of channels C.
        eps: added to the mean squares, in units of the input squared.
        momentum: weight of the newest batch in the running statistics (the authors write one minus
            this).
        affine: whether there are a gain and a shift per channel.
        warmup: iterations during which each batch is divided by its own mean square.
        groups: groups of channels of the layer scale (the authors take the number of heads); None
            leaves it out, which is PN-V.
        channel_dim: dimension of the channels: -1 for tokens ``[*, C]``, 1 for images
            ``[B, C, *]``.
        sync: take statistics over all processes of ``torch.distributed``, in both directions.
        device: of parameters and buffers.
        dtype: of parameters and buffers.

    Raises:
        InputError: for a size below one, a negative eps or warmup, a momentum outside (0, 1], or
            groups that do not divide the channels.

    Source:
        arXiv 2003.07845, equations 5 to 11 and algorithm 1, and the authors' code.
    """

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float = 0.1,
        affine: bool = True,
        warmup: int = 10000,
        groups: int | None = 1,
        channel_dim: int = -1,
        sync: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            num_features, eps, momentum, affine, warmup, channel_dim, sync, device, dtype
        )
        if groups is not None and (groups < 1 or num_features % groups):
            raise InputError(f"groups must divide the {num_features} channels, got {groups}")
        self.groups = groups
        self.reset_parameters()

    def prepare(self, x: Tensor) -> Tensor:
        """Apply the layer scale: ``x / sqrt(mean(x^2) + eps)`` in each group of each token."""
        if self.groups is None:
            return x
        last = x.movedim(self.channel_dim, -1)
        size = self.num_features // self.groups
        grouped = last.reshape(*last.shape[:-1], self.groups, size)
        scaled = rms_norm(grouped, (size,), eps=self.eps)
        return scaled.flatten(-2).movedim(-1, self.channel_dim)

    def normalize(self, x: Tensor, square: Tensor, count: Tensor) -> Tensor:
        """Normalize a batch and move the running mean square."""
        moved = (self.running_var, self.num_batches_tracked)
        observe = _observe_opaquely if torch.compiler.is_compiling() else _observe
        rstd = observe(square, count, *moved, self.eps, self.momentum, self.warmup)
        options = (self.channel_dim, self.momentum, self.sync)
        return _PowerNorm.apply(  # type: ignore[no-any-return, no-untyped-call]
            x, self.weight, self.bias, rstd, square, count, self.running_grad, *options
        )

    def inference_affine(self) -> tuple[Tensor, Tensor]:
        """What the layer is in evaluation: ``x * scale + shift`` per channel.

        Returns:
            Scale and shift ``[C]`` in float64.

        Raises:
            InputError: with a layer scale, which looks at its input.
        """
        if self.groups is not None:
            raise InputError("its layer scale looks at each token; groups=None has none")
        return super().inference_affine()

    def extra_repr(self) -> str:
        """The constructor's arguments."""
        return f"{super().extra_repr()}, groups={self.groups}"


def from_official(state: Mapping[str, Tensor], momentum: float = 0.1) -> dict[str, Tensor]:
    """Rename the entries of a state dict of the authors' code (``MaskPowerNorm``).

    Args:
        state: of a layer or a whole model; entries of other layers are left as they are.
        momentum: one minus the authors' ``alpha_bkw``.

    Returns:
        The state dict of a model with :class:`PowerNorm` in the same places.
    """
    renamed = {}
    for name, value in state.items():
        path, dot, last = name.rpartition(".")
        if last == "running_phi":
            renamed[f"{path}{dot}running_var"] = value.flatten()
        elif last == "ema_gz":
            renamed[f"{path}{dot}running_grad"] = momentum * value.flatten()
        elif last == "iters":
            renamed[f"{path}{dot}num_batches_tracked"] = value.reshape(())
        else:
            renamed[name] = value
    return renamed


def _observe(
    square: Tensor,
    count: Tensor,
    running_var: Tensor,
    steps: Tensor,
    eps: float,
    momentum: float,
    warmup: int,
) -> Tensor:
    """Move the running mean square; return ``1 / sqrt(psi2 + eps)`` that a batch is scaled by."""
    fresh = count > 0
    steps.add_(fresh.any())
    running = running_var.to(square.dtype)
    var = torch.where(fresh & (steps <= warmup), square, running)
    share = 1 - 1 / steps.clamp(min=1).to(square.dtype)
    kept = (1 - momentum) * torch.where(steps < warmup, share, torch.ones_like(share))
    running_var.copy_(torch.where(fresh, square + kept * (running - square), running))
    return (var + eps).rsqrt()


# The compiler would compute what the derivative needs anew from buffers that have moved since.
_observe_opaquely = torch.library.custom_op(
    "normkit::power_norm_observe", _observe, mutates_args=("running_var", "steps")
)


@_observe_opaquely.register_fake
def _(square: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(square)


class _PowerNorm(torch.autograd.Function):
    """``x * rstd * weight + bias``, derived by the recurrence; saves ``x`` and vectors."""

    # In one function: under inference_mode torch.compile (2.13) mistakes a forward without ctx.
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        rstd: Tensor,
        square: Tensor,
        count: Tensor,
        nu: Tensor,
        dim: int,
        momentum: float,
        sync: bool,
    ) -> Tensor:
        ctx.save_for_backward(x, weight, rstd, square, count)
        ctx.nu = nu  # moves until the derivative is taken, as it should
        ctx.dim, ctx.momentum, ctx.sync = dim, momentum, sync
        ctx.dtypes = tuple(None if p is None else p.dtype for p in (weight, bias))
        return divide(x, weight, bias, rstd, dim)

    @staticmethod
    @once_differentiable  # type: ignore[misc, untyped-decorator, unused-ignore]
    def backward(ctx: Any, grad: Tensor) -> Any:
        x, weight, rstd, square, count = ctx.saved_tensors
        gain = rstd if weight is None else rstd * weight
        sums = channel_products(grad, x, ctx.dim)
        product = mean_product(gain * sums[0], count, ctx.sync)
        power = rstd.square()
        nu = ctx.nu.to(rstd.dtype, copy=True)
        moved = nu * (1 - ctx.momentum * square * power) + ctx.momentum * product
        ctx.nu.copy_(torch.where(count > 0, moved, nu))
        found = derivatives(grad, x, sums, gain, rstd, nu * power, ctx.dim, ctx.dtypes)
        return *found, *(None,) * 7
