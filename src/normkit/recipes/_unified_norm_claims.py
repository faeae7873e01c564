"""What the paper of Unified Normalization states, as checks (part of the recipe unified_norm)."""

from __future__ import annotations

import torch
from torch.nn import functional as F

from normkit.nn import LayerNorm, UnifiedNorm
from normkit.recipes._lm_report import collapses, lower_loss, on_par, planned
from normkit.recipes._unified_norm_fused import (
    SMALL,
    TINY,
    images,
    inference,
    models,
    peak_bytes,
    seconds,
)
from normkit.recipes.base import Claim, Finding, verdict_of, within
from normkit.statistics import bootstrap_interval
from normkit.surgery.fold import folded_affine


def _trained(window_size: int = 4) -> UnifiedNorm:
    """A layer in float64 with statistics, gain and shift of its own."""
    torch.manual_seed(0)
    norm = UnifiedNorm(12, window_size=window_size, warmup=0, dtype=torch.float64)
    for _ in range(9):
        norm(3 * torch.randn(20, 12, dtype=torch.float64) + 1)
    for p in norm.parameters():
        torch.nn.init.normal_(p)
    return norm


def _fused() -> Finding:
    norm = _trained().eval()
    linear = torch.nn.Linear(12, 7, dtype=torch.float64)
    x = torch.randn(50, 12, dtype=torch.float64)
    fused = F.linear(x, *folded_affine(linear, *norm.inference_affine()))
    return within(float((fused - linear(norm(x))).detach().abs().max()), 1e-12)


def _window_of_one() -> Finding:
    """Output and derivatives beside autograd's of division by the batch's own root."""
    norm = _trained(window_size=1)
    x, grad = torch.randn(2, 20, 12, dtype=torch.float64)
    x.requires_grad_()
    simple = x / (x.square().mean(0) + norm.eps).sqrt() * norm.weight + norm.bias
    leaves = [x, *norm.parameters()]
    expected = (simple, *torch.autograd.grad(simple, leaves, grad))
    out = norm(x)
    found = (out, *torch.autograd.grad(out, leaves, grad))
    errors = [(a - b).detach().abs().max() for a, b in zip(found, expected, strict=True)]
    return within(float(max(errors)), 1e-12)


def _geometric() -> Finding:
    """Batches of one value each, whose mean squares are known."""
    values = [0.5, 2.0, 3.0, 7.0, 1.0, 4.0]
    norm = UnifiedNorm(1, eps=0.0, warmup=0, affine=False, dtype=torch.float64)
    outs = [float(norm(torch.full((4, 1), v, dtype=torch.float64))[0, 0]) for v in values]
    last = torch.tensor(values[-4:], dtype=torch.float64)
    return within(abs(outs[-1] - values[-1] / float(last.log().mean().exp())), 1e-12)


def _threshold() -> Finding:
    """Twenty thousand random windows: how far the gap of the means is outside its bounds."""
    generator = torch.Generator().manual_seed(0)
    worst = 0.0
    for size in (2, 4, 8):
        window = torch.randn(20_000, size, generator=generator, dtype=torch.float64).exp()
        gap = window.mean(1) - window.log().mean(1).exp()
        spread = window.sqrt().var(1, correction=0)
        outside = torch.maximum(spread - gap, gap - size * spread)
        worst = max(worst, float(outside.max()))
    return within(max(worst, 0.0), 1e-9)


def _state() -> Finding:
    channels, window = 384, 4
    norm, peer = UnifiedNorm(channels, window_size=window), LayerNorm(channels)
    parameters, peers = (sum(p.numel() for p in n.parameters()) for n in (norm, peer))
    kept = sum(b.numel() for b in norm.buffers())
    expected = (2 + 2 * window) * channels + 2
    same = parameters == peers and kept == expected
    return Finding(
        "holds" if same else "contradicted",
        f"{parameters} parameters (LayerNorm {peers}); {kept} kept numbers in training, "
        f"{expected} = (2 + 2M) C + 2 expected",
        {"parameters": parameters, "layer_norm": peers, "buffers": kept},
    )


def _memory() -> Finding:
    x = images(TINY)
    peaks = {name: peak_bytes(inference(model, x)) for name, model in models(TINY).items()}
    saved = 1 - peaks["fused"] / peaks["layer"]
    return Finding(
        "holds" if saved > 0 else "contradicted",
        f"{100 * saved:.1f}% less at the peak of a forward pass",
        peaks,
    )


def _latency() -> Finding:
    taken = seconds(SMALL, 20)
    gains = [1 - a / b for a, b in zip(taken["fused"], taken["layer"], strict=True)]
    gain = bootstrap_interval(gains)
    return Finding(verdict_of(gain), f"share of LayerNorm's time saved {gain}", {"gains": gains})


CLAIMS: list[Claim] = [
    Claim(
        "fused-equals-unfused",
        "in evaluation the layer goes into the next linear one without a difference",
        "identity",
        "exact",
        _fused,
    ),
    Claim(
        "window-of-one",
        "with a window of one the layer is division by the batch's own root, derived exactly",
        "identity",
        "exact",
        _window_of_one,
    ),
    Claim(
        "geometric-mean",
        "a full window's geometric mean is what a batch is divided by",
        "identity",
        "exact",
        _geometric,
    ),
    Claim(
        "outlier-threshold",
        "Var(sqrt) <= arithmetic - geometric mean <= M Var(sqrt) for any window of M",
        "identity",
        "exact",
        _threshold,
    ),
    Claim(
        "state",
        "as many parameters as LayerNorm; two windows, two running vectors, two counters besides",
        "2C parameters",
        "structural",
        _state,
    ),
    Claim(
        "fused-memory",
        "a transformer with the norms fused away needs less memory than with LayerNorm",
        "about 18% less (GPU)",
        "structural",
        _memory,
    ),
    Claim(
        "fused-latency",
        "a transformer of the size of DeiT-Small is faster with the norms fused away than with "
        "LayerNorm (8 images, CPU)",
        "about 31% faster (GPU)",
        "measured",
        _latency,
    ),
    Claim(
        "on-par-with-layer-norm",
        "a small language model ends within 0.02 nats of LayerNorm's held-out loss",
        "35.4 BLEU, LayerNorm 35.3 (IWSLT14)",
        "measured",
        lambda: on_par((*planned("unified"), *planned("layer")), "unified", "layer"),
    ),
    Claim(
        "better-than-batch-norm",
        "a small language model ends with a lower held-out loss than with BatchNorm",
        "35.4 BLEU, BatchNorm 31.1 (IWSLT14)",
        "measured",
        lambda: lower_loss((*planned("unified"), *planned("batch")), "unified", "batch"),
    ),
    Claim(
        "batch-norm-collapses",
        "a small language model collapses with BatchNorm",
        "inferior, even collapse in training",
        "measured",
        lambda: collapses((*planned("batch"), *planned("layer")), "batch", "layer"),
    ),
]
