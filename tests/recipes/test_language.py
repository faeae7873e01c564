"""The course of a language run: what is played, summarized and shown of it."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
from rich.console import Console

from normkit.recipes._language import Study, conduct, open_run, play_heldout, progress
from normkit.rl.dialogue import Dialogue, Turn
from normkit.rl.rollout import RolloutConfig
from normkit.rl.trainer_config import TrainerConfig
from normkit.runs import read_json, read_table

NUMBERS = {
    "reward": 0.0,
    "score": 0.25,
    "reward_by_turn": [0.5, -1.0],
    "masked_turns": 1,
    "clip_fraction": 0.1,
    "sampling_kl": 0.002,
    "grad_norm": 1.0,
    "rollout_seconds": 2.0,
    "update_seconds": 3.0,
    "sampled_tokens_per_second": 40.0,
    "trained_tokens_per_second": 30.0,
}


class World:
    def tasks(self, split):
        return [f"{split}-{i}" for i in range(10)]


class Rollout:
    """Plays nothing, and remembers what it was asked to."""

    def __init__(self):
        self.config = RolloutConfig()
        self.greedy, self.synced = [], []

    def sync(self, model):
        self.synced.append(model)

    def with_config(self, config):
        self.greedy.append(config.greedy)
        return self

    def run(self, world, tasks):
        return tasks


class Trainer:
    """Adds one to the score of every task by each step."""

    def __init__(self, logger, steps=2):
        self.environment, self.rollout, self.model = World(), Rollout(), object()
        self.config = TrainerConfig(steps=steps)
        self.logger, self.step, self.resumed = logger, 0, 0

    def train(self, checkpoint, best):
        while self.step < self.config.steps:
            self.step += 1
            if self.logger is not None:
                self.logger.log(self.step, NUMBERS)
        checkpoint.mkdir(exist_ok=True, parents=True)
        (checkpoint / "state.json").write_text("{}")

    def resume(self, checkpoint):
        self.resumed += 1
        self.step = 2


def play(trainer):
    """Four dialogues; the third is never scored, the last gets worse."""
    dialogues = []
    for i in range(4):
        score = math.nan if i == 2 else float(i + trainer.step * (-1 if i == 3 else i + 1))
        turn = Turn(f"message {i}", f"reply {trainer.step}", [], [], False, 0.5)
        dialogues.append(
            Dialogue(f"task-{i}", i, i, i, "", [turn], [], "end", {"score": score, "other": 1.0})
        )
    return {"sampled": dialogues, "greedy": dialogues[:2]}


STUDY = Study("title", "a method", "points", ("score", "other"), play, "games")


@pytest.fixture
def console():
    return Console(quiet=True)


def finished(folder, console, study):
    logger, _ = open_run({"seed": 1}, folder)
    trainer = Trainer(logger)
    return trainer, conduct(trainer, folder, study, console)


def test_a_run_is_scored_trained_scored_again_and_reported(tmp_path, console):
    drawn = []
    _, results = finished(tmp_path, console, replace(STUDY, plot=drawn.append))
    # Of tasks 0, 1 and 3: before 0, 1, 3 and after two steps 2, 5, 1.
    rows = results["table"]["rows"]
    means = [pytest.approx(4 / 3), pytest.approx(8 / 3)]
    assert rows[0][:4] == ["sampled", "score", *means]
    assert rows[1] == ["sampled", "other", 1.0, 1.0, "+0 [+0, +0], n = 4"]
    assert rows[2][:4] == ["greedy", "score", 0.5, 3.5]
    gain = results["gains"]["sampled score"]
    assert [gain["before"], gain["after"]] == means
    assert gain["gain"]["mean"] == pytest.approx(4 / 3)
    first, sampled, greedy, masked = results["summary"]
    assert first.startswith("a method: 2 steps of 4 x 4 dialogues, 5.0 s a step")
    assert sampled.startswith("points of 4 games, sampled: 1.333 to 2.667, paired gain +1.33")
    assert greedy.startswith("points of 2 games, greedy: 0.5 to 3.5, paired gain +3")
    assert masked.startswith("2 turns got no verdict")
    assert drawn == [tmp_path]
    assert read_json(tmp_path, "config.json") == {"seed": 1}
    pairs = read_table(tmp_path, "pairs")
    # Gained most, in the middle, lost; the task without a score is in no pair.
    assert [pair["task"] for pair in pairs] == ["task-1", "task-0", "task-3"]
    assert pairs[0]["before"]["turns"][0]["reply"] == "reply 0"
    assert pairs[0]["after"]["turns"][0]["reply"] == "reply 2"
    assert "task-3" in (tmp_path / "report.html").read_text(encoding="utf-8")


def test_a_run_that_ended_is_reported_again_without_training(tmp_path, console):
    _, first = finished(tmp_path, console, STUDY)
    trainer, again = finished(tmp_path, console, STUDY)
    assert trainer.resumed == 1
    assert again["table"] == first["table"]
    assert len(read_table(tmp_path, "pairs")) == 3


def test_held_out_tasks_are_spread_and_played_greedily():
    trainer = Trainer(None)
    chosen = play_heldout(trainer, 4)["greedy"]
    assert [task for task, _, _ in chosen] == ["heldout-0", "heldout-2", "heldout-4", "heldout-6"]
    assert len(play_heldout(trainer, 99)["greedy"]) == 10
    assert trainer.rollout.greedy == [True, True]
    assert trainer.rollout.synced == [trainer.model] * 2


def test_other_processes_play_and_train_but_write_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("RANK", "1")
    trainer, results = finished(tmp_path / "run", open_run({}, tmp_path / "run")[1], STUDY)
    assert results == {}
    assert trainer.step == 2
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["checkpoint"]
    assert capsys.readouterr().out == ""


def test_a_run_without_scores_is_reported(tmp_path, console):
    def silent(trainer):
        return {"greedy": [replace(d, scores={"score": math.nan}) for d in play(trainer)["greedy"]]}

    _, results = finished(tmp_path, console, replace(STUDY, metrics=("score",), play=silent))
    assert results["table"]["rows"] == []
    assert read_table(tmp_path, "pairs") == []
    assert (tmp_path / "report.html").exists()


def test_a_step_is_one_line(capsys):
    report = progress(Console(), "points")
    report("train", {"step": 3, "steps": 9, **NUMBERS})
    report("evaluate", {"step": 3, "steps": 9, "score": 0.5})
    assert capsys.readouterr().out.splitlines() == [
        "step 3/9  points 0.25  reward by turn +0.50 -1.00  clip 0.10  kl 0.0020  grad 1.00  "
        "40 + 30 tokens/s  0.5 min left",
        "step 3/9  points 0.5 of held-out tasks",
    ]
