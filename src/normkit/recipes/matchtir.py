"""MatchTIR: credit for tool calls by matching them to a reference trace.

MatchTIR: Fine-Grained Supervision for Tool-Integrated Reasoning via Bipartite Matching (Qu et al.,
2026), arXiv 2601.10712.

``r_t = mean over the turn's calls of s(call, the reference call it is matched with)``,
``A = (z(sum_t r_t) + z(sum_{s>=t} 0.9^(s-t) r_s)) / 2``, the second among dialogues at turn t.

Run it::

    normkit run matchtir                    # small policies, five kinds of credit, 12 seeds
    normkit run matchtir --world language   # SmolLM2-135M calls the tools
    normkit verify matchtir --measured      # the paper's statements as checks

Differences from the authors' code: the matching is optimal, theirs (under that name) greedy
(``--matching greedy``); a turn that one dialogue alone reached gets no advantage from its level.
See docs/papers/matchtir.md.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from normkit.errors import InputError, check_least
from normkit.functional.matching import Method
from normkit.recipes._matchtir_claims import CLAIMS
from normkit.recipes._matchtir_measured import (
    MEASURED,
    Trial,
    compare,
    credits,
    difference,
    gap_grows,
    told_apart,
)
from normkit.recipes._matchtir_tabular import KINDS, SETTINGS
from normkit.recipes._trials import ComparisonPlan, keep_each
from normkit.recipes.base import Run, System, check_numbers, from_flags, table
from normkit.report.plots import error_bars, figure, interval_band
from normkit.rl.environments.tools import ToolWorldConfig
from normkit.rl.tool_rewards import MatchOptions
from normkit.rl.trainer_config import TrainerConfig
from normkit.statistics import bootstrap_interval

if TYPE_CHECKING:
    from normkit.rl.rollout import RolloutConfig

METRICS = ("f1", "answer", "redundant", "wrong")
COLORS = dict(
    zip(SETTINGS, ("tab:grey", "tab:olive", "tab:cyan", "tab:blue", "tab:orange"), strict=True)
)


@dataclass(frozen=True)
class Config:
    """Flags of ``normkit run matchtir``.

    Attributes:
        world: "tabular", small policies over call templates, or "language", a chat model.
        seeds: runs of each kind of credit (tabular).
        tuning_seeds: further runs to choose each kind's learning rate (tabular).
        updates: of each run (tabular).
        rates: learning rates to choose from (tabular).
        model: "smollm2", or any chat model of transformers (this and what follows: language).
        estimator: how turns are credited; "grpo" with rewards for the answer only.
        matching: how calls are matched.
        reg: weight of the entropy of "ot".
        warm_start: updates of supervised learning first; 0 for none.
        steps: rollout-and-update rounds.
        groups: tasks per step.
        group_size: dialogues per task.
        max_turns: a dialogue ends here.
        max_new_tokens: length limit of a reply.
        learning_rate: of AdamW.
        lora_rank: rank of LoRA adapters; 0 trains all weights.
        heldout: held-out tasks to score before and after.
        seed: of everything.
    """

    world: Literal["tabular", "language"] = "tabular"
    seeds: int = 12
    tuning_seeds: int = 4
    updates: int = 60
    rates: tuple[float, ...] = (0.1, 0.2, 0.4, 0.8, 1.6)
    model: str = "smollm2"
    estimator: Literal["matchtir", "grpo", "turn"] = "matchtir"
    matching: Method = "hungarian"
    reg: float = 0.1
    warm_start: int = 16
    steps: int = 20
    groups: int = 4
    group_size: int = 4
    max_turns: int = 7
    max_new_tokens: int = 64
    learning_rate: float = 2e-5
    lora_rank: int = 0
    heldout: int = 20
    seed: int = 0

    @property
    def plan(self) -> ComparisonPlan:
        """What the tabular world compares."""
        return ComparisonPlan(self.seeds, self.tuning_seeds, self.updates, self.rates)

    @property
    def tools(self) -> ToolWorldConfig:
        """Options of the world of the chat model."""
        return from_flags(
            ToolWorldConfig,
            self,
            reward="outcome" if self.estimator == "grpo" else "matched",
            matching=MatchOptions(self.matching, reg=self.reg),
        )

    @property
    def training(self) -> TrainerConfig:
        """Options of the trainer."""
        return from_flags(TrainerConfig, self)

    @property
    def speech(self) -> RolloutConfig:
        """How replies are generated."""
        from normkit.rl.rollout import RolloutConfig

        return from_flags(RolloutConfig, self)

    def validate(self) -> None:
        """Check what the types cannot say.

        Raises:
            InputError: names the flag.
        """
        if not self.reg > 0:
            raise InputError(f"reg must be above 0, got {self.reg}")
        check_least(self, 0, "warm_start")
        check_least(self, 1, "heldout")
        _ = self.plan, self.training, self.tools  # check themselves
        if self.world == "language":
            _ = self.speech
        check_numbers(self)


def run(config: Config, folder: Path) -> Mapping[str, Any]:
    """Compare kinds of credit in the tool world, or train a chat model there."""
    config.validate()
    if config.world == "language":
        from normkit.recipes._matchtir_language import run_language

        return run_language(config, folder)
    run = Run(config, folder)
    made = compare(config.plan, config.seed)
    kept = keep_each(run, made, len(SETTINGS), "running all tools", _brief)
    trials = {trial.name: trial for trial in kept}
    credited = credits(config.seeds, config.seed)
    plot_learning(trials, folder / "plots" / "1_learning.png")
    plot_final(trials, folder / "plots" / "2_trained.png")
    plot_credit(credited, folder / "plots" / "3_credit.png")
    return run.finish(summarize(config, trials, credited, run.seconds))


def summarize(
    config: Config,
    trials: dict[str, Trial],
    credited: dict[str, dict[str, list[float]]],
    seconds: float,
) -> dict[str, Any]:
    """The table of all kinds of credit, and a sentence for each comparison."""
    findings = {
        f"{more} against {less}, {metric}": difference(trials, more, less, metric, "")
        for more, less, metric in (
            ("dual-km", "outcome", "f1"),
            ("dual-km", "trajectory", "f1"),
            ("dual-km", "turn", "f1"),
            ("dual-km", "dual-ot", "f1"),
            ("outcome", "dual-km", "redundant"),
            ("outcome", "dual-km", "wrong"),
        )
    }
    findings["lead of dual-km over outcome"] = gap_grows(trials)
    return {
        "title": "normkit run matchtir: credit for tool calls in the tool world",
        "summary": [
            f"{len(trials)} kinds of credit, {config.seeds} seeds, {config.updates} updates of 72 "
            f"dialogues: {seconds:.0f} s; differences are paired by seed, 95% interval",
            *(f"{name}: {found}" for name, found in findings.items()),
        ],
        "table": table(map(_brief, trials.values())),
        "credit": table(
            {
                "credit": name,
                "calls": kind,
                "mean advantage": sum(found[kind]) / len(found[kind]),
                "needed minus these": str(
                    bootstrap_interval(told_apart(credited, name, kind).tolist())
                ),
            }
            for name, found in credited.items()
            for kind in KINDS
        ),
        "seconds": seconds,
    }


def _brief(trial: Trial) -> dict[str, Any]:
    brief: dict[str, Any] = {"credit": trial.name, "rate": trial.rate}
    for metric in METRICS:
        brief[metric] = str(bootstrap_interval(trial.values(metric).tolist()))
    for length, f1 in trial.by_length().items():
        brief[f"f1, {length} calls"] = float(f1.mean())
    return brief


# ----------------------------------------------------------------------- plots


def plot_learning(trials: Mapping[str, Trial], path: Path) -> None:
    """Solve-F1 by update; bands are 95% intervals of the mean over seeds."""
    with figure(path, width=7.0) as (ax,):
        for name, trial in trials.items():
            updates = range(1, len(trial.curve) + 1)
            interval_band(ax, updates, trial.curve, COLORS[name], name)
        ax.set(title="training dialogues", xlabel="update of 72 dialogues", ylabel="solve-F1")
        ax.legend(fontsize=8)


def plot_final(trials: Mapping[str, Trial], path: Path) -> None:
    """What trained policies do, with 95% intervals."""
    with figure(path, columns=3, width=4.4) as (by_length, redundant, wrong):
        for place, (name, trial) in enumerate(trials.items()):
            scores = trial.by_length()
            shift = 0.16 * (place - (len(trials) - 1) / 2)
            ends = [bootstrap_interval(f1.tolist()) for f1 in scores.values()]
            by_length.bar(
                [n + shift for n in scores],
                [e.mean for e in ends],
                0.15,
                yerr=error_bars(ends),
                color=COLORS[name],
                label=name,
                error_kw={"lw": 0.8},
            )
            for ax, metric in ((redundant, "redundant"), (wrong, "wrong")):
                e = bootstrap_interval(trial.values(metric).tolist())
                ax.bar(
                    place,
                    e.mean,
                    yerr=error_bars([e]),
                    color=COLORS[name],
                    error_kw={"lw": 1, "capsize": 2},
                )
        by_length.set(title="solve-F1 by required calls", xlabel="calls", xticks=list(scores))
        by_length.legend(fontsize=7, ncols=3, loc="upper center", framealpha=1)
        by_length.set_ylim(0, 1.25)
        redundant.set(title="redundant calls a dialogue")
        wrong.set(title="share of calls with wrong arguments")
        for ax in (redundant, wrong):
            ax.set_xticks(range(len(trials)), list(trials), rotation=30)


def plot_credit(credited: Mapping[str, Mapping[str, Sequence[float]]], path: Path) -> None:
    """Mean advantage of each kind of call, with 95% intervals over batches."""
    with figure(path, width=8.0) as (ax,):
        for place, kind in enumerate(KINDS):
            ends = [bootstrap_interval(found[kind]) for found in credited.values()]
            ax.bar(
                [i + 0.2 * (place - 1.5) for i in range(len(ends))],
                [e.mean for e in ends],
                0.19,
                yerr=error_bars(ends),
                label=kind,
                color=("tab:green", "tab:orange", "tab:red", "tab:grey")[place],
                error_kw={"lw": 0.8},
            )
        ax.axhline(0, color="black", lw=0.6)
        ax.set_xticks(range(len(credited)), list(credited))
        ax.set(title="credit of calls, a half-trained policy", ylabel="mean advantage")
        ax.legend(fontsize=8, ncols=4, loc="lower center")


SYSTEM = System(
    slug="matchtir",
    title="MatchTIR: Fine-Grained Supervision for Tool-Integrated Reasoning via Bipartite Matching",
    arxiv="2601.10712",
    year=2026,
    tags=("advantages", "multi-turn RL", "tools"),
    symbols=(
        "normkit.rl.advantage.matchtir",
        "normkit.functional.matching.match",
        "normkit.rl.tool_rewards.turn_rewards",
        "normkit.rl.environments.tools.ToolWorld",
    ),
    Config=Config,
    run=run,
    claims=(*CLAIMS, *MEASURED),
)
