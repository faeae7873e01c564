"""The course of a run that trains a chat model: scored, trained, scored again, reported.

A recipe brings the trainer and says what to measure (:class:`Study`). The run folder gets
``before.json``, ``checkpoint/``, ``after.json``, plots, pairs of dialogues, ``results.json`` and
the report; a run that was interrupted goes on from what is there. Under torchrun every process
plays and trains; the first one alone writes and speaks.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, TypeAlias

from rich.console import Console

from normkit.files import write_json
from normkit.recipes.base import finish
from normkit.report.plots import before_after, training_curves
from normkit.rl.checkpoint import has_checkpoint
from normkit.rl.dialogue import Dialogue, finite_mean
from normkit.rl.environment import Environment
from normkit.rl.imitation import imitate, write_dialogues
from normkit.rl.loss import PolicyLossConfig
from normkit.rl.trainer import Trainer
from normkit.rl.trainer_config import TrainerConfig
from normkit.runs import RunLogger, process_rank, read_json, read_table
from normkit.statistics import Interval, bootstrap_interval

_SIDES = ("before", "after")
_LESSON = 1e-4
"""Learning rate of a warm start."""

Played: TypeAlias = Mapping[str, Sequence[Dialogue]]
"""Dialogues by how their replies were chosen, "greedy" or "sampled"; the headline comes first."""


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
    play: Callable[[Trainer], Played]
    tasks: str = "held-out tasks"
    plot: Callable[[Path], None] | None = None
    notes: Sequence[str] = ()


@dataclass(frozen=True)
class _Change:
    """Means over the tasks that have a value on both sides, and the paired gain."""

    before: float
    after: float
    gain: Interval


def open_run(config: Any, folder: Path) -> tuple[RunLogger | None, Console]:
    """The logger of a run folder, which keeps the configuration that it began with, and a console.

    In all processes but the first there is no logger, and the console is quiet.
    """
    if process_rank() != 0:
        return None, Console(quiet=True)
    logger = RunLogger(folder)
    logger.go_on(config)
    return logger, Console()


def open_trainer(
    config: Any,
    folder: Path,
    world: Environment[Any],
    score: str,
    training: TrainerConfig,
    loss: PolicyLossConfig | None = None,
    kind: type[Trainer] = Trainer,
) -> tuple[Trainer, Console]:
    """Open a run folder, load the run's model, and give it a trainer that tells its progress.

    Args:
        config: the recipe's, with ``model`` and ``speech``.
        folder: the run folder.
        world: what the model is trained in.
        score: what the world's ``"score"`` is called.
        training: options of the trainer.
        loss: options of the loss.
        kind: the trainer's class.

    Returns:
        The trainer, and the console of :func:`open_run`.
    """
    from normkit.rl.models import load_policy

    logger, console = open_run(config, folder)
    with console.status(f"loading {config.model}"):
        model, tokenizer = load_policy(config.model)
    report = progress(console, score)
    trainer = kind(model, tokenizer, world, training, config.speech, loss, logger, report)
    return trainer, console


def tell_lessons(console: Console, what: str, losses: Sequence[float]) -> None:
    """Print what the updates of a warm start did; ``losses`` are theirs."""
    course = f"{losses[0]:.2f} to {losses[-1]:.2f} nats a token"
    console.print(f"{len(losses)} updates on {what}: {course}", highlight=False)


def progress(console: Console, score: str) -> Callable[[str, Mapping[str, Any]], None]:
    """What a trainer reports to: one line a step, and one for each evaluation on the way."""
    spent: list[float] = []

    def report(phase: str, numbers: Mapping[str, Any]) -> None:
        step, steps = numbers["step"], numbers["steps"]
        line = f"step {step}/{steps}  {score} {numbers['score']:.4g}"
        if phase == "evaluate":
            console.print(f"{line} of held-out tasks", highlight=False)
            return
        spent.append(numbers["rollout_seconds"] + numbers["update_seconds"])
        left = sum(spent[-5:]) / len(spent[-5:]) * (steps - step)
        rewards = " ".join(f"{r:+.2f}" for r in numbers["reward_by_turn"])
        console.print(
            f"{line}  reward by turn {rewards}  clip {numbers['clip_fraction']:.2f}  "
            f"kl {numbers['sampling_kl']:.4f}  grad {numbers['grad_norm']:.2f}  "
            f"{numbers['sampled_tokens_per_second']:.0f} + "
            f"{numbers['trained_tokens_per_second']:.0f} tokens/s  {left / 60:.1f} min left",
            highlight=False,
            soft_wrap=True,
        )

    return report


def teach(
    trainer: Trainer,
    folder: Path,
    study: Study,
    console: Console,
    tasks: Sequence[str],
    write: Callable[[Any], str],
    updates: int,
) -> Study:
    """Score the model as it comes, then show it dialogues of training tasks that a rule writes.

    A run that has a checkpoint, or takes no ``updates``, is left as it is.

    Args:
        trainer: the trainer, before :func:`conduct`.
        folder: the run folder; gets ``untaught.json``.
        study: what to measure.
        console: where progress is shown.
        tasks: tasks that are shown.
        write: the right reply to a session as it stands.
        updates: of supervised learning on these replies.

    Returns:
        The study, with a note on what the model was shown and how it did before.
    """
    if not updates:
        return study
    if not has_checkpoint(folder / "checkpoint"):
        if not (folder / "untaught.json").exists():
            evaluate(trainer, folder, "untaught", study, console)
        lessons = write_dialogues(trainer.environment, tasks, write, trainer.rollout.format)
        with console.status("imitating reference dialogues"):
            seed = trainer.config.seed
            losses = imitate(trainer.model, lessons, updates, learning_rate=_LESSON, seed=seed)
        tell_lessons(console, "reference dialogues", losses)
    untaught = [d["scores"]["score"] for d in read_json(folder, "untaught.json")["greedy"]]
    note = (
        f"{updates} updates of supervised learning on reference dialogues of training tasks came "
        f"first; without them {study.score} is {finite_mean(untaught):.3f}"
    )
    return replace(study, notes=(*study.notes, note))


def conduct(trainer: Trainer, folder: Path, study: Study, console: Console) -> Mapping[str, Any]:
    """Score, train the remaining steps, score again, and report.

    Args:
        trainer: the trainer, with the logger and the progress of the run.
        folder: the run folder.
        study: what to measure.
        console: where progress is shown.

    Returns:
        What ``results.json`` holds: title, summary, table, gains and seconds of this process;
        nothing in a process without a logger.
    """
    started = time.perf_counter()
    if not (folder / "before.json").exists():
        evaluate(trainer, folder, "before", study, console)
    if has_checkpoint(folder / "checkpoint"):
        trainer.resume(folder / "checkpoint")
        console.print(f"resumed after step {trainer.step}")
    trainer.train(folder / "checkpoint", folder / "best")
    evaluate(trainer, folder, "after", study, console)
    if trainer.logger is None:
        return {}
    results = _summarize(trainer, trainer.logger, study, time.perf_counter() - started)
    return finish(trainer.logger, results, console)


def play_heldout(trainer: Trainer, count: int, modes: Sequence[str] = ("greedy",)) -> Played:
    """Play so many of the held-out tasks, spread over all that there are.

    Args:
        trainer: the trainer.
        count: tasks.
        modes: how replies are chosen, "greedy" or "sampled" as in training.
    """
    world, rollout = trainer.environment, trainer.rollout
    names = world.tasks("heldout")
    chosen = names[:: max(1, len(names) // count)][:count]
    tasks = [(task, i, i) for i, task in enumerate(chosen)]
    rollout.sync(trainer.model)
    played = {}
    for mode in modes:
        player = rollout.with_config(replace(rollout.config, greedy=mode == "greedy"))
        played[mode] = player.run(world, tasks)
    return played


def evaluate(trainer: Trainer, folder: Path, name: str, study: Study, console: Console) -> None:
    """Play, write ``<name>.json``, and print the mean score."""
    with console.status(f"{name}: playing {study.tasks}"):
        played = study.play(trainer)
    if trainer.logger is not None:
        records = {mode: [_record(d) for d in side] for mode, side in played.items()}
        write_json(folder / f"{name}.json", records)
    for mode, side in played.items():
        mean = finite_mean([d.scores["score"] for d in side])
        line = f"{name}: {study.score} of {len(side)} {study.tasks}, {mode}: {mean:.4g}"
        console.print(line, highlight=False)


def _summarize(trainer: Trainer, logger: RunLogger, study: Study, seconds: float) -> dict[str, Any]:
    """Compare the two evaluations; write the plots and three pairs of dialogues."""
    folder, steps = logger.folder, read_table(logger.folder)
    before, after = (read_json(folder, f"{name}.json") for name in _SIDES)
    changes = {
        (mode, metric): change
        for mode in before
        for metric in study.metrics
        if (change := _change(before[mode], after[mode], metric)) is not None
    }
    headline = next(iter(before))
    pairs = [
        pair
        for pair in zip(before[headline], after[headline], strict=True)
        if all(record["scores"]["score"] is not None for record in pair)
    ]
    training_curves(steps, folder / "plots" / "1_training.png", study.score)
    if pairs:
        scores = [[pair[i]["scores"]["score"] for pair in pairs] for i in (0, 1)]
        plot = folder / "plots" / "2_held-out.png"
        before_after(scores[0], scores[1], plot, study.score, study.tasks)
    if study.plot is not None:
        study.plot(folder)
    _write_pairs(logger, pairs)
    config = trainer.config
    pace = finite_mean([row["rollout_seconds"] + row["update_seconds"] for row in steps])
    masked = sum(row["masked_turns"] for row in steps)
    return {
        "title": study.title,
        "summary": [
            f"{study.about}: {len(steps)} steps of {config.groups} x {config.group_size} "
            f"dialogues, {pace:.1f} s a step, {seconds / 60:.1f} minutes",
            *(
                f"{study.score} of {len(before[mode])} {study.tasks}, {mode}: {change.before:.4g} "
                f"to {change.after:.4g}, paired gain {change.gain}"
                for (mode, metric), change in changes.items()
                if metric == "score"
            ),
            *([f"{masked} turns got no verdict and taught nothing"] if masked else []),
            *study.notes,
        ],
        "table": {
            "columns": ["replies", "metric", "before", "after", "paired gain"],
            "rows": [[*key, c.before, c.after, str(c.gain)] for key, c in changes.items()],
        },
        "gains": {f"{mode} {metric}": asdict(c) for (mode, metric), c in changes.items()},
        "seconds": seconds,
    }


def _change(before: Sequence[Any], after: Sequence[Any], metric: str) -> _Change | None:
    """How a metric changed; None where no task has a value on both sides."""
    values = [[record["scores"][metric] for record in side] for side in (before, after)]
    pairs = [(a, b) for a, b in zip(*values, strict=True) if a is not None and b is not None]
    if not pairs:
        return None
    first, last = (sum(pair[i] for pair in pairs) / len(pairs) for i in (0, 1))
    return _Change(first, last, bootstrap_interval([b - a for a, b in pairs]))


def _record(dialogue: Dialogue) -> dict[str, Any]:
    turns = [{"message": t.message, "reply": t.reply, "reward": t.reward} for t in dialogue.turns]
    return {"task": dialogue.task, "scores": dialogue.scores, "turns": turns}


def _write_pairs(logger: RunLogger, pairs: Sequence[tuple[Any, Any]]) -> None:
    """The dialogues that gained most, in the middle, and least, side by side."""

    def side(record: Mapping[str, Any]) -> dict[str, Any]:
        return {"score": record["scores"]["score"], "turns": record["turns"]}

    order = sorted(pairs, key=lambda pair: pair[1]["scores"]["score"] - pair[0]["scores"]["score"])
    # Fewer than three tasks give fewer pairs.
    places = dict.fromkeys((len(order) - 1, len(order) // 2, 0)) if order else ()
    rows = [
        {"task": a["task"], "before": side(a), "after": side(b)}
        for a, b in (order[place] for place in places)
    ]
    (logger.folder / "pairs.jsonl").unlink(missing_ok=True)
    logger.append("pairs", rows)
