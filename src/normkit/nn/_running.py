"""What norms with running quadratic statistics share: PowerNorm and Unified Normalization.

Both divide each channel by the root of a mean square that is kept over iterations, and both derive
by a formula whose mean over the batch is kept over iterations too:

    z  = x / sqrt(var + eps),            y  = ratio * z * weight + bias (ratio in the derivative)
    dx = (g - c z) / sqrt(var + eps),    g  = dy * ratio * weight

where an exact derivative by the batch's own mean square has ``c = mean(g z)``. Subclasses say which
``var`` a batch is divided by, and which ``c`` stands for the mean.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn

from normkit.errors import InputError
from normkit.functional.channels import (
    along,
    check_channels,
    mean_square,
    scale_channels,
    spread_mask,
)


class RunningNorm(nn.Module):
    """A norm by a running mean square per channel; subclasses define :meth:`normalize`.

    Args:
        num_features: number of channels C.
        eps: added to the mean square, in units of the input squared.
        momentum: weight of the newest batch in the running statistics, in (0, 1].
        affine: whether there are a gain and a shift per channel.
        warmup: iterations during which each batch is divided by its own mean square.
        channel_dim: dimension of the channels: -1 for tokens ``[*, C]``, 1 for images
            ``[B, C, *]``.
        sync: take statistics over all processes of ``torch.distributed``, in both directions.
        device: of parameters and buffers.
        dtype: of parameters and buffers.
    """

    running_var: Tensor
    running_grad: Tensor
    num_batches_tracked: Tensor

    def __init__(
        self,
        num_features: int,
        eps: float,
        momentum: float,
        affine: bool,
        warmup: int,
        channel_dim: int,
        sync: bool,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
    ) -> None:
        super().__init__()
        if num_features < 1:
            raise InputError(f"num_features must be at least 1, got {num_features}")
        if not eps >= 0:
            raise InputError(f"eps must be at least 0, got {eps}")
        if not 0 < momentum <= 1:
            raise InputError(f"momentum must be in (0, 1], got {momentum}")
        if warmup < 0:
            raise InputError(f"warmup must be at least 0, got {warmup}")
        self.num_features = num_features
        self.eps = eps
        self.momentum = momentum
        self.affine = affine
        self.warmup = warmup
        self.channel_dim = channel_dim
        self.sync = sync
        self.weight: nn.Parameter | None
        self.bias: nn.Parameter | None
        for name in ("weight", "bias"):
            values = torch.empty(num_features, device=device, dtype=dtype) if affine else None
            self.register_parameter(name, None if values is None else nn.Parameter(values))
        for name in ("running_var", "running_grad"):
            self.register_buffer(name, torch.empty(num_features, device=device, dtype=dtype))
        steps = torch.empty((), device=device, dtype=torch.int64)
        self.register_buffer("num_batches_tracked", steps)

    def reset_running_stats(self) -> None:
        """Forget all batches."""
        self.running_var.fill_(1)
        self.running_grad.zero_()
        self.num_batches_tracked.zero_()

    def reset_parameters(self) -> None:
        """Set the gain to one, the shift to zero, and forget all batches."""
        self.reset_running_stats()
        if self.weight is not None and self.bias is not None:
            nn.init.ones_(self.weight)
            nn.init.zeros_(self.bias)

    def inference_affine(self) -> tuple[Tensor, Tensor]:
        """What the layer is in evaluation: ``x * scale + shift`` per channel.

        Returns:
            Scale and shift ``[C]`` in float64: ``weight / sqrt(running_var + eps)`` and ``bias``.
        """
        scale = (self.running_var.double() + self.eps).rsqrt()
        if self.weight is None or self.bias is None:
            return scale, torch.zeros_like(scale)
        return scale * self.weight.double(), self.bias.double()

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Normalize ``x``; in training, take its statistics too.

        Args:
            x: floating point, with a batch and C channels in dimension ``channel_dim``.
            mask: True where a value counts; bool, with the leading dimensions of ``x`` or
                broadcastable to it. What does not count is taken as zero.

        Returns:
            Tensor shaped and typed like ``x``.

        Raises:
            InputError: for integer ``x``, another number of channels, or a mask that does not fit.
        """
        check_channels(x, self.num_features, self.channel_dim)
        if mask is not None:
            mask = spread_mask(mask, x)
            x = x.masked_fill(~mask, 0)
        x = self.prepare(x)
        if self.training:
            with torch.no_grad():
                square, count = mean_square(x.detach(), self.channel_dim, mask, self.sync)
            return self.normalize(x, square, count)
        wide = torch.promote_types(self.running_var.dtype, torch.float32)
        rstd = (self.running_var.to(wide) + self.eps).rsqrt()
        return divide(x, self.weight, self.bias, rstd, self.channel_dim)

    def prepare(self, x: Tensor) -> Tensor:
        """What is done to the input before its statistics are taken: nothing."""
        return x

    def normalize(self, x: Tensor, square: Tensor, count: Tensor) -> Tensor:
        """Normalize a batch in training, given the mean square and count of its channels."""
        raise InputError(f"{type(self).__name__} must define normalize(x, square, count)")

    def extra_repr(self) -> str:
        """The constructor's arguments."""
        text = f"{self.num_features}, eps={self.eps}, momentum={self.momentum}"
        text += f", affine={self.affine}, warmup={self.warmup}, channel_dim={self.channel_dim}"
        return text + (", sync=True" if self.sync else "")


def divide(x: Tensor, weight: Tensor | None, bias: Tensor | None, rstd: Tensor, dim: int) -> Tensor:
    """``x * rstd * weight + bias`` per channel, in one pass."""
    scale = rstd if weight is None else rstd * weight
    return scale_channels(x, scale, None if bias is None else bias.to(scale.dtype), dim)


def mean_product(total: Tensor, count: Tensor, sync: bool) -> Tensor:
    """A channel's mean over the batch, given this process's sum and the count of all."""
    if sync and dist.is_initialized():
        total = total.clone()
        dist.all_reduce(total)
    return total / count.clamp(min=1)


def derivatives(
    grad: Tensor,
    x: Tensor,
    sums: tuple[Tensor, Tensor],
    gain: Tensor,
    seen: Tensor,
    along_x: Tensor,
    dim: int,
    dtypes: tuple[torch.dtype | None, torch.dtype | None],
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Derivatives by input, weight and bias.

    Args:
        grad: derivative by the output.
        x: the input.
        sums: ``sum(grad * x)`` and ``sum(grad)`` per channel ``[C]``.
        gain: factor of ``grad`` in the derivative by ``x``.
        seen: factor of the first of them in the derivative by the weight.
        along_x: what is subtracted, in units of ``x``.
        dim: dimension of the channels.
        dtypes: of weight and bias; None where there is none.
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    dx = grad.to(wide) * along(gain, x, dim)
    dx.addcmul_(x.to(wide), along(along_x, x, dim), value=-1)
    weight, bias = dtypes
    dw = None if weight is None else (seen * sums[0]).to(weight)
    db = None if bias is None else sums[1].to(bias)
    return dx.to(x.dtype), dw, db
