"""What the paper of PowerNorm states, as checks (part of the recipe powernorm)."""

from __future__ import annotations

import torch
from torch import Tensor

from normkit.nn import LayerNorm, PowerNorm
from normkit.recipes._lm_report import calmer, lower_loss, planned
from normkit.recipes.base import Claim, Finding, within

CHANNELS, STEPS = 6, 200


def _layer() -> PowerNorm:
    """PN-V without affine parameters, eps and warm-up: the paper's recurrences alone."""
    return PowerNorm(CHANNELS, eps=0.0, affine=False, warmup=0, groups=None, dtype=torch.float64)


def _steps(norm: PowerNorm) -> list[tuple[Tensor, Tensor, Tensor, Tensor]]:
    """Train on random batches; return input, output, and derivatives by output and input."""
    generator = torch.Generator().manual_seed(0)
    seen = []
    for _ in range(STEPS):
        x, grad = torch.randn(2, 16, CHANNELS, generator=generator, dtype=torch.float64)
        x = (x * torch.linspace(0.3, 1.4, CHANNELS, dtype=torch.float64)).requires_grad_()
        z = norm(x)
        z.backward(grad)
        assert x.grad is not None
        seen.append((x.detach(), z.detach(), grad, x.grad))
    return seen


def _forward() -> Finding:
    """The running mean square beside its closed form, a sum with falling weights."""
    norm = _layer()
    squares = torch.stack([x.square().mean(0) for x, *_ in _steps(norm)])
    keep = 1 - norm.momentum
    ages = torch.arange(STEPS - 1, -1, -1, dtype=torch.float64)
    closed = keep**STEPS + norm.momentum * (keep**ages) @ squares
    return within(float((norm.running_var - closed).abs().max()), 1e-12)


def _backward() -> Finding:
    """``nu`` and the derivatives beside the solution of the recurrence, by products."""
    norm = _layer()
    seen = _steps(norm)
    nu = torch.zeros(CHANNELS, dtype=torch.float64)
    worst = 0.0
    for x, z, grad, dx in seen:
        psi = (x / z).mean(0)
        worst = max(worst, float((dx - (grad - nu * z) / psi).abs().max()))
        nu = nu + norm.momentum * ((grad - nu * z) * z).mean(0)
    return within(max(worst, float((norm.running_grad - nu).abs().max())), 1e-11)


def _bounded() -> Finding:
    """``|nu|`` beside the largest ``|mean(g z)| / mean(z^2)``, which bounds it.

    A step mixes nu and that quotient with weights ``1 - a mean(z^2)`` and ``a mean(z^2)``.
    """
    norm = _layer()
    seen = _steps(norm)
    powers = torch.stack([z.square().mean(0) for _, z, *_ in seen])
    products = torch.stack([(grad * z).mean(0) for _, z, grad, _ in seen])
    assumed = float(norm.momentum * powers.max())
    share = float((norm.running_grad.abs() / (products / powers).abs().amax(0)).max())
    return Finding(
        "holds" if assumed <= 1 and share <= 1 else "contradicted",
        f"|nu| {share:.3f} of its bound after {STEPS} steps; (1 - alpha) mean(z^2) at most "
        f"{assumed:.2f}, assumed at most 1",
        {"share": share, "assumed": assumed},
    )


def _layer_scale() -> Finding:
    """With the layer scale the output does not depend on the size of a token."""
    torch.manual_seed(0)
    norm = PowerNorm(CHANNELS, eps=0.0, groups=2, dtype=torch.float64).eval()
    x = torch.randn(9, CHANNELS, dtype=torch.float64)
    sizes = torch.rand(9, 1, dtype=torch.float64) + 0.1
    return within(float((norm(x * sizes) - norm(x)).detach().abs().max()), 1e-12)


def _state() -> Finding:
    norm, peer = PowerNorm(512), LayerNorm(512)
    parameters, peers = (sum(p.numel() for p in n.parameters()) for n in (norm, peer))
    kept = sum(b.numel() for b in norm.buffers())
    same = parameters == peers and kept == 2 * 512 + 1
    return Finding(
        "holds" if same else "contradicted",
        f"{parameters} parameters (LayerNorm {peers}); {kept} kept numbers in training",
        {"parameters": parameters, "layer_norm": peers, "buffers": kept},
    )


CLAIMS: list[Claim] = [
    Claim(
        "forward-recurrence",
        "the running mean square is the exponentially weighted sum of the batches'",
        "identity",
        "exact",
        _forward,
    ),
    Claim(
        "backward-recurrence",
        "derivatives and nu follow the approximate backpropagation",
        "identity",
        "exact",
        _backward,
    ),
    Claim(
        "bounded-gradient",
        "nu is bounded by the largest |mean(g z)| / mean(z^2), and the derivative with it",
        "bounded by a constant",
        "exact",
        _bounded,
    ),
    Claim(
        "layer-scale",
        "the layer scale makes the output independent of the size of a token",
        "identity",
        "exact",
        _layer_scale,
    ),
    Claim(
        "state",
        "as many parameters as LayerNorm; a mean square, nu and a counter besides",
        "2C parameters",
        "structural",
        _state,
    ),
    Claim(
        "calmer-statistics",
        "the quadratic mean of a batch is nearer to its running value than BatchNorm's variance is",
        "orders of magnitude smaller variations",
        "measured",
        lambda: calmer((*planned("power"), *planned("batch")), "power", "batch"),
    ),
    Claim(
        "better-than-layer-norm",
        "a small language model ends with a lower held-out loss than with LayerNorm",
        "perplexity 5.6 (PTB) and 3.0 (WikiText-103) lower",
        "measured",
        lambda: lower_loss((*planned("power"), *planned("layer")), "power", "layer"),
    ),
    Claim(
        "better-than-batch-norm",
        "a small language model ends with a lower held-out loss than with BatchNorm",
        "BatchNorm far behind",
        "measured",
        lambda: lower_loss((*planned("power"), *planned("batch")), "power", "batch"),
    ),
]
