"""Slow oracle of PowerNorm in NumPy, float64: algorithm 1 of arXiv 2003.07845, with the warm-up of
the authors' code in the two steps in which they write it.
"""

from __future__ import annotations

import numpy as np


def layer_scale(x, groups, eps=1e-5):
    """Divide each group of channels of each row ``[n, C]`` by its root mean square."""
    out = np.empty_like(x)
    size = x.shape[1] // groups
    for i, row in enumerate(x):
        for g in range(groups):
            part = row[g * size : (g + 1) * size]
            out[i, g * size : (g + 1) * size] = part / np.sqrt((part**2).mean() + eps)
    return out


class PowerNorm:
    """Training of PN-V on rows ``[n, C]``."""

    def __init__(self, channels, warmup=0, eps=1e-5, alpha=0.9):
        self.warmup, self.eps, self.alpha = warmup, eps, alpha
        self.weight, self.bias = np.ones(channels), np.zeros(channels)
        self.psi2, self.nu, self.t = np.ones(channels), np.zeros(channels), 0

    def forward(self, x):
        self.t += 1
        batch = (x**2).mean(0)
        used = batch if self.t <= self.warmup else self.psi2
        z = x / np.sqrt(used + self.eps)
        self.saved = z, used
        if self.t < self.warmup:
            self.psi2 = self.psi2 * (self.t - 1) / self.t + batch / self.t
        self.psi2 = self.alpha * self.psi2 + (1 - self.alpha) * batch
        return z * self.weight + self.bias

    def backward(self, grad):
        """Derivatives by input, weight and bias."""
        z, used = self.saved
        g = grad * self.weight
        dx = (g - self.nu * z) / np.sqrt(used + self.eps)
        gamma, lam = (z * z).mean(0), (g * z).mean(0)
        self.nu = self.nu * (1 - (1 - self.alpha) * gamma) + (1 - self.alpha) * lam
        return dx, (grad * z).sum(0), grad.sum(0)

    def evaluate(self, x):
        return x / np.sqrt(self.psi2 + self.eps) * self.weight + self.bias
