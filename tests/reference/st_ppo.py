"""ST-PPO (arXiv 2511.20718) in NumPy float64 with loops, over flat tokens.

``log_ratio``, ``advantage`` and ``weight`` have one number per token, ``unit`` says which tokens
share a ratio. Gradients are with respect to the tokens' log-probabilities, of what is maximized.
"""

from __future__ import annotations

import numpy as np


def ratios(log_ratio, unit):
    """Geometric mean of the tokens' ratios over their unit."""
    out = []
    for own in unit:
        mates = [x for x, u in zip(log_ratio, unit, strict=True) if u == own]
        out.append(np.exp(sum(mates) / len(mates)))
    return np.array(out)


def is_clipped(ratio, advantage, low, high, dual):
    """Whether the token's term of the surrogate has no gradient."""
    if advantage > 0:
        return bool(ratio > 1 + high)
    if advantage < 0:
        return bool(ratio < 1 - low or (dual and ratio > dual))
    return False


def gradient(log_ratio, advantage, unit, weight, counts):
    """Of ``sum_t weight_t w_t A_t`` over the tokens that count: spread evenly over the unit."""
    ratio = ratios(log_ratio, unit)
    out = np.zeros(len(unit))
    for t, own in enumerate(unit):
        mates = [s for s, u in enumerate(unit) if u == own]
        for s in mates:
            out[s] += counts[t] * weight[t] * ratio[t] * advantage[t] / len(mates)
    return out


def clipping_bias(log_ratio, advantage, unit, weight, low, high, dual):
    """C: the part of the unclipped gradient that clipping removes."""
    ratio = ratios(log_ratio, unit)
    counts = [is_clipped(w, a, low, high, dual) for w, a in zip(ratio, advantage, strict=True)]
    return gradient(log_ratio, advantage, unit, weight, counts)


def corrected(gradient, bias, mode, c0=1.0, delta=1e-6):
    """The gradient after the correction."""
    gradient, size = np.asarray(gradient), np.linalg.norm(bias)
    if mode == "floor":
        return gradient / max(1.0, size / c0)
    if mode == "ratio":
        kept = np.linalg.norm(gradient)
        return gradient * (kept / (kept + size) if size else 1.0)
    return gradient / (size + delta) if mode == "paper" else gradient


def value_loss(value, old, target, weight, clip):
    """Half the larger of the squared errors of a value and of its clipped twin, weighted."""
    total = 0.0
    for v, o, r, w in zip(value, old, target, weight, strict=True):
        near = o + min(max(v - o, -clip), clip) if clip else v
        total += w * max((v - r) ** 2, (near - r) ** 2) / 2
    return total
