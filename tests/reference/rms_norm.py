"""Root-mean-square norms (arXiv 1910.07467, 2305.14858) in NumPy float64, a row at a time."""

from __future__ import annotations

import numpy as np


def rms_norm(rows, weight=None, bias=None, eps=1e-5):
    """Each row over the root of its mean square."""
    rows = np.asarray(rows, dtype=np.float64)
    out = np.stack([a / np.sqrt(sum(a**2) / len(a) + eps) for a in rows])
    out = out if weight is None else out * weight
    return out if bias is None else out + bias


def rms_norm_gradients(rows, weight, grad, eps=1e-5):
    """Derivatives by rows, weight and bias, with the Jacobian of each row written out."""
    rows, grad = np.asarray(rows, dtype=np.float64), np.asarray(grad, dtype=np.float64)
    n = rows.shape[1]
    dx = np.empty_like(rows)
    for i, a in enumerate(rows):
        r = np.sqrt(np.mean(a**2) + eps)
        dx[i] = (np.eye(n) / r - np.outer(a, a) / (n * r**3)) @ (grad[i] * weight)
    return dx, (grad * rms_norm(rows, eps=eps)).sum(0), grad.sum(0)


def crms_norm(rows, eps=1e-5):
    """RMSNorm of the completed vectors, without the last coordinate."""
    rows = np.asarray(rows, dtype=np.float64)
    whole = np.concatenate([rows, -rows.sum(1, keepdims=True)], axis=1)
    return rms_norm(whole, eps=eps)[:, :-1]
