"""Plots of the two experiments of ST-PPO; bands and bars are 95% intervals over seeds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from normkit.recipes._st_ppo_arms import ARMS
from normkit.recipes._st_ppo_comparison import Trial
from normkit.report.plots import error_bars, figure, interval_band, side_legend
from normkit.statistics import bootstrap_interval

COLORS = dict(
    zip(
        ARMS,
        (
            "tab:red",
            "tab:orange",
            "tab:cyan",
            "tab:blue",
            "tab:purple",
            "tab:green",
            "tab:grey",
        ),
        strict=True,
    )
)
_TERMS = {
    "true": ("true advantage", "tab:green"),
    "luck": ("error: luck of the dialogues", "silver"),
    "critic": ("error: critic", "tab:olive"),
    "bias": ("clipping bias C", "tab:red"),
    "gradient": ("what is left: the gradient", "black"),
}


def plot_lemma(trial: Trial, path: Path) -> None:
    """The terms of Lemma 4.2, the critic's error and the cosine with the exact gradient, by lag."""
    with figure(path, columns=3, width=4.6) as (terms, error, cosine):
        for key, (label, color) in _TERMS.items():
            _band(terms, trial.lag(key), color, label)
        room = 1.9 * max(trial.lag(key).mean(1).max() for key in _TERMS)
        terms.set(title=f"{trial.name}: terms of its gradient", ylabel="norm", ylim=(0, room))
        terms.legend(fontsize=7, loc="upper left", frameon=False)
        _band(error, trial.lag("value_error"), "tab:olive", "")
        error.set(title="error of the critic's values", ylabel="root mean square")
        _band(cosine, trial.lag("cosine"), "black", "")
        cosine.axhline(0, color="black", lw=0.6)
        cosine.set(title="gradient and exact gradient", ylabel="cosine")
        for ax in (terms, error, cosine):
            ax.set_xlabel("updates since sampling")


def plot_lags(trials: Sequence[Trial], path: Path) -> None:
    """Clipping bias, gradient and clipped tokens of all methods, by lag."""
    with figure(path, columns=3, width=4.6) as (bias, gradient, clipped):
        for trial in trials:
            label = f"{trial.name}, {trial.rate:g}"
            for ax, key in ((bias, "bias"), (gradient, "gradient"), (clipped, "clipped")):
                _band(ax, trial.lag(key), COLORS[trial.name], label)
        bias.set(title="clipping bias", ylabel="|C|", yscale="log")
        gradient.set(title="gradient, before correction", ylabel="norm")
        clipped.set(title="tokens that are clipped", ylabel="share")
        for ax in (bias, gradient, clipped):
            ax.set_xlabel("updates since sampling")
        side_legend(clipped, "method, learning rate")


def plot_courses(
    columns: Mapping[str, Sequence[Trial]], path: Path, every: int, label: str
) -> None:
    """Success by update, a column of axes for each setting.

    Args:
        columns: trials by the title of their axes.
        path: the PNG to write.
        every: updates between two points of a curve.
        label: what success is.
    """
    with figure(path, columns=len(columns), width=3.6) as axes:
        for ax, (title, trials) in zip(axes, columns.items(), strict=True):
            for trial in trials:
                _band(ax, trial.curve, COLORS[trial.name], trial.name, every)
            ax.set(title=title, xlabel="update", ylim=(0, 1.02))
        axes[0].set_ylabel(label)
        side_legend(axes[-1])


def plot_staleness(columns: Mapping[int, Sequence[Trial]], path: Path) -> None:
    """How trainings end and what happens on the way, by staleness."""
    panels = {
        "final": "exact match at the end",
        "drop": "largest fall below the best",
        "clipped": "share of clipped tokens",
        "tail": "gradient norm, 99th percentile",
    }
    with figure(path, columns=len(panels), width=3.6) as axes:
        for ax, (metric, title) in zip(axes, panels.items(), strict=True):
            for i, name in enumerate(ARMS):
                found = [
                    bootstrap_interval(t.values(metric).tolist())
                    for trials in columns.values()
                    for t in trials
                    if t.name == name
                ]
                ax.errorbar(
                    [s * 1.06 ** (i - 3) for s in columns],
                    [f.mean for f in found],
                    error_bars(found),
                    color=COLORS[name],
                    label=name,
                    marker="o",
                    ms=3,
                    lw=1,
                    elinewidth=0.8,
                )
            ax.set(title=title, xlabel="updates per batch", xscale="log")
            ax.set_xticks(list(columns), [str(s) for s in columns])
            ax.minorticks_off()
        side_legend(axes[-1])


def plot_rates(trials: Sequence[Trial], path: Path) -> None:
    """Success at the end by learning rate, on the seeds that chose it; points are seeds."""
    with figure(path, width=7.0) as (ax,):
        for i, trial in enumerate(trials):
            rates = [float(rate) * 1.03 ** (i - 3) for rate in trial.tuning]
            ends = np.asarray(list(trial.tuning.values()))
            ax.plot(rates, ends.mean(1), color=COLORS[trial.name], label=trial.name)
            for rate, row in zip(rates, ends, strict=True):
                ax.scatter([rate] * len(row), row, color=COLORS[trial.name], s=9)
        ax.set(title=f"staleness {trials[0].staleness}", xscale="log", ylim=(0, 1.02))
        ax.set(xlabel="learning rate", ylabel="exact match at the end")
        side_legend(ax)


def _band(ax: Any, rows: Any, color: str, label: str, every: int = 1) -> None:
    """Mean over seeds of ``rows`` (points by seeds) from update 0 on, with its interval."""
    interval_band(ax, range(0, len(rows) * every, every), np.asarray(rows).tolist(), color, label)
