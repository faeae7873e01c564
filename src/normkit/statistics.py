"""Intervals for measured claims."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from normkit.errors import InputError


@dataclass(frozen=True)
class Interval:
    """A mean with a confidence interval.

    Attributes:
        mean: the mean.
        low: lower end.
        high: upper end.
        n: number of values.
    """

    mean: float
    low: float
    high: float
    n: int

    def __str__(self) -> str:
        return f"{self.mean:+.3g} [{self.low:+.3g}, {self.high:+.3g}], n = {self.n}"


def bootstrap_interval(
    values: Sequence[float], level: float = 0.95, draws: int = 10_000, seed: int = 0
) -> Interval:
    """Percentile bootstrap interval of the mean; for pairs, pass their differences.

    Args:
        values: independent values, finite, at least one.
        level: coverage, in (0, 1).
        draws: bootstrap samples.
        seed: of the resampling.

    Raises:
        InputError: for no values, or values that are not finite.
    """
    x = np.asarray(values, dtype=np.float64)
    if x.ndim != 1 or not x.size or not np.isfinite(x).all():
        raise InputError("values must be a non-empty sequence of finite numbers")
    picks = np.random.default_rng(seed).integers(0, x.size, (draws, x.size))
    low, high = np.quantile(x[picks].mean(1), [(1 - level) / 2, (1 + level) / 2])
    return Interval(float(x.mean()), float(low), float(high), int(x.size))
