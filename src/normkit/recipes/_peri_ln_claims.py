"""What the paper of Peri-LN states, as checks (part of the recipe peri-ln)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache, partial

import torch
from torch import Tensor, nn

from normkit.nn import PLACEMENTS, LayerNorm, RMSNorm, Transformer, TransformerBlock
from normkit.nn.residual import FeedForward, Placement, Residual
from normkit.recipes._peri_ln_training import (
    MEASURED,
    Comparison,
    Trial,
    diverged,
    growth,
    leaps,
    loss,
    massive,
    train,
    unevenness,
)
from normkit.recipes.base import Claim, Finding, Verdict, within
from normkit.statistics import bootstrap_interval

WITHOUT_EPS = partial(LayerNorm, eps=0.0)
HOT = MEASURED.rates[-1]


def _tokens(seed: int, *size: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*size, generator=generator, dtype=torch.float64)


def _identity_norm() -> Finding:
    outputs = []
    for placement in PLACEMENTS:
        torch.manual_seed(0)
        block = TransformerBlock(8, 2, placement=placement, norm=nn.Identity).double()
        with torch.no_grad():
            outputs.append(block(_tokens(0, 2, 5, 8)))
    return within(max(float((out - outputs[0]).abs().max()) for out in outputs), 0.0)


def scaled_branch(placement: Placement, scale: float) -> tuple[Tensor, Tensor]:
    """What a feed-forward branch adds, and the gradient of its last map, that map scaled."""
    torch.manual_seed(0)
    branch = FeedForward(8, 16, bias=False)
    layer = Residual(branch, 8, placement, WITHOUT_EPS).double()
    with torch.no_grad():
        branch.down.weight.mul_(scale)
    x = _tokens(1, 2, 5, 8)
    added = layer(x) - x
    (gradient,) = torch.autograd.grad((added * _tokens(2, 2, 5, 8)).sum(), branch.down.weight)
    return added.detach(), gradient


def _scale(placement: Placement, power: int) -> Finding:
    """The branch goes as ``c^power``, its gradient as ``c^(power - 1)``."""
    added, gradient = scaled_branch(placement, 1.0)
    errors = []
    for c in (0.01, 100.0):
        other, other_gradient = scaled_branch(placement, c)
        errors.append(float((other / c**power - added).abs().max()))
        errors.append(float((other_gradient / c ** (power - 1) - gradient).abs().max()))
    return within(max(errors), 1e-10)


def gradient_share(massive: float, placement: Placement) -> float:
    """Gradient of a last map ``[D, M]`` as a share of its bound, one value of h being massive.

    With cotangent g, the gradient's norm is ``|g| |h|`` without an output norm, and at most
    ``max(gain) sqrt(D) |g| |h| / |a|`` with an RMSNorm.
    """
    dim, hidden = 16, 64
    h, g, gain = _tokens(3, hidden), _tokens(4, dim), _tokens(5, dim).abs()
    h[7] *= massive
    weight = _tokens(6, dim, hidden).requires_grad_()
    a = weight @ h
    bound = g.norm() * h.norm()
    if placement == "peri":
        norm = RMSNorm(dim, eps=0.0, dtype=torch.float64)
        with torch.no_grad():
            norm.weight.copy_(gain)  # type: ignore[union-attr]
        bound = bound * gain.max() * dim**0.5 / a.detach().norm()
        a = norm(a)
    (gradient,) = torch.autograd.grad(a @ g, weight)
    return float(gradient.norm() / bound)


def _gradient_bound() -> Finding:
    sizes = (1.0, 1e2, 1e4, 1e6)
    pre, peri = ([gradient_share(m, p) for m in sizes] for p in ("pre", "peri"))
    holds = max(peri) <= 1 + 1e-12 and max(abs(share - 1) for share in pre) <= 1e-12
    text = f"peri at most {max(peri):.3f} of its bound; pre {min(pre):.6f} of |g| |h|"
    return Finding("holds" if holds else "contradicted", text, {"pre": pre, "peri": peri})


def _linear_growth() -> Finding:
    layers, dim = 6, 64
    gaps = []
    x = _tokens(7, 4, 16, dim)
    for seed in range(32):
        torch.manual_seed(seed)
        stack = Transformer(
            dim, 4, layers, "peri", embedding_norm=False, final_norm=False, bias=False
        ).double()
        with torch.no_grad():
            out = stack(x)
        gaps.append(float((out.var(-1, correction=0) - x.var(-1, correction=0)).mean()))
    found = bootstrap_interval(gaps, level=0.999)
    verdict: Verdict = "holds" if found.low <= 2 * layers <= found.high else "contradicted"
    return Finding(verdict, f"Var(x_L) - Var(x_0) = {found} (99.9%)", {"draws": gaps})


def _parameters() -> Finding:
    dim = 32
    norms: dict[str, float] = {
        p: sum(
            q.numel()
            for layer in TransformerBlock(dim, 4, placement=p).modules()
            if isinstance(layer, LayerNorm)
            for q in layer.parameters()
        )
        / dim
        for p in PLACEMENTS
    }
    published = {"post": 4, "pre": 4, "sandwich": 8, "peri": 8, "output": 4}
    verdict: Verdict = "holds" if norms == published else "contradicted"
    return Finding(verdict, ", ".join(f"{p} {n:g} D" for p, n in norms.items()), norms)


@cache
def measured() -> Comparison:
    """The trainings of the measured claims."""
    return Comparison([train(MEASURED, *training) for training in MEASURED.trainings()])


@cache
def control() -> Comparison:
    """Pre with a norm on its embeddings too, beside the peri of :func:`measured`."""
    config = replace(MEASURED, placements=("pre",), embedding_norm=True)
    pre = [train(config, *training) for training in config.trainings()]
    return Comparison([*pre, *(t for t in measured().trials if t.placement == "peri")])


def _compare(
    trials: Callable[[], Comparison],
    value: Callable[[Trial], float],
    other: str,
    unit: str,
    rate: float | None,
) -> Finding:
    return trials().finding(value, other, unit, rate)


def _claim(
    name: str,
    statement: str,
    published: str,
    value: Callable[[Trial], float],
    other: str,
    unit: str,
    rate: float | None = None,
    trials: Callable[[], Comparison] = measured,
) -> Claim:
    check = partial(_compare, trials, value, other, unit, rate)
    return Claim(name, statement, published, "measured", check)


_BEST = "each at its own best rate"
_POWERS = "powers of ten"

CLAIMS: list[Claim] = [
    Claim(
        "identity-norm",
        "with the identity for a norm all placements are the same block",
        "identity",
        "exact",
        _identity_norm,
    ),
    Claim(
        "peri-scale",
        "a last map c times larger leaves a peri branch as it is and has a gradient c times "
        "smaller",
        "identity (from proposition 3.1)",
        "exact",
        partial(_scale, "peri", 0),
    ),
    Claim(
        "pre-scale",
        "a last map c times larger makes a pre branch c times larger and leaves its gradient",
        "identity (from proposition 3.1)",
        "exact",
        partial(_scale, "pre", 1),
    ),
    Claim(
        "gradient-bound",
        "the gradient of the last map is |h| |g| in pre, and at most gain sqrt(D) |g| |h| / |a| in "
        "peri, however massive h is",
        "proposition 3.1 (with a constant of 4)",
        "exact",
        _gradient_bound,
    ),
    Claim(
        "linear-growth",
        "at initialization a peri stack of L blocks adds 2 L to the stream's variance",
        "Var(x_l+1) = Var(x_l) + constant (section 3)",
        "exact",
        _linear_growth,
    ),
    Claim(
        "parameters",
        "norms of a block hold 4 D numbers in post and pre, 8 D in peri",
        "two norms more a block",
        "structural",
        _parameters,
    ),
    _claim(
        "variance-growth",
        f"training raises the last hidden variance less in peri than in pre, {_BEST}",
        "pre: exponential, peri: at most linear growth",
        growth,
        "pre",
        _POWERS,
    ),
    _claim(
        "variance-growth-hot",
        f"training raises the last hidden variance less in peri than in pre, both at {HOT:g}",
        "pre: exponential, peri: at most linear growth",
        growth,
        "pre",
        _POWERS,
        HOT,
    ),
    _claim(
        "massive-activations",
        f"the most massive activation, over the median, is smaller in peri than in pre, {_BEST}",
        "pre is prone to massive activations",
        massive,
        "pre",
        _POWERS,
    ),
    _claim(
        "even-gradients",
        f"gradient norms of the blocks differ less in peri than in pre, {_BEST}",
        "steadier gradients (figure 7)",
        unevenness,
        "pre",
        _POWERS,
    ),
    _claim(
        "vanishing-gradients",
        f"gradient norms of the blocks differ less in peri than in post, both at {HOT:g}",
        "post: gradients vanish",
        unevenness,
        "post",
        _POWERS,
        HOT,
    ),
    _claim(
        "spikes",
        f"peri has fewer steps with a leap of loss or gradient than pre, both at {HOT:g}",
        "peri: fewest spikes",
        leaps,
        "pre",
        "steps",
        HOT,
    ),
    _claim(
        "loss-under-pre",
        f"peri ends with a lower held-out loss than pre, {_BEST}",
        "3.34 against 3.43 on C4 at 400M parameters",
        loss,
        "pre",
        "nats a byte",
    ),
    _claim(
        "loss-under-pre-equal-ends",
        f"peri ends with a lower held-out loss than pre that normalizes embeddings too, {_BEST}",
        "expected (ours)",
        loss,
        "pre",
        "nats a byte",
        trials=control,
    ),
    _claim(
        "variance-growth-equal-ends",
        "training raises the last hidden variance less in peri than in pre that normalizes "
        f"embeddings too, both at {HOT:g}",
        "expected (ours)",
        growth,
        "pre",
        _POWERS,
        HOT,
        control,
    ),
    _claim(
        "loss-under-post",
        f"peri ends with a lower held-out loss than post, {_BEST}",
        "post is behind at every size",
        loss,
        "post",
        "nats a byte",
    ),
    _claim(
        "divergence-of-post",
        f"at {HOT:g} post ends no better than guessing by frequency more often than peri does",
        "post needs small learning rates",
        diverged,
        "post",
        "of trainings",
        HOT,
    ),
]
