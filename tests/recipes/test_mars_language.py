"""A run of self-play with a model of a few thousand weights, from warm-up to report."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

pytest.importorskip("pyspiel")

from normkit.errors import InputError
from normkit.recipes._mars_language import _PooledTrainer, run_language
from normkit.recipes.mars import Config, run
from normkit.rl.environments.games import GameWorld
from normkit.rl.rollout import RolloutConfig
from normkit.rl.trainer import Trainer
from normkit.rl.trainer_config import TrainerConfig
from normkit.runs import read_json, read_table
from tests.rl.tiny import tiny_model, tiny_tokenizer


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    tokenizer = tiny_tokenizer()
    tiny_model(tokenizer).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return Config(
        world="language",
        model=str(folder),
        # Without a mean to compare with, equal losses move the weights.
        estimator="reinforce",
        steps=2,
        warm_up=2,
        heldout=("hex(board_size=3)",),
        group_size=2,
        max_new_tokens=4,
        learning_rate=1e-3,
        opponents=("random", "cfr"),
        evaluation_games=2,
    )


@pytest.fixture(scope="module")
def finished(config, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    return run_language(config, folder), folder


def test_every_pairing_is_measured_before_and_after(finished):
    results, folder = finished
    rows = {row[1]: row[2:] for row in results["table"]["rows"]}
    pairs = [
        *(f"tic_tac_toe against random, seat {s}" for s in (0, 1)),
        *(f"kuhn_poker against {o}, seat {s}" for o in ("random", "cfr") for s in (0, 1)),
        "mini_hanabi with itself",
        *(f"hex(board_size=3) against random, seat {s}" for s in (0, 1)),
    ]
    exact = ["exploitability in kuhn_poker", "legal share there"]
    assert list(rows) == ["score", "illegal", *pairs, *exact]
    # A model that never moves legally loses what it had to put in.
    assert rows["illegal"][:2] == [1.0, 1.0]
    assert rows["tic_tac_toe against random, seat 0"][:2] == [-1.0, -1.0]
    assert rows["mini_hanabi with itself"][:2] == [0.0, 0.0]
    assert all(0 < value < 1 for value in rows["exploitability in kuhn_poker"][:2])
    assert rows["score"][2].endswith(f"n = {2 * len(pairs)}")
    for side in ("before", "after"):
        found = read_json(folder, f"{side}.json")["sampled"]
        assert [d["task"] for d in found] == [pair for pair in pairs for _ in range(2)]
    assert (folder / "report.html").exists()
    assert sorted(p.name for p in (folder / "plots").glob("3_*")) == ["3_opponents.png"]


def test_training_pools_by_game_and_seat(finished):
    rows = read_table(finished[1])
    assert [row["step"] for row in rows] == [1, 2]
    # Three games, two of each, two dialogues a game of which the second never had a turn.
    assert [row["turns"] for row in rows] == [0.5, 0.5]
    assert [row["masked_turns"] for row in rows] == [0, 0]


def test_an_interrupted_run_goes_on_with_the_same_numbers(config, finished, tmp_path):
    run_language(replace(config, steps=1), tmp_path)
    for name in ("after.json", "results.json"):
        (tmp_path / name).unlink()
    run_language(config, tmp_path)
    for name in ("before.json", "after.json"):
        assert read_json(tmp_path, name) == read_json(finished[1], name)
    kept = ("loss", "reward", "grad_norm", "sampling_kl")
    for mine, whole in zip(read_table(tmp_path), read_table(finished[1]), strict=True):
        assert [mine[k] for k in kept] == pytest.approx([whole[k] for k in kept], rel=1e-5)
    before, after = (read_json(tmp_path, f"{s}.json") for s in ("before", "after"))
    assert before != after


@pytest.mark.parametrize(("trainer", "advantage"), [(Trainer, 0.0), (_PooledTrainer, 1.0)])
def test_seats_are_compared_apart_or_pooled(trainer, advantage):
    """Every first seat wins and every second one loses: news only to who compares both."""
    tokenizer = tiny_tokenizer()
    made = trainer(
        tiny_model(tokenizer),
        tokenizer,
        GameWorld(),
        TrainerConfig(steps=1, estimator="mars"),
        RolloutConfig(max_new_tokens=4, dtype="float32"),
    )
    played = []
    for seat in (0, 1, 0, 1):
        world = GameWorld(opponent="random", seat=seat)
        (dialogue,) = made.rollout.run(world, [("kuhn_poker", 0, len(played))])
        (turn,) = dialogue.turns
        turn.reward = 1.0 if seat == 0 else -1.0
        played.append(replace(dialogue, index=len(played)))
    assert made.update(played)["advantage_abs"] == pytest.approx(advantage)


def test_warm_up_and_adapters_exclude_each_other(config, tmp_path):
    with pytest.raises(InputError, match="warm_up"):
        run(replace(config, lora_rank=4), tmp_path)
    results = run_language(
        replace(config, lora_rank=4, warm_up=0, steps=1, evaluation_games=1), tmp_path
    )
    assert math.isfinite(results["seconds"])


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"estimator": "mers"}, "estimator must be one of"),
        ({"temperature": 0.0}, "temperature must be above 0"),
        ({"opponents": ("stockfish",)}, "opponent must be"),
        ({"heldout": ("kuhn_poker",)}, "no game twice"),
    ],
)
def test_bad_options_are_named_before_anything_is_loaded(config, tmp_path, options, says):
    folder = tmp_path / "run"
    with pytest.raises(InputError, match=says):
        run(replace(config, model="no such model", **options), folder)
    assert not folder.exists()
