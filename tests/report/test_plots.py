"""What bands and bars show of the seeds that they stand for."""

from __future__ import annotations

import numpy as np
import pytest

from normkit.report.plots import (
    before_after,
    error_bars,
    figure,
    interval_band,
    range_band,
    side_legend,
    training_curves,
)
from normkit.statistics import Interval, bootstrap_interval

pytest.importorskip("matplotlib")


def drawn(ax):
    """The line's values, and the lower and upper edge of the band."""
    (line,), (band,) = ax.lines, ax.collections
    corners = band.get_paths()[0].vertices
    edges = [corners[corners[:, 0] == x][:, 1] for x in line.get_xdata()]
    return list(line.get_ydata()), [e.min() for e in edges], [e.max() for e in edges]


def test_a_band_is_the_interval_of_the_mean(tmp_path):
    curve = np.random.default_rng(0).normal(size=(3, 8)).tolist()
    with figure(tmp_path / "plots" / "a.png") as (ax,):
        interval_band(ax, (10, 20, 30), curve, "tab:blue", "curve")
        side_legend(ax, "title")
        found = drawn(ax)
        assert ax.get_legend().get_texts()[0].get_text() == "curve"
    ends = [bootstrap_interval(seeds, draws=500) for seeds in curve]
    expected = [[getattr(e, name) for e in ends] for name in ("mean", "low", "high")]
    np.testing.assert_allclose(found, expected)
    assert (tmp_path / "plots" / "a.png").read_bytes().startswith(b"\x89PNG")


def test_a_band_of_a_few_seeds_is_their_range(tmp_path):
    with figure(tmp_path / "a.png") as (ax,):
        range_band(ax, (1, 2), [[0.0, 5.0], [2.0, 4.0], [4.0, 0.0]], "tab:blue", "curve")
        assert drawn(ax) == ([2.0, 3.0], [0.0, 0.0], [4.0, 5.0])


def test_bars_reach_from_the_mean_to_the_ends():
    bars = error_bars([Interval(1.0, 0.5, 1.25, 3), Interval(0.0, -1.0, 2.0, 3)])
    assert bars == [[0.5, 1.0], [0.25, 2.0]]


def test_a_run_without_a_step_has_curves_too(tmp_path):
    training_curves([], tmp_path / "training.png")
    before_after([1.0, 2.0], [2.0, 1.0], tmp_path / "after.png", "points")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["after.png", "training.png"]


def test_a_figure_that_fails_is_not_written(tmp_path):
    with pytest.raises(ValueError, match="no data"), figure(tmp_path / "a.png"):
        raise ValueError("no data")
    assert list(tmp_path.iterdir()) == []
