"""A chat model that learns small games from itself: ``normkit run mars --world language``.

A small model does not find the form of a reply by itself; the warm-up shows it replies that are
legal and otherwise random, so that what is compared before and after knows the form and no more.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from normkit.recipes._language import Played, Study, conduct, open_trainer, tell_lessons
from normkit.report.plots import error_bars, figure
from normkit.rl.chat_format import ChatFormat
from normkit.rl.checkpoint import has_checkpoint
from normkit.rl.dialogue import Dialogue
from normkit.rl.environments.arena import Arena, pairings
from normkit.rl.environments.game_policy import LanguagePolicy
from normkit.rl.environments.games import GameSession, GameWorld
from normkit.rl.imitation import imitate, write_dialogues
from normkit.rl.self_play import exploitability
from normkit.rl.trainer import Trainer
from normkit.runs import read_json
from normkit.statistics import Interval, bootstrap_interval

if TYPE_CHECKING:
    from normkit.recipes.mars import Config

SCORE = "return"
_LESSONS = 32
"""Random games of each kind that the warm-up shows."""

EXACT = "kuhn_poker"
"""The game whose exploitability is computed: 12 states to ask the model in."""


def run_language(config: Config, folder: Path) -> Mapping[str, Any]:
    """Train a chat model by self-play; play it against fixed opponents before and after."""
    world = GameWorld(config.games, heldout=())
    arena = Arena(pairings((*config.games, *config.heldout), config.opponents))
    labels = arena.tasks("train")
    kind = _PooledTrainer if config.pool_seats else Trainer
    trainer, console = open_trainer(config, folder, world, SCORE, config.training, kind=kind)
    if config.warm_up and not has_checkpoint(folder / "checkpoint"):
        with console.status("imitating random legal moves"):
            losses = _warm_up(trainer.model, trainer.rollout.format, config)
        tell_lessons(console, "random legal moves", losses)
    credit = f"{config.estimator}{', seats pooled' if config.pool_seats else ''}"
    study = Study(
        title=f"normkit run mars: {credit}, self-play in {len(config.games)} games",
        about=f"{credit} on {config.model}, {config.warm_up} updates of warm-up",
        score=SCORE,
        metrics=("score", "illegal", *labels, f"exploitability in {EXACT}", "legal share there"),
        play=partial(_play, arena=arena, count=config.evaluation_games),
        tasks="games against fixed opponents",
        plot=partial(_plot, labels=labels),
        notes=["returns in the game's own points; an illegal move loses the stake"],
    )
    return conduct(trainer, folder, study, console)


class _PooledTrainer(Trainer):
    """Compares the turns of all seats of a game with one another: the control."""

    def update(self, dialogues: Sequence[Dialogue]) -> dict[str, Any]:
        return super().update([replace(dialogue, agent=0) for dialogue in dialogues])


class _Lessons(GameWorld):
    """Games against a random player, each start another deal."""

    dealt = 0

    def start(self, task: str, seed: int) -> GameSession:
        self.dealt += 1
        return super().start(task, self.dealt)


def _warm_up(model: Any, form: ChatFormat, config: Config) -> list[float]:
    """Show the model legal replies that are random otherwise; return the losses of the updates."""
    numbers = np.random.default_rng([config.seed, 1])

    def random_move(session: GameSession) -> str:
        moves = list(session.match.text.legal())
        return f"<answer>{moves[numbers.integers(len(moves))]}</answer>"

    world = _Lessons(config.games, heldout=(), opponent="random")
    lessons = write_dialogues(world, list(config.games) * _LESSONS, random_move, form)
    return imitate(model, lessons, config.warm_up, batch=8, seed=config.seed)


# ---------------------------------------------------------------------- evaluation


def _play(trainer: Trainer, arena: Arena, count: int) -> Played:
    """Play every pairing with the training's own sampling; each has a column of its own.

    Of a game that the model plays with itself one seat is kept: all get the same.
    """
    trainer.rollout.sync(trainer.model)
    labels = arena.tasks("train")
    tasks = [(label, i, seed) for i, label in enumerate(labels) for seed in range(count)]
    played = trainer.rollout.run(arena, tasks)
    kept = [d for d in played if d.agent == 0 or " with itself" not in d.task]
    policy = LanguagePolicy(trainer.model, trainer.tokenizer, trainer.rollout.config.temperature)
    exact = exploitability(policy, EXACT)
    legal = sum(policy.legal.values()) / len(policy.legal)
    for number, dialogue in enumerate(kept):
        columns = dict.fromkeys(labels, math.nan)
        columns[dialogue.task] = dialogue.scores["score"]
        # Figures of the policy, not of a game: they stand once.
        columns[f"exploitability in {EXACT}"] = math.nan if number else exact
        columns["legal share there"] = math.nan if number else legal
        dialogue.scores.update(columns)
    return {"sampled": kept}


def _plot(folder: Path, labels: Sequence[str]) -> None:
    """Mean return of every pairing before and after, with 95% intervals."""
    sides = [read_json(folder, f"{name}.json")["sampled"] for name in ("before", "after")]
    with figure(folder / "plots" / "3_opponents.png", width=8.0) as (ax,):
        ax.figure.set_figheight(1.0 + 0.3 * len(labels))
        for shift, color, name, side in zip(
            (-0.17, 0.17), ("grey", "tab:blue"), ("before", "after"), sides, strict=True
        ):
            for place, mean in _means(side, labels):
                ax.errorbar(
                    mean.mean,
                    place + shift,
                    xerr=error_bars([mean]),
                    color=color,
                    marker="o",
                    markersize=4,
                    label=name if place == 0 else None,
                )
        ax.axvline(0, color="black", lw=0.6)
        ax.set_yticks(range(len(labels)), labels, fontsize=8)
        ax.invert_yaxis()
        ax.set(title="games against fixed opponents", xlabel="mean return")
        ax.legend(fontsize=8)


def _means(side: Sequence[Any], labels: Sequence[str]) -> Iterator[tuple[int, Interval]]:
    for place, label in enumerate(labels):
        values = [d["scores"]["score"] for d in side if d["task"] == label]
        yield place, bootstrap_interval(values)
