"""Slow oracle of Unified Normalization in NumPy, float64: one channel and one batch at a time.

arXiv 2208.01313 and the authors' UN1d, whose branches are kept as branches here.
"""

from __future__ import annotations

import numpy as np


class UnifiedNorm:
    """Training of one layer on rows ``[n, C]``."""

    def __init__(self, channels, window=4, warmup=0, filter_outliers=False, eps=1e-5, keep=0.9):
        self.m, self.warmup, self.filter, self.eps, self.keep = (
            window,
            warmup,
            filter_outliers,
            eps,
            keep,
        )
        self.weight, self.bias = np.ones(channels), np.zeros(channels)
        self.running_var, self.running_grad = np.ones(channels), np.zeros(channels)
        self.window = np.zeros((window, channels))
        self.grad_window = np.zeros((window, channels))
        self.t = self.filtered = 0

    def forward(self, x):
        self.t += 1
        channels = x.shape[1]
        square = np.array([sum(v * v for v in x[:, c]) / len(x) for c in range(channels)])
        roots = np.sqrt(self.window).ravel()
        spread = roots.var(ddof=1) if roots.size > 1 else 0.0
        slot = self.t % self.m
        self.window[slot] = square
        self.alone = self.m == 1
        self.settled = self.t > self.m and self.t >= self.warmup
        if self.settled and self.filter:
            for c in range(channels):
                column = self.window[:, c]
                if column.mean() - column.prod() ** (1 / self.m) > spread * self.m:
                    self.alone = True
            if self.alone:
                self.window[slot] = self.running_var
                self.filtered += 1
        var = square
        if self.settled and not self.alone:
            var = self.window.prod(0) ** (1 / self.m)
        ratio = np.ones(channels)
        if self.t > max(1000, self.warmup) and not self.alone:
            ratio = np.clip(np.sqrt((var + self.eps) / (self.running_var + self.eps)), 0.2, 5)
        self.running_var = self.keep * self.running_var + (1 - self.keep) * var
        z = x / np.sqrt(var + self.eps)
        self.saved = z, var, ratio, slot
        return z * self.weight + self.bias

    def backward(self, grad):
        """Derivatives by input, weight and bias."""
        z, var, ratio, slot = self.saved
        g = grad * self.weight * ratio
        product = (g * z).mean(0)
        self.grad_window[slot] = self.running_grad if self.alone else product
        mean = product
        if self.settled and not self.alone:
            mean = self.grad_window.mean(0)
        self.running_grad = self.keep * self.running_grad + (1 - self.keep) * mean
        c = mean if self.alone else self.running_grad
        dx = (g - c * z) / np.sqrt(var + self.eps)
        return dx, (grad * ratio * z).sum(0), grad.sum(0)

    def evaluate(self, x):
        return x / np.sqrt(self.running_var + self.eps) * self.weight + self.bias
