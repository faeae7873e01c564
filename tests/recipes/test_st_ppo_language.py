"""The chat model that searches: the smallest run there is, from warm start to report."""

from __future__ import annotations

import json

import pytest

from normkit.commands import evaluate
from normkit.errors import InputError
from normkit.recipes import _language
from normkit.recipes._st_ppo_language import METRICS, _reference
from normkit.recipes.st_ppo import Config, run
from normkit.rl import models
from normkit.rl.environment import Reply
from normkit.rl.environments.search import SearchWorld
from normkit.rl.evaluation import players
from normkit.runs import read_json, read_table
from tests.rl.tiny import tiny_model, tiny_tokenizer

pytest.importorskip("bm25s")

SMALL = {
    "world": "language",
    "hops": (1,),
    "warm_start": 1,
    "steps": 2,
    "groups": 1,
    "group_size": 2,
    "mini_batches": 2,
    "max_turns": 2,
    "max_new_tokens": 4,
    "heldout": 2,
}


@pytest.fixture(autouse=True)
def model(monkeypatch):
    tokenizer = tiny_tokenizer()

    def load(*_):
        model = tiny_model(tokenizer)
        model.config.max_position_embeddings = 8192
        return model, tokenizer

    monkeypatch.setattr(models, "load_policy", load)
    monkeypatch.setattr(players, "load_policy", load)


@pytest.mark.parametrize(("method", "rank"), [("st-ppo", 0), ("so-grpo", 2)])
def test_a_chat_model_is_trained_to_search(tmp_path, method, rank):
    results = run(Config(**SMALL, method=method, lora_rank=rank), tmp_path)
    columns = [(row[0], row[1]) for row in results["table"]["rows"]]
    assert columns == [(mode, name) for mode in ("greedy", "sampled") for name in METRICS]
    assert any("supervised" in line for line in results["summary"])
    steps, updates = read_table(tmp_path), read_table(tmp_path, "updates")
    assert [row["step"] for row in steps] == [1, 2]
    assert [row["staleness"] for row in updates] == [0, 1, 0, 1]
    for row in updates:
        assert row["bias_norm"] >= 0
        assert 0 <= row["clip_fraction"] <= row["clip_fraction_turn"] <= 1
    assert {path.name[0] for path in (tmp_path / "plots").iterdir()} == set("1234")
    assert (tmp_path / "report.html").exists()


def test_a_run_that_was_stopped_goes_on_to_the_same_numbers(tmp_path, monkeypatch):
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    run(Config(**SMALL), whole)
    run(Config(**{**SMALL, "steps": 1}), stopped)
    taught = []
    monkeypatch.setattr(_language, "imitate", lambda *_, **__: taught.append(1))
    run(Config(**SMALL), stopped)
    assert taught == []  # the checkpoint has been taught
    for row, other in zip(read_table(whole), read_table(stopped), strict=True):
        assert row["loss"] == other["loss"]
        assert row["value_loss"] == other["value_loss"]
    assert read_json(whole, "after.json") == read_json(stopped, "after.json")


def test_a_run_is_evaluated_as_it_evaluates_itself(tmp_path):
    run(Config(**SMALL), tmp_path / "run")
    out, short = tmp_path / "out.json", ["--max-turns", "2", "--max-new-tokens", "4"]
    few = ["--limit", "1", "--repeats", "1", "--out", str(out)]
    evaluate.main([str(tmp_path / "run"), "--world", "search", *short, *few])
    (found,) = json.loads(out.read_text(encoding="utf-8"))["models"].values()
    record = found["records"]["search"][0]
    expected = read_json(tmp_path / "run", "after.json")["greedy"][0]
    assert record["task"] == expected["task"] == "heldout-1-000"
    assert record["turns"] == expected["turns"]


def test_without_a_warm_start_the_model_is_taken_as_it_comes(tmp_path):
    results = run(Config(**{**SMALL, "warm_start": 0, "steps": 1}), tmp_path)
    assert not any("supervised" in line for line in results["summary"])
    assert not (tmp_path / "untaught.json").exists()


def test_a_warm_start_needs_queries(tmp_path):
    path = tmp_path / "q.jsonl"
    rows = [
        {"question": f"q{i}?", "answer": "a", "context": [[f"T{i}", ["Text."]]]} for i in range(3)
    ]
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    with pytest.raises(InputError, match="no question comes with queries"):
        run(Config(**{**SMALL, "hops": (), "questions": path}), tmp_path / "run")


def test_reference_replies_lead_to_the_answer():
    world = SearchWorld()
    session = world.start(world.tasks("train")[-1], 0)
    while session.ended is None:
        world.step([session], [Reply(_reference(session))])
    assert session.ended == "success"
    assert len(session.actions) == session.question.hops + 1
