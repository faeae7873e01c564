"""The layers whose contract is checked, one line each; a new layer joins by its line."""

from __future__ import annotations

from functools import partial

import torch

from normkit import nn
from normkit.testing import LayerCase


def tokens(*size: int):
    """Make inputs ``[B, *size]``."""
    return lambda n: torch.randn(n, *size)


def pair(*size: int):
    """Make two inputs ``[B, *size]``: x and a residual."""
    return lambda n: (torch.randn(n, *size), torch.randn(n, *size))


UNROLLED = "a loop of steps is slow to generate code for; that of the cell is checked"

CASES = [
    LayerCase("LayerNorm", partial(nn.LayerNorm, 6), tokens(4, 6)),
    LayerCase("LayerNorm-residual", partial(nn.LayerNorm, 6), pair(4, 6)),
    LayerCase("LayerNorm-no-bias", partial(nn.LayerNorm, 6, bias=False), tokens(6)),
    LayerCase("LayerNorm-zero-centered", partial(nn.LayerNorm, 6, zero_centered=True), tokens(6)),
    LayerCase("RMSNorm", partial(nn.RMSNorm, 6), tokens(4, 6)),
    LayerCase("RMSNorm-residual", partial(nn.RMSNorm, 6, eps=1e-5), pair(4, 6)),
    LayerCase("RMSNorm-2d-bias", partial(nn.RMSNorm, (2, 3), bias=True), tokens(2, 3)),
    LayerCase("RMSNorm-no-affine", partial(nn.RMSNorm, 6, elementwise_affine=False), tokens(6)),
    LayerCase("RMSNorm-zero-centered", partial(nn.RMSNorm, 6, zero_centered=True), tokens(6)),
    LayerCase("CRMSNorm", partial(nn.CRMSNorm, 5), tokens(4, 5)),
    LayerCase("LNLSTMCell", partial(nn.LNLSTMCell, 3, 4), tokens(3)),
    LayerCase("LNGRUCell", partial(nn.LNGRUCell, 3, 4), tokens(3)),
    LayerCase(
        "LNLSTM",
        partial(nn.LNLSTM, 3, 4, batch_first=True),
        tokens(3, 3),
        skip={"inductor": UNROLLED},
    ),
    LayerCase(
        "LNGRU",
        partial(nn.LNGRU, 3, 4, batch_first=True),
        tokens(3, 3),
        skip={"inductor": UNROLLED},
    ),
    LayerCase(
        "LNLSTM-two-ways-per-gate",
        partial(nn.LNLSTM, 3, 2, batch_first=True, bidirectional=True, per_gate=True),
        tokens(2, 3),
        skip={"inductor": UNROLLED, "second_gradients": "slow, and the same as of LNLSTM"},
    ),
    LayerCase(
        "LNGRU-two-ways-no-bias",
        partial(nn.LNGRU, 3, 2, bias=False, batch_first=True, bidirectional=True),
        tokens(2, 3),
        skip={"inductor": UNROLLED, "second_gradients": "slow, and the same as of LNGRU"},
    ),
    LayerCase(
        "UnifiedNorm",
        partial(nn.UnifiedNorm, 6, warmup=0),
        tokens(4, 6),
        mask=lambda n: torch.arange(4) < 1 + torch.arange(n)[:, None],
        skip={
            "gradients": "the published derivative is a recurrence: tests/nn/test_unified_norm.py",
            "second_gradients": "there are none",
        },
    ),
    LayerCase(
        "UnifiedNorm-window-1",
        partial(nn.UnifiedNorm, 6, window_size=1),
        tokens(4, 6),
        skip={"second_gradients": "there are none"},
    ),
    LayerCase(
        "UnifiedNorm-images-no-affine",
        partial(nn.UnifiedNorm, 4, affine=False, channel_dim=1, filter_outliers=True),
        tokens(4, 2, 3),
        features=1,
        channels_last=True,
        skip={
            "gradients": "the published derivative is a recurrence: tests/nn/test_unified_norm.py",
            "second_gradients": "there are none",
        },
    ),
    LayerCase(
        "PowerNorm",
        partial(nn.PowerNorm, 6, warmup=2, groups=2),
        tokens(4, 6),
        mask=lambda n: torch.arange(4) < 1 + torch.arange(n)[:, None],
        skip={
            "gradients": "the published derivative is a recurrence: tests/nn/test_power_norm.py",
            "second_gradients": "there are none",
        },
    ),
    LayerCase(
        "PowerNorm-images-no-scale",
        partial(nn.PowerNorm, 4, warmup=0, groups=None, channel_dim=1),
        tokens(4, 2, 3),
        features=1,
        channels_last=True,
        skip={
            "gradients": "the published derivative is a recurrence: tests/nn/test_power_norm.py",
            "second_gradients": "there are none",
        },
    ),
    LayerCase(
        "TransformerBlock",
        partial(nn.TransformerBlock, 4, 2, 6, causal=True),
        tokens(4, 4),
        skip={"second_gradients": "torch's fused attention has none"},
    ),
    LayerCase(
        "TransformerBlock-post-mask",
        partial(nn.TransformerBlock, 4, 2, 6, "post", bias=False),
        tokens(4, 4),
        mask=lambda n: torch.arange(4) < 1 + torch.arange(n)[:, None],
        skip={
            "inductor": "slow, and the same as of TransformerBlock",
            "second_gradients": "torch's fused attention has none",
        },
    ),
]
