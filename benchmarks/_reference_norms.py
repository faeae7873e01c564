"""Norms of single operations: the formulas, and the algorithms as their authors write them.

LayerNorm and RMSNorm as language models write them, with statistics in float32; CRMSNorm,
Unified Normalization and PowerNorm re-implemented from the facts of their authors' code, past the
warm-up and without the copies between layouts that it makes.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

EPS, KEEP, WINDOW = 1e-5, 0.9, 4


class LayerNorm(nn.LayerNorm):
    """LayerNorm of single operations."""

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        centered = wide - wide.mean(-1, keepdim=True)
        power = centered.square().mean(-1, keepdim=True)
        return (centered * (power + self.eps).rsqrt() * self.weight + self.bias).to(x.dtype)


class RMSNorm(nn.RMSNorm):
    """RMSNorm of single operations."""

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        return (wide * (wide.square().mean(-1, keepdim=True) + self.eps).rsqrt() * self.weight).to(
            x.dtype
        )


class CRMSNorm(nn.Module):
    """CRMSNorm as its authors write it."""

    def forward(self, z: Tensor) -> Tensor:
        wide = z.float()
        power = wide.square().sum(-1, keepdim=True) + wide.sum(-1, keepdim=True).square()
        return (wide * torch.rsqrt(power / (z.shape[-1] + 1) + EPS)).type_as(z)


class _Unified(torch.autograd.Function):
    """Unified Normalization: z is kept, not x."""

    @staticmethod
    def forward(ctx, x, weight, bias, var, window, grad_window, mean, slot):
        square = (x * x).mean((0, 1))
        window[slot] = square
        used = torch.exp(torch.mean(torch.log(window), 0))
        z = x / (used + EPS).sqrt()
        ctx.save_for_backward(z, used, weight, grad_window, mean)
        ctx.slot = slot
        var.copy_(KEEP * var + (1 - KEEP) * used)
        return weight * z + bias

    @staticmethod
    def backward(ctx, grad):
        z, used, weight, grad_window, mean = ctx.saved_tensors
        g = grad * weight
        grad_window[ctx.slot] = (g * z).mean((0, 1))
        mean.copy_(mean * KEEP + (1 - KEEP) * grad_window.mean(0))
        dx = 1.0 / torch.sqrt(used + EPS) * (g - mean * z)
        return dx, (grad * z).sum((0, 1)), grad.sum((0, 1)), *(None,) * 5


class _Power(torch.autograd.Function):
    """PN-V."""

    @staticmethod
    def forward(ctx, x, weight, bias, psi2, nu):
        square = (x * x).mean((0, 1))
        root = (psi2 + EPS).sqrt()
        z = x / root
        ctx.save_for_backward(z, root, weight, nu)
        psi2.copy_(KEEP * psi2 + (1 - KEEP) * square)
        return weight * z + bias

    @staticmethod
    def backward(ctx, grad):
        z, root, weight, nu = ctx.saved_tensors
        rest = grad * weight - nu * z
        nu.add_((1 - KEEP) * (rest * z).mean((0, 1)))
        return 1.0 / root * rest, (grad * z).sum((0, 1)), grad.sum((0, 1)), None, None


class _Running(nn.Module):
    """What both keep; statistics are buffers, in the dtype of the layer."""

    def __init__(self, d: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(d)), nn.Parameter(torch.zeros(d))
        self.register_buffer("var", torch.ones(d))
        self.register_buffer("mean", torch.zeros(d))


class UnifiedNorm(_Running):
    """Unified Normalization as its authors write it."""

    def __init__(self, d: int) -> None:
        super().__init__(d)
        self.register_buffer("window", torch.ones(WINDOW, d))
        self.register_buffer("grad_window", torch.zeros(WINDOW, d))
        self.steps = 0

    def forward(self, x: Tensor) -> Tensor:
        self.steps += 1
        windows = (self.window, self.grad_window, self.mean, self.steps % WINDOW)
        return _Unified.apply(x, self.weight, self.bias, self.var, *windows)


class PowerNorm(_Running):
    """PowerNorm as its authors write it: the layer scale of each group of channels, then PN-V."""

    def __init__(self, d: int, groups: int | None) -> None:
        super().__init__(d)
        self.groups = groups

    def forward(self, x: Tensor) -> Tensor:
        if self.groups is not None:
            grouped = x.unflatten(-1, (self.groups, -1))
            power = (grouped * grouped).mean(-1, keepdim=True)
            x = (grouped / torch.sqrt(power + EPS)).flatten(-2)
        return _Power.apply(x, self.weight, self.bias, self.var, self.mean)
