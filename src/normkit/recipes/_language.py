"""The course of a run that trains a chat model: scored, trained, scored again, reported.

A recipe brings the trainer and says what to measure (:class:`Study`). The run folder gets
``before.json``, ``checkpoint/``, ``after.json``, plots, pairs of dialogues, ``results.json`` and
the report; a run that was interrupted goes on from what is there.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console

from normkit.files import write_json
from normkit.recipes.base import finish
from normkit.report.plots import before_after, training_curves
from normkit.rl.checkpoint import has_checkpoint
from normkit.rl.dialogue import Dialogue, finite_mean
from normkit.rl.trainer import Trainer
from normkit.runs import RunLogger, read_json, read_table
from normkit.statistics import bootstrap_interval

_SIDES = ("before", "after")


@dataclass(frozen=True)
class Study:
    """What is measured of a chat model that is trained.

    Attributes:
        title: title of the report.
        about: what is trained, for the first line of the summary.
        score: what the world's ``"score"`` is called.
        metrics: metrics of the world for the table, ``"score"`` among them.
        play: plays the dialogues that are scored before and after, the same tasks in order.
        tasks: what these tasks are called.
        plot: draws further plots of a run folder.
        notes: further lines of the summary.
    """

    title: str
    about: str
    score: str
    metrics: Sequence[str]
    play: Callable[[Trainer], Sequence[Dialogue]]
    tasks: str = "held-out tasks"
    plot: Callable[[Path], None] | None = None
    notes: Sequence[str] = ()


def open_run(config: Any, folder: Path) -> RunLogger:
    """The logger of a run folder, which keeps the configuration that it began with."""
    logger = RunLogger(folder)
    if not (folder / "config.json").exists():
        logger.config(config)
    return logger


def tell_lessons(console: Console, what: str, losses: Sequence[float]) -> None:
    """Print what the updates of a warm start did; ``losses`` are theirs."""
    course = f"{losses[0]:.2f} to {losses[-1]:.2f} nats a token"
    console.print(f"{len(losses)} updates on {what}: {course}", highlight=False)


def progress(console: Console, score: str) -> Callable[[str, Mapping[str, Any]], None]:
    """What a trainer reports to: one line a step."""

    def report(_phase: str, numbers: Mapping[str, Any]) -> None:
        rewards = " ".join(f"{r:+.2f}" for r in numbers["reward_by_turn"])
        line = (
            f"step {numbers['step']}/{numbers['steps']}  {score} {numbers['score']:.3f}  reward by "
            f"turn {rewards}  grad {numbers['grad_norm']:.2f}  "
            f"{numbers['rollout_seconds']:.0f} + {numbers['update_seconds']:.0f} s"
        )
        console.print(line, highlight=False, soft_wrap=True)

    return report


def conduct(
    trainer: Trainer, logger: RunLogger, study: Study, console: Console
) -> Mapping[str, Any]:
    """Score, train the remaining steps, score again, and report.

    Args:
        trainer: the trainer.
        logger: the run folder's (:func:`open_run`), which the trainer has too.
        study: what to measure.
        console: where progress is shown.

    Returns:
        What ``results.json`` holds: title, summary, table, gains and seconds of this process.
    """
    started, folder = time.perf_counter(), logger.folder
    if not (folder / "before.json").exists():
        evaluate(trainer, folder, "before", study, console)
    if has_checkpoint(folder / "checkpoint"):
        trainer.resume(folder / "checkpoint")
        console.print(f"resumed after step {trainer.step}")
    trainer.train(folder / "checkpoint")
    evaluate(trainer, folder, "after", study, console)
    results = _summarize(trainer, folder, study, time.perf_counter() - started)
    return finish(logger, results, console)


def play_heldout(trainer: Trainer, count: int) -> list[Dialogue]:
    """Play so many of the held-out tasks, spread over all that there are, greedily."""
    world, rollout = trainer.environment, trainer.rollout
    names = world.tasks("heldout")
    chosen = names[:: max(1, len(names) // count)][:count]
    rollout.sync(trainer.model)
    greedy = rollout.with_config(replace(rollout.config, greedy=True))
    return greedy.run(world, [(task, i, i) for i, task in enumerate(chosen)])


def evaluate(trainer: Trainer, folder: Path, name: str, study: Study, console: Console) -> float:
    """Play, write ``<name>.json``, and return the mean score."""
    with console.status(f"{study.tasks} {name} training"):
        dialogues = study.play(trainer)
    write_json(folder / f"{name}.json", {"dialogues": [_record(d) for d in dialogues]})
    mean = finite_mean([d.scores["score"] for d in dialogues])
    console.print(f"{name} training: {study.score} of {study.tasks} {mean:.3f}", highlight=False)
    return mean


def _summarize(trainer: Trainer, folder: Path, study: Study, seconds: float) -> dict[str, Any]:
    """Compare the two evaluations; write the plots and three pairs of dialogues."""
    sides = [read_json(folder, f"{name}.json")["dialogues"] for name in _SIDES]
    rows, gains = [], {}
    for metric in study.metrics:
        values = [[d["scores"][metric] for d in side] for side in sides]
        pairs = [(a, b) for a, b in zip(*values, strict=True) if a is not None and b is not None]
        if not pairs:
            continue
        gain = bootstrap_interval([b - a for a, b in pairs])
        gains[metric] = str(gain)
        rows.append([metric, *(sum(p[i] for p in pairs) / len(pairs) for i in (0, 1)), str(gain)])
    plots = folder / "plots"
    scores = [[d["scores"]["score"] or 0.0 for d in side] for side in sides]
    training_curves(read_table(folder), plots / "1_training.png", study.score)
    before_after(scores[0], scores[1], plots / "2_held-out.png", study.score, study.tasks)
    if study.plot is not None:
        study.plot(folder)
    _write_pairs(folder, *sides)
    config = trainer.config
    return {
        "title": study.title,
        "summary": [
            f"{study.about}: {config.steps} steps of {config.groups} x {config.group_size} "
            f"dialogues, {seconds / 60:.1f} minutes",
            f"{study.score} of {len(scores[0])} {study.tasks}, paired gain "
            f"{gains.get('score', 'unknown')}",
            *study.notes,
        ],
        "table": {"columns": ["metric", "before", "after", "paired gain"], "rows": rows},
        "gains": gains,
        "seconds": seconds,
    }


def _record(dialogue: Dialogue) -> dict[str, Any]:
    turns = [{"message": t.message, "reply": t.reply, "reward": t.reward} for t in dialogue.turns]
    return {"task": dialogue.task, "scores": dialogue.scores, "turns": turns}


def _write_pairs(folder: Path, before: Sequence[Any], after: Sequence[Any]) -> None:
    """The dialogues that gained most, in the middle, and least, side by side."""

    def gain(i: int) -> float:
        return (after[i]["scores"]["score"] or 0.0) - (before[i]["scores"]["score"] or 0.0)

    def side(record: Mapping[str, Any]) -> dict[str, Any]:
        return {"score": record["scores"]["score"], "turns": record["turns"]}

    order = sorted(range(len(before)), key=gain)
    # Fewer than three tasks give fewer pairs.
    chosen = dict.fromkeys((order[-1], order[len(order) // 2], order[0]))
    (folder / "pairs.jsonl").unlink(missing_ok=True)
    RunLogger(folder, tensorboard=False).append(
        "pairs",
        [
            {"task": before[i]["task"], "before": side(before[i]), "after": side(after[i])}
            for i in chosen
        ],
    )
