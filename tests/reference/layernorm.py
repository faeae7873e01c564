"""Layer normalization (arXiv 1607.06450) in NumPy float64, a row at a time."""

from __future__ import annotations

import numpy as np


def layer_norm(rows, weight=None, bias=None, eps=1e-5):
    """Equations 3 and 4 for each row of a matrix."""
    rows = np.asarray(rows, dtype=np.float64)
    out = np.empty_like(rows)
    for i, a in enumerate(rows):
        mean = sum(a) / len(a)
        variance = sum((value - mean) ** 2 for value in a) / len(a)
        out[i] = (a - mean) / np.sqrt(variance + eps)
    out = out if weight is None else out * weight
    return out if bias is None else out + bias


def layer_norm_gradients(rows, weight, grad, eps=1e-5):
    """Derivatives by rows, weight and bias, with the Jacobian of each row written out."""
    rows, grad = np.asarray(rows, dtype=np.float64), np.asarray(grad, dtype=np.float64)
    n = rows.shape[1]
    dx = np.empty_like(rows)
    for i, a in enumerate(rows):
        centered = a - a.mean()
        sigma = np.sqrt(np.mean(centered**2) + eps)
        center = np.eye(n) - np.ones((n, n)) / n
        jacobian = center / sigma - np.outer(centered, centered) / (n * sigma**3)
        dx[i] = jacobian @ (grad[i] * weight)
    return dx, (grad * layer_norm(rows, eps=eps)).sum(0), grad.sum(0)
