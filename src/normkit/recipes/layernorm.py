"""LayerNorm: statistics of one case over its units, feed-forward and recurrent.

Layer Normalization (Ba, Kiros, Hinton, 2016), arXiv 1607.06450.

``y = (a - mean(a)) / sqrt(var(a) + eps) * gain + shift`` over the summed inputs of a layer.

Run it::

    normkit run layernorm                   # LN-LSTM beside LSTM on digits read row by row
    normkit verify layernorm                # the paper's table of invariances, and more
    normkit verify layernorm --measured     # the experiment's claims too

Differences from the authors' code: see :mod:`normkit.nn.recurrent` and docs/papers/layernorm.md.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch

from normkit.recipes import _layernorm_claims, _layernorm_digits
from normkit.recipes._layernorm_digits import (
    EVERY,
    NETS,
    Comparison,
    Config,
    Trial,
    forgotten,
    growth,
    reached,
    train,
)
from normkit.recipes._trials import run_missing
from normkit.recipes.base import Run, System
from normkit.report.plots import figure, range_band
from normkit.runs import RunLogger, read_table

COLORS = dict(zip(NETS, ("tab:grey", "tab:blue"), strict=True))


def run(config: Config, folder: Path) -> Mapping[str, Any]:
    """Train both nets with every rate and seed; a resumed run trains only what is missing."""
    config.validate()
    run = Run(config, folder, anew=False)
    trials = run_missing(
        run,
        [Trial(**row) for row in read_table(folder, "trials")],
        config.trainings(),
        partial(train, config),
        lambda t: (t.net, t.rate, t.seed),
        lambda t: (
            f"{t.net:7} rate {t.rate:g} seed {t.seed}: loss {config.loss:g} after {t.reached} "
            f"steps, accuracy {t.accuracy:.3f}, {t.chain_accuracy[-1]:.3f} after {config.chain} "
            "digits without a reset"
        ),
    )
    found = Comparison(trials)
    _log_curves(run.logger, folder, found)
    plot(found, config, folder)
    return run.finish(summarize(found, config, run.seconds))


def summarize(found: Comparison, config: Config, seconds: float) -> dict[str, Any]:
    """The table of every rate, and a sentence for each claim."""
    rows = [
        [
            net,
            f"{rate:g}{' (best)' if rate == found.best[net] else ''}",
            *(_mean(t, value) for value in (reached, _loss, _accuracy, forgotten, growth)),
        ]
        for net in NETS
        for rate in config.rates
        for t in (found.of(net, rate),)
    ]
    claims = {
        "steps to the loss": found.finding(reached, "steps"),
        "accuracy lost without a reset": found.finding(forgotten, "of accuracy"),
        "growth of the cell without a reset": found.finding(growth, "times"),
    }
    return {
        "title": "normkit run layernorm: LN-LSTM beside LSTM on digits read row by row",
        "summary": [
            f"{len(found.trials)} trainings of {config.steps} steps, "
            f"{torch.get_num_threads()} threads, {seconds:.0f} s; differences are LSTM minus "
            "LN-LSTM, paired by seed, each net at its own best rate, 95% interval",
            *(f"{name}: {f}" for name, f in claims.items()),
        ],
        "table": {
            "columns": [
                "net",
                "learning rate",
                f"steps to {config.loss:g} nats",
                "final loss",
                "accuracy",
                "accuracy lost in a chain",
                "growth of the cell",
            ],
            "rows": rows,
        },
        "claims": {name: asdict(f) for name, f in claims.items()},
        "seconds": seconds,
    }


def plot(found: Comparison, config: Config, folder: Path) -> None:
    """Draw learning curves, and what happens when the state is not set back."""
    steps = [EVERY * (i + 1) for i in range(len(found.trials[0].losses))]
    with figure(folder / "plots" / "1_held-out_loss.png", len(config.rates), 4.0) as axes:
        for ax, rate in zip(axes, config.rates, strict=True):
            for net in NETS:
                range_band(ax, steps, [t.losses for t in found.of(net, rate)], COLORS[net], net)
            ax.axhline(config.loss, color="black", linewidth=0.8, linestyle=":")
            ax.set(title=f"learning rate {rate:g}", xlabel="step", yscale="log", ylim=(0.08, 4))
            ax.set_yticks([0.1, 0.3, 1, 3], ["0.1", "0.3", "1", "3"])
            ax.minorticks_off()
        axes[0].set_ylabel("cross-entropy (nats)")
        axes[0].legend(fontsize=8)
    read = range(1, config.chain + 1)
    with figure(folder / "plots" / "2_reading_on_without_a_reset.png", 2) as (accuracy, cell):
        for net in NETS:
            own, style = found.of(net), (COLORS[net], net)
            range_band(accuracy, read, [t.chain_accuracy for t in own], *style)
            range_band(cell, read, [t.chain_cell for t in own], *style)
        accuracy.set(title="accuracy", xlabel="digits read", ylabel="share right", ylim=(0, 1))
        cell.set(title="size of the cell", xlabel="digits read", ylabel="root mean square")
        accuracy.legend(fontsize=8)


def _log_curves(logger: RunLogger, folder: Path, found: Comparison) -> None:
    """Log the mean held-out losses, once a run."""
    if read_table(folder):
        return
    curves = {net: list(zip(*(t.losses for t in found.of(net)), strict=True)) for net in NETS}
    for i in range(len(curves[NETS[0]])):
        values = {f"held-out loss {net}": sum(c[i]) / len(c[i]) for net, c in curves.items()}
        logger.log(EVERY * (i + 1), values)


def _mean(trials: Sequence[Trial], value: Any) -> float:
    return float(sum(value(t) for t in trials) / len(trials))


def _loss(trial: Trial) -> float:
    return trial.losses[-1]


def _accuracy(trial: Trial) -> float:
    return trial.accuracy


SYSTEM = System(
    slug="layernorm",
    title="Layer Normalization",
    arxiv="1607.06450",
    year=2016,
    tags=("activations", "recurrent nets", "transformers"),
    symbols=(
        "normkit.nn.LayerNorm",
        "normkit.nn.LNLSTM",
        "normkit.nn.LNGRU",
        "normkit.nn.LNLSTMCell",
        "normkit.nn.LNGRUCell",
    ),
    Config=Config,
    run=run,
    claims=(*_layernorm_claims.CLAIMS, *_layernorm_digits.CLAIMS),
)
