"""ST-PPO: importance ratios per turn, and gradients divided by what clipping threw away.

ST-PPO: Stabilized Off-Policy Proximal Policy Optimization for Multi-Turn Agents Training (Li et
al., 2025), arXiv 2511.20718; from its second version on Stabilizing Off-Policy Training for
Long-Horizon LLM Agent via Turn-Level Importance Sampling and Clipping-Triggered Normalization
(SORL, with SO-PPO and SO-GRPO).

``w_k = exp(mean over the turn's tokens of log pi - log pi_old)``, ``g <- g / |C|``, C being the
part of the gradient that clipping takes away.

Run it::

    normkit run st-ppo                     # a chain where the truth is known: Lemma 4.2, 32 seeds
    normkit run st-ppo --world search      # recurrent policies that search, four stalenesses
    normkit run st-ppo --world language    # a chat model searches
    normkit verify st-ppo --measured       # the paper's statements as checks

There is no authors' code. The division needs a floor, which is ours: see docs/papers/st-ppo.md.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from normkit.errors import InputError, check_least
from normkit.recipes._st_ppo_arms import ARMS
from normkit.recipes._st_ppo_claims import CLAIMS
from normkit.recipes._st_ppo_comparison import CHAIN, SEARCH, Plan, Trial, chain, search
from normkit.recipes._st_ppo_measured import (
    MEASURED,
    difference,
    exponential_growth,
    falls,
    tracks,
)
from normkit.recipes._st_ppo_plots import (
    plot_courses,
    plot_lags,
    plot_lemma,
    plot_rates,
    plot_staleness,
)
from normkit.recipes._st_ppo_recurrent import EVERY
from normkit.recipes._trials import keep_each
from normkit.recipes.base import Finding, Run, System, check_numbers, flags_of, from_flags, table
from normkit.rl.environments.search import SearchWorldConfig
from normkit.rl.environments.search_questions import HOPS
from normkit.rl.loss import PolicyLossConfig
from normkit.rl.presets import preset
from normkit.rl.trainer_config import TrainerConfig
from normkit.statistics import bootstrap_interval

if TYPE_CHECKING:
    from normkit.rl.rollout import RolloutConfig

_HOT = "rate too large"
HITS = 2
"""Passages that a search shows a chat model: prompts are what takes the time."""


@dataclass(frozen=True)
class Config:
    """Flags of ``normkit run st-ppo``.

    Attributes:
        world: "tabular", a chain of hops in which true advantages are known; "search", recurrent
            policies that search; "language", a chat model that does.
        seeds: runs of each method; 32 in the chain and 10 in search if not given (the small worlds:
            this and the next four).
        tuning_seeds: further runs to choose each method's learning rate; 6 and 8.
        updates: of each run; 512 and 256.
        rates: learning rates to choose from.
        staleness: updates per batch; 64, and in search 1, 4, 16 and 64.
        model: "smollm2", or any chat model of transformers (language: this and what follows).
        method: of :mod:`normkit.rl.presets`.
        corpus: what is searched: "land", "wordnet" or a file of passages.
        questions: questions about a file; the last third is held out.
        hops: questions that need so many passages; empty for all.
        reward: what an answer earns: exact match or F1.
        bonus: for finding all needed passages, in sum.
        warm_start: updates of supervised learning first; 0 for none.
        steps: rollout-and-update rounds.
        groups: questions per step.
        group_size: dialogues per question.
        mini_batches: updates that a batch of dialogues is split into.
        epochs: passes over a batch.
        max_turns: a dialogue ends here.
        max_new_tokens: length limit of a reply.
        learning_rate: of AdamW.
        lora_rank: rank of LoRA adapters; 0 trains all weights.
        heldout: held-out questions to score before and after.
        seed: of everything.
    """

    world: Literal["tabular", "search", "language"] = "tabular"
    seeds: int | None = None
    tuning_seeds: int | None = None
    updates: int | None = None
    rates: tuple[float, ...] = ()
    staleness: tuple[int, ...] = ()
    model: str = "smollm2"
    method: str = "st-ppo"
    corpus: str = "land"
    questions: Path | None = None
    hops: tuple[int, ...] = (1,)
    reward: Literal["em", "f1"] = "em"
    bonus: float = 0.0
    warm_start: int = 12
    steps: int = 8
    groups: int = 12
    group_size: int = 4
    mini_batches: int = 3
    epochs: int = 1
    max_turns: int = 4
    max_new_tokens: int = 40
    learning_rate: float = 2e-5
    lora_rank: int = 0
    heldout: int = 40
    seed: int = 0

    @property
    def plan(self) -> Plan:
        """What the small worlds compare."""
        names = ("seeds", "tuning_seeds", "updates", "rates", "staleness")
        given = {name: getattr(self, name) for name in names}
        known = SEARCH if self.world == "search" else CHAIN
        return replace(known, **{k: v for k, v in given.items() if v not in (None, ())})

    @property
    def asked(self) -> SearchWorldConfig:
        """Options of the world of the chat model."""
        return from_flags(SearchWorldConfig, self, hits=HITS)

    @property
    def training(self) -> tuple[TrainerConfig, PolicyLossConfig]:
        """Options of the trainer and of the loss."""
        return preset(self.method, **flags_of(TrainerConfig, self), micro_batch_tokens=1024)

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
        if self.world == "tabular" and len(self.plan.staleness) > 1:
            raise InputError(f"staleness must be one number in the chain, got {self.staleness}")
        if self.questions is None and not set(self.hops) <= set(HOPS):
            raise InputError(f"hops must be among {HOPS}, got {self.hops}")
        check_least(self, 1, "heldout")
        check_least(self, 0, "warm_start")
        _ = self.plan, self.asked, self.training  # check themselves
        if self.world == "language":
            _ = self.speech
        check_numbers(self)


def run(config: Config, folder: Path) -> Mapping[str, Any]:
    """Take off-policy updates apart, compare methods at several stalenesses, or train a model."""
    config.validate()
    if config.world == "language":
        from normkit.recipes._st_ppo_language import run_language

        return run_language(config, folder)
    run = Run(config, folder)
    results = (_chain if config.world == "tabular" else _search)(config, run)
    results["seconds"] = run.seconds
    results["summary"].insert(0, f"{config.plan.seeds} seeds, {run.seconds:.0f} s")
    return run.finish(results)


def _chain(config: Config, run: Run) -> dict[str, Any]:
    plan = config.plan
    kept = keep_each(run, chain(plan, config.seed), len(ARMS), "the chain", _brief)
    found = {trial.name: trial for trial in kept}
    ppo, plots = found["PPO"], run.folder / "plots"
    plot_lemma(ppo, plots / "1_terms_of_PPO.png")
    plot_lemma(found["ST-PPO"], plots / "2_terms_of_ST-PPO.png")
    plot_lags(list(found.values()), plots / "3_all_methods_by_updates_since_sampling.png")
    title = f"{plan.staleness[0]} updates per batch"
    plot_courses({title: list(found.values())}, plots / "4_learning.png", 1, "expected reward")
    findings = {
        "PPO's clipping bias grows": falls(ppo, "bias", -1),
        "and exponentially rather than as a power": exponential_growth(ppo),
        "the critic's part of the error grows": falls(ppo, "critic", -1),
        "clipping bias and critic's error rise together": tracks(ppo),
        "the cosine with the exact gradient falls": falls(ppo, "cosine"),
        **{
            f"{more} over {less}, in the mean over the course": difference(
                found[more], found[less], "mean"
            )
            for more, less in (("Turn-PPO", "PPO"), ("S-PPO", "PPO"), ("ST-PPO", "Turn-PPO"))
        },
    }
    return {
        "title": "normkit run st-ppo: off-policy updates, term by term",
        "summary": _sentences(findings),
        "table": table(map(_brief, found.values())),
    }


def _search(config: Config, run: Run) -> dict[str, Any]:
    plan = config.plan
    settings: list[str] = [f"{s} updates per batch" for s in plan.staleness]
    settings += [_HOT] if plan.hot is not None else []
    found: dict[str, list[Trial]] = {setting: [] for setting in settings}
    rounds = itertools.chain.from_iterable(search(plan, config.seed))
    kept = keep_each(run, rounds, len(settings) * len(ARMS), "searching", _brief)
    for i, trial in enumerate(kept):
        found[settings[i // len(ARMS)]].append(trial)
    plots = run.folder / "plots"
    by_staleness = dict(zip(plan.staleness, found.values(), strict=False))
    stalest = by_staleness[plan.staleness[-1]]
    label = "exact match, held-out questions"
    plot_staleness(by_staleness, plots / "1_by_staleness.png")
    plot_courses(found, plots / "2_learning.png", EVERY, label)
    plot_rates(stalest, plots / "3_by_learning_rate.png")
    plot_lags(stalest, plots / "4_by_updates_since_sampling.png")
    if plan.hot is not None:
        plot_lags(found[_HOT], plots / "5_the_same,_rate_too_large.png")
    findings = {}
    for setting in (settings[len(plan.staleness) - 1], *settings[len(plan.staleness) :]):
        trials = {trial.name: trial for trial in found[setting]}
        for more, less, metric, words in (
            ("S-PPO", "PPO", "final", "end"),
            ("ST-PPO", "PPO", "final", "end"),
            ("ST-PPO", "S-PPO", "final", "end"),
            ("PPO", "S-PPO", "drop", "largest fall"),
            ("PPO", "ST-PPO", "drop", "largest fall"),
            ("PPO", "ST-PPO", "clipped", "clipped tokens"),
        ):
            name = f"{setting}: {more} over {less}, {words}"
            findings[name] = difference(trials[more], trials[less], metric)
    return {
        "title": "normkit run st-ppo: stale data in the search world",
        "summary": _sentences(findings),
        "table": table(_brief(trial) for trials in found.values() for trial in trials),
    }


def _sentences(findings: Mapping[str, Finding]) -> list[str]:
    return [f"{name}: {f}" for name, f in findings.items()]


def _brief(trial: Trial) -> dict[str, Any]:
    metrics = {
        "end": "final",
        "mean": "mean",
        "largest fall": "drop",
        "clipped": "clipped",
        "clipping bias": "bias",
        "gradient, 99%": "tail",
    }
    return {
        "method": trial.name,
        "staleness": trial.staleness,
        "rate": trial.rate,
        **{
            title: str(bootstrap_interval(trial.values(metric).tolist()))
            for title, metric in metrics.items()
        },
    }


SYSTEM = System(
    slug="st-ppo",
    title="ST-PPO: Stabilized Off-Policy Proximal Policy Optimization for Multi-Turn Agents "
    "Training",
    arxiv="2511.20718",
    year=2025,
    tags=("advantages", "gradients", "multi-turn RL", "search"),
    symbols=(
        "normkit.rl.loss.policy_loss",
        "normkit.rl.loss.complementary_loss",
        "normkit.optim.ClippingBias",
        "normkit.rl.critic.ValueHead",
        "normkit.rl.presets.preset",
        "normkit.rl.environments.search.SearchWorld",
    ),
    Config=Config,
    run=run,
    claims=(*CLAIMS, *MEASURED),
    aliases=("so-ppo",),
)
