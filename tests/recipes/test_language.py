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

    def train(self, checkpoint):
        while self.step < self.config.steps:
            self.step += 1
            self.logger.log(self.step, {"reward": 0.0, "score": 1.0, "reward_by_turn": [0.0]})
        checkpoint.mkdir(exist_ok=True)
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
    return dialogues


STUDY = Study("title", "a method", "points", ("score", "other"), play, "games")


@pytest.fixture
def console():
    return Console(quiet=True)


def finished(folder, console, study):
    logger = open_run({"seed": 1}, folder)
    trainer = Trainer(logger)
    return trainer, conduct(trainer, logger, study, console)


def test_a_run_is_scored_trained_scored_again_and_reported(tmp_path, console):
    drawn = []
    _, results = finished(tmp_path, console, replace(STUDY, plot=drawn.append))
    # Of tasks 0, 1 and 3: before 0, 1, 3 and after two steps 2, 5, 1.
    assert results["table"]["rows"][0][:3] == ["score", pytest.approx(4 / 3), pytest.approx(8 / 3)]
    assert results["table"]["rows"][1] == ["other", 1.0, 1.0, "+0 [+0, +0], n = 4"]
    assert results["summary"][1].startswith("points of 4 games, paired gain +1.33")
    assert drawn == [tmp_path]
    assert read_json(tmp_path, "config.json") == {"seed": 1}
    pairs = read_table(tmp_path, "pairs")
    assert pairs[0]["task"] == "task-1"  # gained most
    assert pairs[-1]["task"] == "task-3"  # lost
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
    chosen = play_heldout(trainer, 4)
    assert [task for task, _, _ in chosen] == ["heldout-0", "heldout-2", "heldout-4", "heldout-6"]
    assert len(play_heldout(trainer, 99)) == 10
    assert trainer.rollout.greedy == [True, True]
    assert trainer.rollout.synced == [trainer.model] * 2


def test_a_step_is_one_line(capsys):
    numbers = {"step": 3, "steps": 9, "score": 0.25, "reward_by_turn": [0.5, -1.0]}
    numbers |= {"grad_norm": 1.0, "rollout_seconds": 2.0, "update_seconds": 3.0}
    progress(Console(), "points")("train", numbers)
    line = "step 3/9  points 0.250  reward by turn +0.50 -1.00  grad 1.00  2 + 3 s\n"
    assert capsys.readouterr().out == line
