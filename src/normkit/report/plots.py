"""Plots of a run, as PNG files in its ``plots`` folder."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from normkit.errors import MissingDependencyError
from normkit.files import atomic_path
from normkit.statistics import Interval, bootstrap_interval


@contextmanager
def figure(path: str | Path, columns: int = 1, width: float = 6.0) -> Iterator[Sequence[Any]]:
    """Yield ``columns`` axes side by side; the figure is written to ``path`` at the block's end.

    Raises:
        MissingDependencyError: without matplotlib.
    """
    try:
        import matplotlib as mpl
    except ImportError:
        raise MissingDependencyError("matplotlib", "report") from None
    mpl.use("Agg")
    from matplotlib import pyplot

    fig, axes = pyplot.subplots(1, columns, figsize=(width * columns, 3.8), squeeze=False)
    try:
        for ax in axes[0]:
            ax.grid(alpha=0.25)
            ax.spines[["top", "right"]].set_visible(False)
        yield list(axes[0])
        with atomic_path(path) as temporary:
            fig.savefig(temporary, format="png", dpi=110, bbox_inches="tight")
    finally:
        pyplot.close(fig)


def interval_band(
    ax: Any, x: Sequence[float], curve: Sequence[Sequence[float]], color: str, label: str
) -> None:
    """Draw the mean over seeds of a curve, with its 95% interval.

    Args:
        ax: the axes.
        x: places of the points.
        curve: values by point and seed.
        color: of line and band.
        label: for the legend.
    """
    ends = [bootstrap_interval(seeds, draws=500) for seeds in curve]
    ax.plot(x, [e.mean for e in ends], color=color, label=label)
    low, high = [e.low for e in ends], [e.high for e in ends]
    ax.fill_between(x, low, high, color=color, alpha=0.2, lw=0)


def range_band(
    ax: Any, x: Sequence[float], curves: Sequence[Sequence[float]], color: str, label: str
) -> None:
    """Draw the mean over a few seeds of a curve, over the range of the seeds.

    Args:
        ax: the axes.
        x: places of the points.
        curves: values by seed and point.
        color: of line and band.
        label: for the legend.
    """
    points = list(zip(*curves, strict=True))
    ax.plot(x, [sum(seeds) / len(seeds) for seeds in points], color=color, label=label)
    ax.fill_between(x, list(map(min, points)), list(map(max, points)), color=color, alpha=0.2)


def error_bars(intervals: Sequence[Interval]) -> list[list[float]]:
    """Lengths of the error bars of means, downwards and upwards, as matplotlib takes them."""
    return [[i.mean - i.low for i in intervals], [i.high - i.mean for i in intervals]]


def side_legend(ax: Any, title: str | None = None) -> None:
    """Put the legend to the right of the axes."""
    place = {"loc": "center left", "bbox_to_anchor": (1.01, 0.5)}
    ax.legend(fontsize=8, title=title, title_fontsize=8, frameon=False, **place)


def training_curves(
    rows: Sequence[Mapping[str, Any]], path: str | Path, label: str = "score"
) -> None:
    """Score, reward by turn, and the health of the updates, by step.

    Args:
        rows: the lines of ``metrics.jsonl``.
        path: the PNG to write.
        label: name of the score.
    """
    rows = [row for row in rows if "reward" in row]
    steps = [row["step"] for row in rows]
    with figure(path, columns=3, width=4.6) as (score, turns, health):
        score.plot(steps, [row.get("score") for row in rows], color="tab:blue")
        score.set(title="training dialogues", xlabel="step", ylabel=label)
        length = max((len(row["reward_by_turn"]) for row in rows), default=0)
        for t in range(length):
            values = [
                row["reward_by_turn"][t] if t < len(row["reward_by_turn"]) else None for row in rows
            ]
            turns.plot(steps, values, label=f"turn {t + 1}", alpha=0.85)
        turns.set(title="reward by turn", xlabel="step", ylabel="reward")
        if length:
            low, high = turns.get_ylim()
            room = 0.1 * math.ceil(length / 4)  # for the lines of the legend
            turns.set_ylim(low, high + room * (high - low))
            turns.legend(fontsize=7, ncols=4, loc="upper center", frameon=False)
        health.plot(steps, [row.get("grad_norm") for row in rows], label="gradient norm")
        health.plot(steps, [row.get("truncated") for row in rows], label="share cut at the limit")
        health.set(title="updates", xlabel="step")
        if rows:
            health.legend(fontsize=8)


def before_after(
    before: Sequence[float],
    after: Sequence[float],
    path: str | Path,
    label: str,
    tasks: str = "held-out tasks",
) -> None:
    """Each task before and after training, on one line each.

    Args:
        before: score per task.
        after: score per task, in the same order.
        path: the PNG to write.
        label: name of the score.
        tasks: what the tasks are called.
    """
    order = sorted(range(len(before)), key=lambda i: after[i] - before[i])
    with figure(path, width=7.5) as (ax,):
        for place, i in enumerate(order):
            better = after[i] >= before[i]
            color = "tab:green" if better else "tab:red"
            ax.plot([place, place], [before[i], after[i]], color=color, alpha=0.6)
        places = range(len(order))
        ax.scatter(places, [before[i] for i in order], color="grey", s=18, label="before")
        ax.scatter(places, [after[i] for i in order], color="tab:blue", s=18, label="after")
        ax.set(title=tasks, xlabel="sorted by gain", ylabel=label)
        ax.legend(fontsize=8)
