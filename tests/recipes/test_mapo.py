"""A run of mapo with a chat model of a few thousand weights and a judge that likes letters."""

from __future__ import annotations

from dataclasses import replace

import pytest
from transformers import AutoModelForCausalLM

from normkit.recipes import _mapo_language
from normkit.recipes.mapo import Config, run
from normkit.rl import models
from normkit.rl.environments.empathy import EmpathyConfig, EmpathyEnvironment
from normkit.rl.environments.epm import EPMConfig
from normkit.runs import read_json, read_table
from tests.rl.fakes import TableJudge, filled, scenario
from tests.rl.tiny import tiny_model, tiny_tokenizer

SMALL = Config(
    steps=2,
    groups=1,
    group_size=2,
    max_turns=2,
    max_new_tokens=6,
    learning_rate=1e-2,
    evaluate_every=2,
)


class Judge(TableJudge):
    """Finds letters moving."""

    def judge(self, requests):
        letters = [sum(c.isalpha() for c in request.reply) for request in requests]
        return [filled((min(count, 2), 0)) for count in letters]


@pytest.fixture(autouse=True)
def small_world(monkeypatch):
    tokenizer = tiny_tokenizer()
    scenarios = [scenario(f"career-{i}", opening=f"Message {i}.") for i in range(6)]

    def build(config, folder):
        world = EmpathyConfig(epm=EPMConfig(max_turns=config.max_turns))
        return EmpathyEnvironment(scenarios[:3], scenarios[3:], Judge(), None, world)

    monkeypatch.setattr(_mapo_language, "make_environment", build)
    monkeypatch.setattr(models, "load_policy", lambda *_: (tiny_model(tokenizer), tokenizer))


def test_sampled_and_greedy_replies_are_scored_and_compared(tmp_path):
    results = run(replace(SMALL, save_hf=tmp_path / "model"), tmp_path / "run")
    rows = results["table"]["rows"]
    metrics = ["score", "closed", "stability"]
    assert [row[:2] for row in rows] == [[m, x] for m in ("sampled", "greedy") for x in metrics]
    before, after = (read_json(tmp_path / "run", f"{side}.json") for side in ("before", "after"))
    for mode in ("sampled", "greedy"):
        means = [sum(d["scores"]["score"] for d in side[mode]) / 3 for side in (before, after)]
        assert [results["gains"][f"{mode} score"][k] for k in ("before", "after")] == means
    pairs = read_table(tmp_path / "run", "pairs")
    assert {pair["task"] for pair in pairs} == {d["task"] for d in before["sampled"]}
    assert len(read_table(tmp_path / "run", "heldout")) == 1
    assert (tmp_path / "run" / "best" / "model.safetensors").exists()
    assert (tmp_path / "run" / "report.html").exists()
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "model") is not None


def test_a_run_that_was_stopped_goes_on_to_the_same_numbers(tmp_path):
    whole = run(SMALL, tmp_path / "whole")
    run(replace(SMALL, steps=1), tmp_path / "stopped")
    resumed = run(SMALL, tmp_path / "stopped")
    assert resumed["gains"] == whole["gains"]
    for mine, other in zip(
        read_table(tmp_path / "stopped"), read_table(tmp_path / "whole"), strict=True
    ):
        assert [mine[k] for k in ("loss", "reward")] == [other[k] for k in ("loss", "reward")]
