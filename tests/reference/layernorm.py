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


def sigmoid(a):
    """Logistic function."""
    return 1 / (1 + np.exp(-a))


def _gates(rows, weight, gain, bias, stacks, hidden, eps):
    """Product, then layer normalization of each stack of gates."""
    a = rows @ weight.T
    out, start = np.empty_like(a), 0
    for stack in stacks:
        part = slice(start, start + stack * hidden)
        out[:, part] = layer_norm(a[:, part], gain[part], bias[part], eps)
        start += stack * hidden
    return out


def ln_lstm(sequence, h, c, p, stacks=(4,), eps=1e-5):
    """Equations 20 to 22 over ``[T, B, I]``; gates stacked as input, forget, cell, output."""
    hidden, outputs = h.shape[1], []
    for x in sequence:
        a = _gates(x, p["weight_ih"], p["gain_ih"], p["bias_ih"], stacks, hidden, eps)
        a = a + _gates(h, p["weight_hh"], p["gain_hh"], p["bias_hh"], stacks, hidden, eps)
        i, f, g, o = (a[:, k * hidden : (k + 1) * hidden] for k in range(4))
        c = sigmoid(f) * c + sigmoid(i) * np.tanh(g)
        h = sigmoid(o) * np.tanh(layer_norm(c, p["gain_c"], p["bias_c"], eps))
        outputs.append(h)
    return np.stack(outputs), h, c


def ln_gru(sequence, h, p, stacks=(2, 1), eps=1e-5):
    """Equations 26 to 29 over ``[T, B, I]``; gates stacked as reset, update, candidate."""
    hidden, outputs = h.shape[1], []
    for x in sequence:
        a = _gates(x, p["weight_ih"], p["gain_ih"], p["bias_ih"], stacks, hidden, eps)
        b = _gates(h, p["weight_hh"], p["gain_hh"], p["bias_hh"], stacks, hidden, eps)
        r = sigmoid(a[:, :hidden] + b[:, :hidden])
        z = sigmoid(a[:, hidden : 2 * hidden] + b[:, hidden : 2 * hidden])
        n = np.tanh(a[:, 2 * hidden :] + r * b[:, 2 * hidden :])
        h = (1 - z) * n + z * h
        outputs.append(h)
    return np.stack(outputs), h
