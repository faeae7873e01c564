"""A chat model that learns to search: ``normkit run st-ppo --world language``.

SmolLM2-135M never writes a readable search of its own accord, so that no reward would ever tell its
dialogues apart. It is first shown reference dialogues of training questions (``warm_start`` updates
of supervised learning); what is measured of the methods begins after that.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from normkit.data.searchable import open_world
from normkit.errors import InputError
from normkit.recipes._language import (
    Study,
    conduct,
    open_trainer,
    play_heldout,
    teach,
)
from normkit.report.plots import figure
from normkit.rl.dialogue import Dialogue, finite_mean
from normkit.rl.environments.search import SearchSession
from normkit.rl.trainer import Trainer
from normkit.runs import read_table

if TYPE_CHECKING:
    from normkit.recipes.st_ppo import Config

SCORE = "exact match"
METRICS = ("score", "f1", "found", "answered", "searches", "repeated", "malformed")


class SearchTrainer(Trainer):
    """The trainer, with the means of the world's other metrics among a step's numbers."""

    def update(self, dialogues: Sequence[Dialogue]) -> dict[str, Any]:
        """Credit and train the dialogues; describe how they searched."""
        means = {name: finite_mean([d.scores[name] for d in dialogues]) for name in METRICS}
        return {**means, **super().update(dialogues)}


def run_language(config: Config, folder: Path) -> Mapping[str, Any]:
    """Train a chat model to search, scored on held-out questions before and after."""
    world = open_world(config.asked, config.corpus, config.questions)
    trainer, console = open_trainer(config, folder, world, SCORE, *config.training, SearchTrainer)
    study = Study(
        title=f"normkit run st-ppo: {config.method}, a chat model that searches",
        about=f"{config.method} on {config.model}",
        score=SCORE,
        metrics=METRICS,
        play=partial(play_heldout, count=config.heldout, modes=("greedy", "sampled")),
        tasks="held-out questions",
        plot=plot,
    )
    known = [task for task in world.tasks("train") if world.questions[task].queries]
    if config.warm_start and not known:
        raise InputError("warm_start: no question comes with queries; set --warm-start 0")
    study = teach(trainer, folder, study, console, known, _reference, config.warm_start)
    return conduct(trainer, folder, study, console)


def _reference(session: SearchSession) -> str:
    """The next reply that leads to the answer."""
    question, place = session.question, len(session.actions)
    if place < len(question.queries):
        return f"<search>{question.queries[place]}</search>"
    return f"<answer>{question.answers[0]}</answer>"


def plot(folder: Path) -> None:
    """Answers by step, and what off-policy updates did, by update."""
    steps = read_table(folder)
    updates = read_table(folder, "updates") or steps
    with figure(folder / "plots" / "3_answers.png", columns=2, width=5.0) as (answers, searching):
        _curves(answers, steps, METRICS[:4])
        _curves(searching, steps, METRICS[4:])
        for ax in (answers, searching):
            ax.set(xlabel="step")
        answers.set(title="training dialogues, means", ylim=(-0.02, 1.02))
        searching.set(title="a training dialogue, counts")
    with figure(folder / "plots" / "4_off-policy.png", columns=3, width=4.6) as (clip, bias, grad):
        _curves(clip, updates, ("clip_fraction", "clip_fraction_turn"))
        _curves(bias, updates, ("bias_norm",))
        _curves(grad, updates, ("policy_grad_norm", "corrected_grad_norm"))
        for ax in (clip, bias, grad):
            ax.set(xlabel="update")
        clip.set(title="share of tokens clipped")
        bias.set(title="size of the clipping bias |C|")
        grad.set(title="norm of the gradient")


def _curves(ax: Any, rows: Sequence[Mapping[str, Any]], names: Sequence[str]) -> None:
    """One curve for each column of a table."""
    for name in names:
        label = SCORE if name == "score" else name.replace("_", " ")
        ax.plot(range(1, len(rows) + 1), [r.get(name) for r in rows], marker=".", label=label)
    ax.legend(fontsize=8)
