"""Comparisons of norms in the small language model: findings, run folder, plots."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch

from normkit.recipes._lm import COLORS, Training, Trial, best, train
from normkit.recipes._trials import run_missing
from normkit.recipes.base import Finding, Run, Verdict, verdict_of
from normkit.report.plots import figure, range_band
from normkit.runs import RunLogger, read_table
from normkit.statistics import bootstrap_interval

PLAN = Training()
"""What measured claims train: what the recipes train by default."""

MARGIN = 0.02
"""Nats a byte that still count as equal."""


@cache
def planned(norm: str) -> tuple[Trial, ...]:
    """The trials of a norm under :data:`PLAN`, once a process."""
    return tuple(train(PLAN, *training) for training in PLAN.trainings((norm,)))


def lower_loss(found: Sequence[Trial], better: str, worse: str) -> Finding:
    """Whether one norm ends with a lower held-out loss than another, paired by seed."""
    gain = bootstrap_interval(_differences(found, worse, better))
    measured = f"{worse} minus {better} {gain} nats a byte; {_losses(found, (better, worse))}"
    return Finding(verdict_of(gain), measured, _seeds(found, (better, worse)))


def on_par(found: Sequence[Trial], norm: str, peer: str) -> Finding:
    """Whether a norm ends no worse than its peer, within :data:`MARGIN`."""
    cost = bootstrap_interval(_differences(found, norm, peer))
    verdict: Verdict = "not shown"
    if cost.high <= MARGIN:
        verdict = "holds"
    elif cost.low > MARGIN:
        verdict = "contradicted"
    measured = f"{norm} minus {peer} {cost} nats a byte; {_losses(found, (norm, peer))}"
    return Finding(verdict, measured, _seeds(found, (norm, peer)))


def collapses(found: Sequence[Trial], norm: str, peer: str) -> Finding:
    """Whether every training with a norm ends a nat or more above the peer's."""
    costs = _differences(found, norm, peer)
    collapsed = sum(c > 1 for c in costs)
    verdict: Verdict = "contradicted" if collapsed == 0 else "not shown"
    if collapsed == len(costs):
        verdict = "holds"
    jumps = {name: _mean([t.spikes for t in best(found, name)]) for name in (norm, peer)}
    shares = ", ".join(f"{name} {share:.3f}" for name, share in jumps.items())
    measured = (
        f"{collapsed} of {len(costs)} trainings ended a nat above {peer}; share of steps at which "
        f"the loss jumps: {shares}; {_losses(found, (norm, peer))}"
    )
    return Finding(verdict, measured, _seeds(found, (norm, peer)))


def calmer(found: Sequence[Trial], calm: str, wild: str) -> Finding:
    """Whether a norm's batch statistics stay nearer to the running ones than another's do."""
    ratios = [
        _tail_mean(a.distance) / _tail_mean(b.distance)
        for a, b in zip(best(found, calm), best(found, wild), strict=True)
    ]
    ratio = bootstrap_interval(ratios)
    verdict: Verdict = "not shown"
    if ratio.high < 1:
        verdict = "holds"
    elif ratio.low > 1:
        verdict = "contradicted"
    means = ", ".join(
        f"{name} {_mean([_tail_mean(t.distance) for t in best(found, name)]):.3f}"
        for name in (calm, wild)
    )
    measured = f"relative distance {means} after the warm-up; ratio {ratio}"
    return Finding(verdict, measured, {"ratios": ratios})


Finder = Callable[[Sequence[Trial]], Finding]


def run_comparison(
    config: Training,
    folder: Path,
    slug: str,
    norms: Sequence[str],
    findings: Mapping[str, Finder],
) -> Mapping[str, Any]:
    """Train each norm in a run folder; a resumed run trains only what is missing.

    Args:
        config: how each model is trained.
        folder: the run folder; ``trials.jsonl`` gets a line per training.
        slug: of the recipe.
        norms: names of the norms.
        findings: by what they are about, what is found in the trials.

    Returns:
        The results, as they stand in ``results.json``.
    """
    config.validate()
    run = Run(config, folder, anew=False)
    found = run_missing(
        run,
        [Trial(**row) for row in read_table(folder, "trials")],
        config.trainings(norms),
        partial(train, config),
        lambda t: (t.norm, t.rate, t.seed),
        lambda t: (
            f"{t.norm:7} rate {t.rate:g} seed {t.seed}: held-out loss {t.loss:.3f}, by batch "
            f"statistics {t.by_batch:.3f}"
        ),
    )
    if not read_table(folder):
        _log_curves(run.logger, config, found, norms)
    draw(config, found, norms, folder / "plots")
    claims = {name: find(found) for name, find in findings.items()}
    results: dict[str, Any] = {
        "title": f"normkit run {slug}: norms of a small language model",
        "summary": [
            f"{len(found)} trainings of {config.steps} steps, {torch.get_num_threads()} threads, "
            f"{run.seconds:.0f} s; losses in nats a byte of held-out text, each "
            "norm at its own best rate, differences paired by seed, 95% interval",
            *(f"{name}: {f}" for name, f in claims.items()),
        ],
        "table": _table(config, found, norms),
        "claims": {name: asdict(f) for name, f in claims.items()},
        "seconds": run.seconds,
    }
    return run.finish(results)


