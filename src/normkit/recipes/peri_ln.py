"""Peri-LN: a norm before and after each sublayer.

Peri-LN: Revisiting Normalization Layer in the Transformer Architecture (Kim et al., 2025), arXiv
2502.02732.

``x <- x + N(F(N(x)))`` for each sublayer F, with a norm after the embeddings and before the head.

Run it::

    normkit run peri-ln                                   # all placements, two learning rates
    normkit run peri-ln --placements pre peri --seeds 3 --steps 1000
    normkit verify peri-ln --measured

Differences from the paper: 12 blocks of width 48 on bytes instead of 400M to 3.2B parameters; no
code of the authors is public. See docs/papers/peri-ln.md.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

import torch

from normkit.recipes._peri_ln_claims import CLAIMS
from normkit.recipes._peri_ln_training import (
    Comparison,
    Config,
    Trial,
    diverged,
    growth,
    guess,
    leaps,
    loss,
    massive,
    train,
    unevenness,
)
from normkit.recipes._trials import run_missing
from normkit.recipes.base import Run, System
from normkit.report.plots import figure
from normkit.runs import RunLogger, read_table

Records = Callable[[Trial], list[list[float]]]

COLORS = {
    "post": "tab:red",
    "pre": "tab:orange",
    "sandwich": "tab:green",
    "peri": "tab:blue",
    "output": "tab:purple",
}


def run(config: Config, folder: Path) -> Mapping[str, Any]:
    """Train every placement at every rate; a resumed run trains only what is missing."""
    config.validate()
    run = Run(config, folder, anew=False)
    trials = run_missing(
        run,
        [Trial.read(row) for row in read_table(folder, "trials")],
        config.trainings(),
        partial(train, config),
        lambda t: t.name,
        lambda t: (
            f"{t.placement:8} rate {t.rate:g} seed {t.seed}: held-out loss {t.held_out:.3f}, "
            f"variance after the last block {t.variance[0][-1]:.3g} -> {t.variance[-1][-1]:.3g}"
        ),
    )
    found = Comparison(trials)
    _log_losses(run.logger, folder, found)
    plot(found, config, folder)
    return run.finish(summarize(found, config, run.seconds))


def summarize(found: Comparison, config: Config, seconds: float) -> dict[str, Any]:
    """The table of every placement and rate, and how others differ from peri."""
    values: dict[str, Callable[[Trial], float]] = {
        "held-out loss (nats a byte)": loss,
        "share diverged": diverged,
        "leaps (steps)": leaps,
        "variance at the start": lambda t: t.variance[0][-1],
        "variance at the end": lambda t: t.variance[-1][-1],
        "growth (powers of ten)": growth,
        "largest / median": lambda t: max(t.ratio[-1]),
        "gradients, most / least (powers of ten)": unevenness,
    }
    rows = [
        [
            placement,
            f"{rate:g}{' (best)' if rate == found.best[placement] else ''}",
            *(found.mean(value, placement, rate) for value in values.values()),
        ]
        for placement in found.placements
        for rate in found.rates
    ]
    others = [p for p in found.placements if p != "peri" and "peri" in found.placements]
    return {
        "title": "normkit run peri-ln: where the norm sits in a deep transformer",
        "summary": [
            f"{len(found.trials)} trainings of {config.layers} blocks and {config.steps} steps, "
            f"{torch.get_num_threads()} threads, {seconds:.0f} s; guessing bytes by their "
            f"frequency has a loss of {guess():.3f}",
            *(
                f"held-out loss of {p} minus peri, each at its best rate, paired by seed: "
                f"{found.difference(loss, p)}"
                for p in others
            ),
        ],
        "table": {"columns": ["placement", "learning rate", *values], "rows": rows},
        "largest ratio": {
            p: {f"{rate:g}": found.mean(massive, p, rate) for rate in found.rates}
            for p in found.placements
        },
        "seconds": seconds,
    }


def plot(found: Comparison, config: Config, folder: Path) -> None:
    """Draw variance, massive activations and gradients by depth, and the course of training."""
    folder = folder / "plots"
    by_depth: dict[str, tuple[str, Records]] = {
        "1_variance_by_depth.png": ("variance of the stream", lambda t: t.variance),
        "2_massive_activations.png": ("largest / median", lambda t: t.ratio),
        "3_gradients_by_depth.png": ("gradient norm of the block", lambda t: t.gradients),
    }
    panels = [(found.rates[0], 0, "at the start")]
    panels += [(rate, -1, f"trained at {rate:g}") for rate in found.rates]
    for name, (label, records) in by_depth.items():
        with figure(folder / name, len(panels), 4.0) as axes:
            for ax, (rate, row, title) in zip(axes, panels, strict=True):
                _draw(ax, found, rate, partial(_row, records, row))
                ticks = range(0, config.layers, 2)
                ax.set(title=title, xlabel="block", yscale="log", xticks=ticks)
            _same_scale(axes)
            axes[0].set_ylabel(label)
            axes[0].legend(fontsize=8)
    places = [*range(0, config.steps, config.every), config.steps]
    with figure(folder / "4_training_loss.png", len(found.rates), 4.6) as axes:
        for ax, rate in zip(axes, found.rates, strict=True):
            _draw(ax, found, rate, lambda t: _smooth(t.losses))
            ax.axhline(guess(), color="black", linewidth=0.8, linestyle=":")
            ax.set(title=f"trained at {rate:g}", xlabel="step")
        _same_scale(axes)
        axes[0].set_ylabel("loss (nats a byte, mean of 10 steps)")
        axes[0].legend(fontsize=8)
    with figure(folder / "5_variance_by_step.png", len(found.rates), 4.6) as axes:
        for ax, rate in zip(axes, found.rates, strict=True):
            _draw(ax, found, rate, lambda t: [row[-1] for row in t.variance], places)
            ax.set(title=f"trained at {rate:g}", xlabel="step", yscale="log")
        _same_scale(axes)
        axes[0].set_ylabel("variance after the last block")
        axes[0].legend(fontsize=8)


def _draw(
    ax: Any,
    found: Comparison,
    rate: float,
    curve: Callable[[Trial], Sequence[float]],
    x: Sequence[int] | None = None,
) -> None:
    """Draw the mean curve of the seeds of each placement; dashes let what lies below be seen."""
    for placement in found.placements:
        columns = zip(*(curve(t) for t in found.of(placement, rate)), strict=True)
        mean = [fmean(column) for column in columns]
        style = "--" if placement in ("peri", "output") else "-"
        ax.plot(x or range(len(mean)), mean, style, color=COLORS[placement], label=placement)


def _row(records: Records, index: int, trial: Trial) -> list[float]:
    return records(trial)[index]


def _same_scale(axes: Sequence[Any]) -> None:
    """Give all axes the vertical range of all."""
    ends = [ax.get_ylim() for ax in axes]
    for ax in axes:
        ax.set_ylim(min(low for low, _ in ends), max(high for _, high in ends))


def _smooth(values: Sequence[float], width: int = 10) -> list[float]:
    return [fmean(values[max(i - width + 1, 0) : i + 1]) for i in range(len(values))]


def _log_losses(logger: RunLogger, folder: Path, found: Comparison) -> None:
    """Log the mean training losses at each placement's best rate, once a run."""
    if read_table(folder):
        return
    curves = {
        p: [fmean(c) for c in zip(*(t.losses for t in found.of(p)), strict=True)]
        for p in found.placements
    }
    for step in range(0, len(next(iter(curves.values()))), 10):
        logger.log(step, {f"training loss {p}": curve[step] for p, curve in curves.items()})


SYSTEM = System(
    slug="peri-ln",
    title="Peri-LN: Revisiting Normalization Layer in the Transformer Architecture",
    arxiv="2502.02732",
    year=2025,
    tags=("activations", "transformers", "residual stream"),
    symbols=(
        "normkit.nn.TransformerBlock",
        "normkit.nn.Transformer",
        "normkit.nn.Residual",
        "normkit.diagnostics.Monitor",
    ),
    Config=Config,
    run=run,
    claims=tuple(CLAIMS),
)
