"""MARS: self-play in games, each turn credited with what its seat still collects.

MARS: Reinforcing Multi-Agent Reasoning of LLMs through Self-Play in Strategic Games (Yuan et al.,
2025), arXiv 2510.15414; from its second version on called MARSHAL.

``R_k = sum_{j>=k} r_j``, ``A_k = R_k - mean R`` over the turns of the same game and the same seat.

Run it::

    normkit run mars                    # small policies in Kuhn, Leduc and Mini Hanabi
    normkit run mars --world language   # SmolLM2-135M plays against itself, twelve minutes
    normkit verify mars --measured      # the paper's statements as checks

Differences from the authors' code: the published estimator, which theirs approaches by two
whitenings over tokens and means over distinct values (docs/papers/mars.md); any number of seats;
the small policies are not pulled to a reference.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from normkit.errors import InputError, check_least
from normkit.recipes._mars_claims import CLAIMS
from normkit.recipes._mars_gradient import ARMS, Arm, Quality, Setting, study
from normkit.recipes._mars_measured import (
    HANABI,
    MEASURED,
    SETTINGS,
    Plan,
    Trial,
    compare,
    compare_hanabi,
    gain,
)
from normkit.recipes._mars_tree import GAMES
from normkit.recipes._trials import keep_each
from normkit.recipes.base import Run, System, check_numbers, from_flags
from normkit.report.plots import error_bars, figure, interval_band
from normkit.rl.trainer_config import TrainerConfig
from normkit.statistics import bootstrap_interval

if TYPE_CHECKING:
    from normkit.rl.rollout import RolloutConfig

Trials = Mapping[str, Mapping[str, Trial]]
Qualities = Mapping[Setting, Mapping[Arm, Quality]]
COLORS = {
    "trajectory": "tab:grey",
    "pooled": "tab:olive",
    "mars": "tab:blue",
    "normalize-then-sum": "tab:red",
    "spiral": "tab:orange",
    "spiral, zero-sum": "tab:brown",
}


@dataclass(frozen=True)
class Config:
    """Flags of ``normkit run mars``.

    Attributes:
        world: "tabular", small policies with exact measures, or "language", a chat model.
        seeds: runs of each arm (this and what follows: tabular).
        tuning_seeds: further runs of each arm and learning rate, to choose the rate.
        updates: of each run.
        batch_games: games of an update.
        rates: learning rates to choose from.
        batches: of the study of gradients.
        hanabi_seeds: runs of each arm in Mini Hanabi.
        hanabi_updates: of each run in Mini Hanabi.
        hanabi_rates: learning rates to choose from in Mini Hanabi.
        model: "smollm2", or any chat model of transformers (this and what follows: language).
        estimator: how turns are credited.
        pool_seats: compare the turns of all seats of a game with one another, as a control.
        steps: rollout-and-update rounds.
        warm_up: updates of imitating random legal moves before them; 0 for none.
        games: games that the model learns from.
        heldout: games that it only plays.
        group_size: games of each kind per step, a dialogue for each seat.
        max_new_tokens: length limit of a reply.
        temperature: that replies are sampled at, in training and in evaluation.
        learning_rate: of AdamW.
        lora_rank: rank of LoRA adapters; 0 trains all weights, as the warm-up does.
        opponents: who the model is measured against, where they can play.
        evaluation_games: games per pairing and seat, before and after.
        seed: of everything.
    """

    world: Literal["tabular", "language"] = "tabular"
    seeds: int = 24
    tuning_seeds: int = 8
    updates: int = 300
    batch_games: int = 64
    rates: tuple[float, ...] = (0.02, 0.03, 0.05, 0.1, 0.2)
    batches: int = 2000
    hanabi_seeds: int = 6
    hanabi_updates: int = 100
    hanabi_rates: tuple[float, ...] = (0.001, 0.002, 0.004)
    model: str = "smollm2"
    estimator: str = "mars"
    pool_seats: bool = False
    steps: int = 8
    warm_up: int = 12
    games: tuple[str, ...] = ("tic_tac_toe", "kuhn_poker", "mini_hanabi")
    heldout: tuple[str, ...] = ("connect_four", "leduc_poker", "simple_hanabi")
    group_size: int = 6
    max_new_tokens: int = 16
    temperature: float = 0.6
    learning_rate: float = 2e-5
    lora_rank: int = 0
    opponents: tuple[str, ...] = ("random", "mcts", "cfr")
    evaluation_games: int = 4
    seed: int = 0

    @property
    def plan(self) -> Plan:
        """What the tabular world compares."""
        return Plan(
            self.seeds,
            self.tuning_seeds,
            self.updates,
            self.rates,
            self.batch_games,
            self.batches,
            self.hanabi_seeds,
            self.hanabi_updates,
            self.hanabi_rates,
        )

    @property
    def training(self) -> TrainerConfig:
        """Options of the trainer; one group a game: turns are compared within a game and seat."""
        return from_flags(TrainerConfig, self, groups=len(self.games))

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
        check_least(self, 2, "batch_games")
        _ = self.plan  # checks the rest of the tabular world
        if not self.games:
            raise InputError("games must name at least one game")
        if len({*self.games, *self.heldout}) < len(self.games) + len(self.heldout):
            raise InputError("games and heldout must name no game twice")
        check_least(self, 1, "evaluation_games")
        check_least(self, 0, "warm_up")
        _ = self.training  # checks itself
        if self.world == "language":
            _ = self.speech
            if self.warm_up and self.lora_rank:
                raise InputError("warm_up trains all weights; with lora_rank it must be 0")
        check_numbers(self)


def run(config: Config, folder: Path) -> Mapping[str, Any]:
    """Compare estimators in small games, or train a chat model by self-play."""
    config.validate()
    if config.world == "language":
        from normkit.recipes._mars_language import run_language

        return run_language(config, folder)
    run = Run(config, folder)
    with run.console.status("estimating gradients"):
        qualities = {s: study(s, config.batches, config.seed) for s in SETTINGS}
    trials: dict[str, dict[str, Trial]] = {}
    made, total = _all_trials(config.plan, config.seed), len(GAMES) * len(ARMS) + len(HANABI)
    for trial in keep_each(run, made, total, "playing", _brief):
        trials.setdefault(trial.game, {})[trial.name] = trial
    plot_poker(trials, folder / "plots" / "1_exploitability.png")
    plot_gradients(qualities, folder / "plots" / "2_gradients.png")
    plot_hanabi(trials["hanabi"], folder / "plots" / "3_hanabi.png")
    return run.finish(summarize(config, trials, qualities, run.seconds))


def _all_trials(plan: Plan, seed: int) -> Iterator[Trial]:
    for game in GAMES:
        yield from compare(plan, game, seed)
    yield from compare_hanabi(plan, seed)


def summarize(
    config: Config, trials: Trials, qualities: Qualities, seconds: float
) -> dict[str, Any]:
    """The table of all arms and games, and a sentence for each comparison with mars."""
    findings = {
        f"{game}, mars over {over}": gain(dict(found), over)
        for game, found in trials.items()
        for over in found
        if over != "mars"
    }
    played = f"{config.updates} updates of {config.batch_games} games"
    return {
        "title": "normkit run mars: self-play with credit by seat",
        "summary": [
            f"{len(GAMES)} games of poker, {len(ARMS)} arms, {config.seeds} seeds, {played}; "
            f"Mini Hanabi, {config.hanabi_seeds} seeds: {seconds:.0f} s; gains are paired by seed, "
            "95% interval",
            *(f"{name}: {found}" for name, found in findings.items()),
        ],
        "table": {
            "columns": ["game", "credit", "rate", "average policy", "last policy", "seat 0 wins"],
            "rows": [
                list(_brief(trial).values())
                for found in trials.values()
                for trial in found.values()
            ],
        },
        "gradients": {
            "columns": ["game", "policy", "games", "credit", "bias", "limit", "variance", "cosine"],
            "rows": [
                [
                    s.game,
                    s.policy,
                    s.games,
                    arm,
                    q.bias,
                    q.limit,
                    _mean(q.variance),
                    _mean(q.cosine),
                ]
                for s, found in qualities.items()
                for arm, q in found.items()
            ],
        },
        "seconds": seconds,
    }


def _brief(trial: Trial) -> dict[str, Any]:
    """A line of the table: exploitability in chips, or points of 4 in Hanabi."""
    poker = bool(trial.last)
    return {
        "game": trial.game,
        "credit": trial.name,
        "rate": trial.rate,
        "average": str(bootstrap_interval(trial.final.tolist())),
        "last": str(bootstrap_interval(trial.final_last.tolist())) if poker else "",
        "wins": f"{sum(trial.wins) / len(trial.wins):.0%}" if poker else "",
    }


def _mean(x: Any) -> float:
    return float(x.mean())


# ----------------------------------------------------------------------- plots


def plot_poker(trials: Trials, path: Path) -> None:
    """Exploitability by games played; bands are 95% intervals of the mean over seeds."""
    with figure(path, columns=3, width=4.6) as axes:
        for ax, game in zip(axes, GAMES, strict=True):
            for name, trial in trials[game].items():
                interval_band(ax, trial.games, trial.curve, COLORS[name], name)
                last = [sum(seeds) / len(seeds) for seeds in trial.last]
                ax.plot(trial.games, last, color=COLORS[name], ls=":", lw=1)
            ax.set(title=f"{game} (dotted: last policy)", xlabel="games played")
            ax.set_ylim(bottom=0)
        axes[0].set_ylabel("exploitability of the average policy")
        axes[0].legend(fontsize=8)


def plot_gradients(qualities: Qualities, path: Path) -> None:
    """Bias, variance and cosine of the estimated gradients, uniform play, batches of 32 games."""
    settings = [s for s in qualities if (s.policy, s.games) == ("uniform", 32)]
    with figure(path, columns=3, width=4.6) as (bias, variance, cosine):
        for place, arm in enumerate(ARMS):
            at = [i + 0.16 * (place - 2) for i in range(len(settings))]
            found = [qualities[s][arm] for s in settings]
            style = {"width": 0.15, "color": COLORS[arm], "label": arm}
            bias.bar(at, [q.bias for q in found], **style)
            bias.scatter(at, [q.limit for q in found], color="black", marker="_", s=60, zorder=3)
            for ax, metric in ((variance, "variance"), (cosine, "cosine")):
                ends = [bootstrap_interval(getattr(q, metric).tolist(), draws=300) for q in found]
                ax.bar(
                    at, [e.mean for e in ends], yerr=error_bars(ends), error_kw={"lw": 0.8}, **style
                )
        bias.set(title="bias over gradient (dashes: of endless games)")
        variance.set(title="variance over squared gradient")
        cosine.set(title="cosine with the exact gradient")
        for ax in (bias, variance, cosine):
            ax.set_xticks(range(len(settings)), [s.game for s in settings])
        bias.legend(fontsize=8)


def plot_hanabi(trials: Mapping[str, Trial], path: Path) -> None:
    """Points of the training games in Mini Hanabi; bands are 95% intervals over seeds."""
    with figure(path, width=6.5) as (ax,):
        for name, trial in trials.items():
            interval_band(ax, trial.games, trial.curve, COLORS[name], name)
        ax.set(title="Mini Hanabi", xlabel="games played", ylabel="points of 4")
        ax.legend(fontsize=8)


SYSTEM = System(
    slug="mars",
    title="MARS: Reinforcing Multi-Agent Reasoning of LLMs through Self-Play in Strategic Games",
    arxiv="2510.15414",
    year=2025,
    tags=("advantages", "multi-turn RL", "self-play", "games"),
    symbols=(
        "normkit.rl.advantage.mars",
        "normkit.rl.environments.games.GameWorld",
        "normkit.rl.environments.games.OpenSpielText",
        "normkit.rl.self_play.evaluate",
        "normkit.rl.self_play.exploitability",
    ),
    Config=Config,
    run=run,
    claims=(*CLAIMS, *MEASURED),
    aliases=("marshal",),
)
