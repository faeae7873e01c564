"""Transformer blocks by placement (arXiv 2502.02732) in NumPy float64, token by token."""

from __future__ import annotations

import math

import numpy as np


def layer_norm(a, gain=None, shift=None, eps=1e-5):
    """One token's vector, centered and scaled."""
    centered = a - np.mean(a)
    out = centered / np.sqrt(np.mean(centered**2) + eps)
    out = out if gain is None else out * gain
    return out if shift is None else out + shift


def gelu(a):
    """``a Phi(a)`` of each number."""
    return np.array([v * 0.5 * (1 + math.erf(v / math.sqrt(2))) for v in a])


def attention(x, p, heads, causal, mask=None):
    """Attention over tokens ``[N, D]``; a hidden one is seen by itself alone."""
    n, dim = x.shape
    size = dim // heads
    rows = [p["qkv.weight"] @ token + p["qkv.bias"] for token in x]
    out = np.zeros((n, dim))
    for h in range(heads):
        part = slice(h * size, (h + 1) * size)
        for i in range(n):
            seen = [
                j
                for j in range(n)
                if (j <= i or not causal) and (mask is None or mask[j] or j == i)
            ]
            query = rows[i][:dim][part]
            scores = [query @ rows[j][dim : 2 * dim][part] / math.sqrt(size) for j in seen]
            weights = np.exp(np.array(scores) - max(scores))
            weights /= weights.sum()
            for weight, j in zip(weights, seen, strict=True):
                out[i, part] += weight * rows[j][2 * dim :][part]
    return np.stack([p["out.weight"] @ token + p["out.bias"] for token in out])


def feed_forward(x, p):
    """Two linear maps with GELU between them."""
    return np.stack(
        [
            p["down.weight"] @ gelu(p["up.weight"] @ token + p["up.bias"]) + p["down.bias"]
            for token in x
        ]
    )


def branch(x, sublayer, placement, norms, eps=1e-5):
    """One sublayer beside the stream ``[N, D]``; ``norms`` holds (gain, shift) by place."""

    def norm(rows, place):
        return np.stack([layer_norm(row, *norms[place], eps=eps) for row in rows])

    if placement == "post":
        return norm(x + sublayer(x), "norm_sum")
    if placement == "pre":
        return x + sublayer(norm(x, "norm_in"))
    if placement == "output":
        return x + norm(sublayer(x), "norm_out")
    if placement in ("peri", "sandwich"):
        return x + norm(sublayer(norm(x, "norm_in")), "norm_out")
    raise ValueError(placement)


def block(x, state, placement, heads, causal, mask=None, eps=1e-5):
    """A block on one sequence ``[N, D]``, with the names of a state dict for its parameters."""

    def part(prefix):
        return {k[len(prefix) :]: v for k, v in state.items() if k.startswith(prefix)}

    if mask is not None:
        x = np.where(mask[:, None], x, 0.0)
    for name in ("attention", "feed_forward"):
        p = part(f"{name}.")
        norms = {
            place: (p[f"{place}.weight"], p[f"{place}.bias"])
            for place in ("norm_in", "norm_out", "norm_sum")
            if f"{place}.weight" in p
        }
        inner = part(f"{name}.sublayer.")
        if name == "attention":
            x = branch(
                x, lambda t, q=inner: attention(t, q, heads, causal, mask), placement, norms, eps
            )
        else:
            x = branch(x, lambda t, q=inner: feed_forward(t, q), placement, norms, eps)
    return x
