"""The comparison of all estimators in the tabular world: ``normkit run mapo --world tabular``."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from normkit.recipes._mapo_comparison import NAMES, Facts, Plan, Trial, compare
from normkit.recipes._trials import keep_each
from normkit.recipes.base import Run, table
from normkit.report.plots import error_bars, figure, interval_band, side_legend
from normkit.statistics import Interval, bootstrap_interval

if TYPE_CHECKING:
    from normkit.recipes.mapo import Config


def run_tabular(config: Config, folder: Path, plan: Plan | None = None) -> Mapping[str, Any]:
    """Compare all estimators in the tabular world, in a run folder.

    A run takes minutes and keeps no checkpoint: resumed, it starts anew.

    Args:
        config: the recipe's configuration; its alpha, gamma and batch scope are MAPO's.
        folder: the run folder. ``metrics.jsonl`` gets a line per trial, ``trials.jsonl`` all seeds.
        plan: what to compare.

    Returns:
        The results, as they stand in ``results.json``.
    """
    plan = plan or Plan()
    run = Run(config, folder)
    options = {
        "mapo": {"alpha": config.alpha, "gamma": config.gamma, "batch_scope": config.batch_scope}
    }
    facts: list[Facts] = []

    def made() -> Iterator[Trial]:
        for found in compare(plan, options, config.seed):
            if isinstance(found, Trial):
                yield found
            else:
                facts.append(found)
                run.console.print(_describe(found), highlight=False)

    trials = list(keep_each(run, made(), plan.trials, "solving the world", _brief))
    plots = folder / "plots"
    plot_learning(trials, plan, plots / "1_return_by_update.png")
    plot_final(trials, plan, plots / "2_final_return.png")
    plot_truth(trials, plan, plots / "3_estimated_against_exact.png")
    return run.finish(summarize(plan, facts, trials, run.seconds))


def summarize(
    plan: Plan, facts: Sequence[Facts], trials: Sequence[Trial], seconds: float
) -> dict[str, Any]:
    """The table of all trials, the facts of the world, and the leaders in words."""
    summary = [
        f"{len(plan.names)} estimators, horizons {_words(plan.horizons)}, groups of "
        f"{_words(plan.group_sizes)}, {plan.seeds} seeds, {plan.updates} updates of 64 dialogues: "
        f"{seconds:.0f} s"
    ]
    for horizon in plan.horizons:
        here = [t for t in trials if t.horizon == horizon and _headline(t, plan)]
        ranked = sorted(here, key=lambda t: -_mean(t.final))
        line = ", ".join(f"{t.name} {_mean(t.final):.3f}" for t in ranked)
        summary.append(f"T = {horizon}, share of the optimal return, own best rates: {line}")
    return {
        "title": "normkit run mapo: estimators in the tabular world",
        "summary": summary,
        "table": table(map(_brief, trials)),
        "facts": [asdict(f) for f in facts],
        "seconds": seconds,
    }


def _brief(trial: Trial) -> dict[str, Any]:
    final = bootstrap_interval(trial.final)
    return {
        "horizon": trial.horizon,
        "group": trial.group_size,
        "estimator": trial.name,
        "rates": trial.choice,
        "rate": trial.rate,
        "final": final.mean,
        "low": final.low,
        "high": final.high,
        "spread": trial.spread,
        "success": _mean(trial.success),
        "area": _mean(trial.area),
        "largest gradient": _mean(trial.grad_norm),
        "correlation": _mean(trial.correlation),
        "cosine": _mean(trial.cosine),
    }


def _describe(facts: Facts) -> str:
    return (
        f"T = {facts.horizon}: {facts.states} states, optimal return {facts.optimum:.3f} points, "
        f"myopic {facts.myopic / facts.optimum:.3f} of it, uniform "
        f"{facts.uniform / facts.optimum:.3f}"
    )


def _headline(trial: Trial, plan: Plan) -> bool:
    return trial.group_size == plan.group_sizes[0] and trial.choice == "own"


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _words(numbers: Sequence[int]) -> str:
    return ", ".join(str(n) for n in numbers)


# ----------------------------------------------------------------------- plots

_COLORS = dict(
    zip(
        NAMES,
        (
            "tab:blue",
            "tab:cyan",
            "tab:green",
            "tab:olive",
            "tab:red",
            "tab:pink",
            "silver",
            "tab:grey",
            "tab:purple",
            "tab:brown",
            "gold",
            "black",
        ),
        strict=True,
    )
)
_BANDED = ("mapo", "turn", "batch", "grpo", "ppo")


def plot_learning(trials: Sequence[Trial], plan: Plan, path: Path) -> None:
    """Return by update at every horizon; bands are 95% intervals of the mean over seeds."""
    with figure(path, columns=len(plan.horizons), width=4.2) as axes:
        for ax, horizon in zip(axes, plan.horizons, strict=True):
            for trial in trials:
                if trial.horizon != horizon or not _headline(trial, plan):
                    continue
                updates, style = range(1, len(trial.curve) + 1), (_COLORS[trial.name], trial.name)
                if trial.name in _BANDED:
                    interval_band(ax, updates, trial.curve, *style)
                else:
                    mean = [_mean(seeds) for seeds in trial.curve]
                    ax.plot(updates, mean, color=style[0], lw=0.9, ls="--", label=style[1])
            ax.set(title=f"{horizon} turns", xlabel="update", ylim=(-0.25, 1.02))
        axes[0].set_ylabel("return of training dialogues / optimum")
        side_legend(axes[-1])


def plot_final(trials: Sequence[Trial], plan: Plan, path: Path) -> None:
    """Exact value of the trained policies with 95% intervals, at both choices of rate."""
    names = list(reversed(plan.names))
    with figure(path, columns=len(plan.horizons), width=4.2) as axes:
        for ax, horizon in zip(axes, plan.horizons, strict=True):
            for choice, shift, alpha in (("own", 0.2, 1.0), ("equal", -0.2, 0.45)):
                here = {
                    t.name: t
                    for t in trials
                    if t.horizon == horizon
                    and t.choice == choice
                    and t.group_size == plan.group_sizes[0]
                }
                ends: list[Interval] = [bootstrap_interval(here[name].final) for name in names]
                ax.barh(
                    [i + shift for i in range(len(names))],
                    [e.mean for e in ends],
                    0.38,
                    xerr=error_bars(ends),
                    color=[_COLORS[name] for name in names],
                    alpha=alpha,
                    error_kw={"lw": 1, "capsize": 2},
                )
            low = min(min(t.final) for t in trials if t.horizon == horizon)
            ax.set(title=f"{horizon} turns", xlabel="final return / optimum\n(pale: equal rate)")
            ax.set(xlim=(max(0.0, low - 0.05), 1), yticks=range(len(names)))
            ax.set_yticklabels(names if ax is axes[0] else [])


def plot_truth(trials: Sequence[Trial], plan: Plan, path: Path) -> None:
    """Agreement with exact advantages and gradients, by length and by group size."""
    own = [t for t in trials if t.choice == "own"]
    longest = plan.horizons[-1]
    with figure(path, columns=3, width=5.0) as (correlation, cosine, groups):
        for name in plan.names:
            style = {"color": _COLORS[name], "marker": "o", "ms": 3, "lw": 1.3, "label": name}
            mine = [t for t in own if t.name == name]
            first = [t for t in mine if t.group_size == plan.group_sizes[0]]
            last = [t for t in mine if t.horizon == longest]
            lengths = [t.horizon for t in first]
            correlation.plot(lengths, [_mean(t.correlation) for t in first], **style)
            cosine.plot(lengths, [_mean(t.cosine) for t in first], **style)
            sizes = [t.group_size for t in last]
            groups.plot(sizes, [_mean(t.cosine) for t in last], **style)
        correlation.set(title="estimated and exact advantage", ylabel="correlation")
        cosine.set(title="estimated and exact gradient", ylabel="cosine")
        groups.set(title=f"the same at {longest} turns", ylabel="cosine")
        for ax in (correlation, cosine):
            ax.set(xlabel=f"turns (groups of {plan.group_sizes[0]})", xticks=plan.horizons)
        groups.set(xlabel="group size (64 dialogues in all)", xticks=plan.group_sizes)
        side_legend(groups)
