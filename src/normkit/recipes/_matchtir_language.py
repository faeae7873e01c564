"""A chat model in the tool world: ``normkit run matchtir --world language``."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from normkit.files import write_json
from normkit.report.page import write_report
from normkit.report.plots import before_after, training_curves
from normkit.rl.dialogue import Dialogue
from normkit.rl.environments.tools import ToolWorld, ToolWorldConfig, settle
from normkit.rl.tool_rewards import MatchOptions
from normkit.rl.trainer import Trainer, TrainerConfig
from normkit.runs import RunLogger, read_json, read_table
from normkit.statistics import bootstrap_interval

if TYPE_CHECKING:
    from normkit.recipes.matchtir import Config

METRICS = ("score", "answer", "calls", "repeated", "wrong", "unreadable")


class ToolTrainer(Trainer):
    """The trainer, paying turns by the matching of all calls of their finished dialogue."""

    def update(self, dialogues: Sequence[Dialogue]) -> dict[str, Any]:
        """Settle the dialogues' rewards, then credit and train them."""
        for dialogue in dialogues:
            settle(dialogue)
        return super().update(dialogues)


def run_language(config: Config, folder: Path) -> Mapping[str, Any]:
    """Train a chat model on questions that need tools, scored on held-out ones before and after."""
    from normkit.rl.models import load_policy
    from normkit.rl.rollout import RolloutConfig

    started = time.perf_counter()
    console = Console()
    logger = RunLogger(folder)
    if not (folder / "config.json").exists():
        logger.config(config)
    world = ToolWorld(
        ToolWorldConfig(
            max_turns=config.max_turns,
            reward="outcome" if config.estimator == "grpo" else "matched",
            matching=MatchOptions(config.matching, reg=config.reg),
        )
    )
    with console.status(f"loading {config.model}"):
        model, tokenizer = load_policy(config.model)
    trainer = ToolTrainer(
        model,
        tokenizer,
        world,
        TrainerConfig(
            steps=config.steps,
            groups=config.groups,
            group_size=config.group_size,
            estimator=config.estimator,
            learning_rate=config.learning_rate,
            lora_rank=config.lora_rank,
            seed=config.seed,
        ),
        RolloutConfig(max_new_tokens=config.max_new_tokens),
        logger=logger,
        report=lambda _phase, n: console.print(_line(n), highlight=False, soft_wrap=True),
    )
    if not (folder / "before.json").exists():
        _evaluate(trainer, folder, "before", config.heldout, console)
    if any((folder / name / "state.json").exists() for name in ("checkpoint", "checkpoint.old")):
        trainer.resume(folder / "checkpoint")
        console.print(f"resumed after step {trainer.step}")
    trainer.train(folder / "checkpoint")
    _evaluate(trainer, folder, "after", config.heldout, console)
    results = _summarize(config, folder, time.perf_counter() - started)
    logger.results(results)
    logger.close()
    for line in results["summary"]:
        console.print(line, highlight=False)
    console.print(f"report: {write_report(folder)}")
    return results


def _line(numbers: Mapping[str, Any]) -> str:
    rewards = " ".join(f"{r:+.2f}" for r in numbers["reward_by_turn"])
    return (
        f"step {numbers['step']}/{numbers['steps']}  solve-F1 {numbers['score']:.3f}  reward by "
        f"turn {rewards}  grad {numbers['grad_norm']:.2f}  "
        f"{numbers['rollout_seconds']:.0f} + {numbers['update_seconds']:.0f} s"
    )


def _evaluate(trainer: Trainer, folder: Path, name: str, count: int, console: Console) -> None:
    """Play the first tasks of every held-out kind, greedily."""
    world = trainer.environment
    names = world.tasks("heldout")
    chosen = names[:: max(1, len(names) // count)][:count]
    with console.status(f"{len(chosen)} held-out tasks {name} training"):
        dialogues = trainer.rollout.run(world, [(t, i, i) for i, t in enumerate(chosen)])
    rows = [
        {
            "task": d.task,
            "scores": d.scores,
            "turns": [
                {"message": t.message, "reply": t.reply, "reward": t.reward} for t in d.turns
            ],
        }
        for d in dialogues
    ]
    write_json(folder / f"{name}.json", {"dialogues": rows})
    mean = sum(d.scores["score"] for d in dialogues) / max(len(dialogues), 1)
    console.print(f"{name} training: held-out solve-F1 {mean:.3f}", highlight=False)


def _summarize(config: Config, folder: Path, seconds: float) -> dict[str, Any]:
    sides = [read_json(folder, f"{name}.json")["dialogues"] for name in ("before", "after")]
    rows, gains = [], {}
    for metric in METRICS:
        before, after = ([d["scores"][metric] for d in side] for side in sides)
        gain = bootstrap_interval([b - a for a, b in zip(before, after, strict=True)])
        gains[metric] = str(gain)
        rows.append([metric, sum(before) / len(before), sum(after) / len(after), str(gain)])
    scores = [[d["scores"]["score"] for d in side] for side in sides]
    training_curves(read_table(folder), folder / "plots" / "1_training.png")
    before_after(scores[0], scores[1], folder / "plots" / "2_held-out.png", "solve-F1")
    (folder / "pairs.jsonl").unlink(missing_ok=True)
    pairs = [
        {
            "task": a["task"],
            "before": {"score": a["scores"]["score"], "turns": a["turns"]},
            "after": {"score": b["scores"]["score"], "turns": b["turns"]},
        }
        for a, b in list(zip(*sides, strict=True))[:3]
    ]
    RunLogger(folder, tensorboard=False).append("pairs", pairs)
    return {
        "title": f"normkit run matchtir: {config.estimator}, {config.matching}",
        "summary": [
            f"{config.estimator} on {config.model}: {config.steps} steps of {config.groups} x "
            f"{config.group_size} dialogues, {seconds / 60:.1f} minutes",
            f"held-out solve-F1 of {len(scores[0])} tasks, paired gain {gains['score']}",
        ],
        "table": {"columns": ["metric", "before", "after", "paired gain"], "rows": rows},
        "seconds": seconds,
    }
