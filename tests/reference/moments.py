"""Statistics of groups in NumPy float64, one group at a time."""

from __future__ import annotations

import numpy as np


def group_moments(values, kind="std", ddof=0):
    """Center and scale of one list of numbers."""
    values = np.asarray(values, dtype=np.float64)
    n = len(values)
    if n == 0:
        return 0.0, 0.0
    if kind == "rms":
        return 0.0, float(np.sqrt(np.mean(values**2)))
    if kind == "quadratic":
        return 0.0, float(np.mean(values**2))
    mean = float(np.mean(values))
    if kind == "l1":
        return mean, float(np.mean(np.abs(values - mean)))
    if n <= ddof:
        return mean, 0.0
    return mean, float(np.sqrt(np.sum((values - mean) ** 2) / (n - ddof)))
