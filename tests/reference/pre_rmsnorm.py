"""Pre-LN, Pre-RMSNorm and Pre-CRMSNorm transformers side by side, in NumPy and float64.

Slow and obvious: one sequence, single-head attention with a causal mask, a two-layer perceptron,
every weight a matrix of (in, out). The three forwards differ in the stream they carry.
"""

from __future__ import annotations

import numpy as np


def layer_norm(x, gain, shift, eps):
    """LayerNorm of each row."""
    out = np.empty_like(x)
    for i, row in enumerate(x):
        mean = sum(row) / len(row)
        variance = sum((v - mean) ** 2 for v in row) / len(row)
        out[i] = (row - mean) / np.sqrt(variance + eps) * gain + shift
    return out


def rms_norm(x, gain, shift, eps):
    """RMSNorm of each row."""
    out = np.empty_like(x)
    for i, row in enumerate(x):
        out[i] = row / np.sqrt(sum(v * v for v in row) / len(row) + eps) * gain + shift
    return out


def crms_norm(z, eps):
    """CRMSNorm of each row: d - 1 coordinates of a vector that sums to zero."""
    out = np.empty_like(z)
    for i, row in enumerate(z):
        square = sum(v * v for v in row) + sum(row) ** 2
        out[i] = row / np.sqrt(square / (len(row) + 1) + eps)
    return out


def random_block(rng, d, hidden):
    """Weights of one block; every bias, gain and shift is drawn too."""
    sizes = {"q": (d, d), "k": (d, d), "v": (d, d), "o": (d, d), "up": (d, hidden)}
    block = {name: rng.normal(size=size) / np.sqrt(d) for name, size in sizes.items()}
    block["down"] = rng.normal(size=(hidden, d)) / np.sqrt(hidden)
    for name in ("q", "k", "v", "o", "up", "down"):
        block[name + "_bias"] = rng.normal(size=block[name].shape[1])
    for name in ("gain1", "gain2"):
        block[name] = 1 + 0.3 * rng.normal(size=d)
    for name in ("shift1", "shift2"):
        block[name] = 0.3 * rng.normal(size=d)
    return block


def forward(embeddings, blocks, norm, eps=1e-5):
    """The residual stream after the blocks: ``norm(x, gain, shift, eps)`` before each sublayer."""
    x = embeddings.copy()
    for b in blocks:
        x = x + _attend(norm(x, b["gain1"], b["shift1"], eps), b)
        h = norm(x, b["gain2"], b["shift2"], eps)
        x = x + np.tanh(h @ b["up"] + b["up_bias"]) @ b["down"] + b["down_bias"]
    return x


def recenter(embeddings, blocks):
    """Multiply all that writes to the stream by ``C = I - 11^T / d``."""
    d = embeddings.shape[1]
    c = np.eye(d) - np.ones((d, d)) / d
    new = []
    for b in blocks:
        done = dict(b)
        for name in ("o", "down"):
            done[name] = b[name] @ c
            done[name + "_bias"] = b[name + "_bias"] @ c
        new.append(done)
    return embeddings @ c, new


def compress(embeddings, blocks):
    """Leave out the last coordinate of a recentered network, and fold gains and shifts."""
    new = []
    for b in blocks:
        done = dict(b)
        for name in ("o", "down"):
            done[name], done[name + "_bias"] = b[name][:, :-1], b[name + "_bias"][:-1]
        for names, which in ((("q", "k", "v"), "1"), (("up",), "2")):
            for name in names:
                weight = np.diag(b["gain" + which]) @ b[name]
                done[name + "_bias"] = b[name + "_bias"] + b["shift" + which] @ b[name]
                done[name] = weight[:-1] - weight[-1:]
        new.append(done)
    return embeddings[:, :-1], new


def _attend(h, b):
    q, k, v = (h @ b[n] + b[n + "_bias"] for n in ("q", "k", "v"))
    out = np.empty_like(v)
    for i in range(len(h)):
        scores = np.array([q[i] @ k[j] for j in range(i + 1)]) / np.sqrt(q.shape[1])
        weights = np.exp(scores - scores.max())
        out[i] = (weights / weights.sum()) @ v[: i + 1]
    return out @ b["o"] + b["o_bias"]