def draw(config: Training, found: Sequence[Trial], norms: Sequence[str], plots: Path) -> None:
    """Learning curves, gradients, and how far batches are from running statistics."""
    steps = range(config.every, config.steps + 1, config.every)
    every = range(1, config.steps + 1)
    with figure(plots / "1_loss.png", 2) as (held_out, training):
        for norm in norms:
            own, style = best(found, norm), (COLORS[norm], norm)
            range_band(held_out, steps, [t.held_out for t in own], *style)
            range_band(training, every, [_smooth(t.train) for t in own], *style)
        held_out.set(title="held-out text, evaluation", xlabel="step", ylabel="nats a byte")
        training.set(title="training, running mean of 10 steps", xlabel="step")
        held_out.legend(fontsize=8)
    with figure(plots / "2_stability.png", 2) as (gradients, distance):
        for norm in norms:
            own, style = best(found, norm), (COLORS[norm], norm)
            range_band(gradients, every, [_smooth(t.grad_norm) for t in own], *style)
            if own[0].distance:
                range_band(distance, every, [_smooth(t.distance) for t in own], *style)
        gradients.set(title="norm of the gradient", xlabel="step", yscale="log")
        distance.set(
            title="batch from running statistics", xlabel="step", ylabel="relative distance"
        )
        distance.set_yscale("log")
        gradients.legend(fontsize=8)


def _table(config: Training, found: Sequence[Trial], norms: Sequence[str]) -> dict[str, Any]:
    rows = []
    for norm in norms:
        chosen = best(found, norm)[0].rate
        for rate in config.rates:
            own = [t for t in found if (t.norm, t.rate) == (norm, rate)]
            loss = bootstrap_interval([t.loss for t in own])
            rows.append(
                [
                    norm,
                    f"{rate:g}{' (best)' if rate == chosen and len(config.rates) > 1 else ''}",
                    str(loss),
                    math.exp(loss.mean),
                    _mean([t.gap for t in own]),
                    _mean([t.spikes for t in own]),
                    _mean([_tail_mean(t.distance) for t in own]) if own[0].distance else None,
                    _mean([t.seconds for t in own]),
                ]
            )
    columns = ["norm", "rate", "held-out loss", "perplexity a byte", "cost of running statistics"]
    columns += ["share of jumps", "distance of statistics", "seconds"]
    return {"columns": columns, "rows": rows}


def _log_curves(
    logger: RunLogger, config: Training, found: Sequence[Trial], norms: Sequence[str]
) -> None:
    """Log the mean held-out losses, once a run."""
    for i, step in enumerate(range(config.every, config.steps + 1, config.every)):
        curves = {n: _mean([t.held_out[i] for t in best(found, n)]) for n in norms}
        logger.log(step, {f"held-out loss {norm}": loss for norm, loss in curves.items()})


def _smooth(values: Sequence[float], width: int = 10) -> list[float]:
    return [_mean(values[max(0, i + 1 - width) : i + 1]) for i in range(len(values))]


def _tail_mean(values: Sequence[float]) -> float:
    """Mean after the warm-up, the first tenth."""
    return _mean(values[len(values) // 10 :])


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _differences(found: Sequence[Trial], a: str, b: str) -> list[float]:
    return [x.loss - y.loss for x, y in zip(best(found, a), best(found, b), strict=True)]


def _losses(found: Sequence[Trial], norms: Sequence[str]) -> str:
    return ", ".join(f"{norm} {_mean([t.loss for t in best(found, norm)]):.3f}" for norm in norms)


def _seeds(found: Sequence[Trial], norms: Sequence[str]) -> dict[str, Any]:
    return {norm: [t.loss for t in best(found, norm)] for norm in norms}
