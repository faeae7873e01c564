"""The recipe of MatchTIR: claims, tables of its small world, verdicts, run folder."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from normkit.errors import InputError
from normkit.recipes import _matchtir_measured as measured
from normkit.recipes._matchtir_language import _reference
from normkit.recipes._matchtir_measured import Trial, compare, credits, told_apart
from normkit.recipes._matchtir_tabular import (
    ANSWER,
    LONGEST,
    SETTINGS,
    TURNS,
    Rollouts,
    credit,
    half_trained,
    roll_out,
    score,
    tables,
    train,
)
from normkit.recipes._trials import ComparisonPlan
from normkit.recipes.matchtir import SYSTEM, Config, run
from normkit.rl.environment import Reply
from normkit.rl.environments.tool_tasks import make_tasks
from normkit.rl.environments.tools import ToolWorld, ToolWorldConfig
from normkit.runs import read_json, read_table
from tests.reference import matchtir as oracle

TINY = ComparisonPlan(seeds=2, tuning_seeds=1, updates=2, rates=(0.2, 0.4))


@pytest.mark.parametrize(
    "claim", [c for c in SYSTEM.claims if c.kind != "measured"], ids=lambda c: c.name
)
def test_an_identity_holds(claim):
    assert claim.check().verdict == "holds"


# ---------------------------------------------------------------------- the tables


def play(task, choices):
    """One dialogue by hand, of a task by its position."""
    live = torch.zeros(1, TURNS, dtype=torch.bool)
    choice = torch.zeros(1, TURNS, dtype=torch.int64)
    known = torch.zeros_like(choice)
    table, seen = tables(), 0
    kind = table.kind[task]
    for t, c in enumerate(choices):
        live[0, t], choice[0, t], known[0, t] = True, c, seen
        if not int(table.needs[kind, c]) & ~seen:
            seen |= int(table.gives[kind, c])
    return Rollouts(torch.tensor([task]), choice, known, live)


def position(task_id):
    return next(q for q, t in enumerate(make_tasks("train")) if t.id == task_id)


@pytest.mark.parametrize("task_id", ["freight-00", "density-03", "caravan-07"])
def test_the_reference_trace_earns_everything(task_id):
    q = position(task_id)
    n = int(tables().length[tables().kind[q]])
    rollouts = play(q, [*range(n), ANSWER])
    assert rollouts.rewards("hungarian")[0, : n + 1].tolist() == [1.0] * (n + 1)
    assert rollouts.rewards("outcome")[0, : n + 1].tolist() == [0.0] * n + [1.0]
    assert rollouts.kinds()["needed"][0].sum() == n


def test_a_call_before_its_arguments_are_known_fails():
    q = position("freight-00")
    kinds = play(q, [1, 0, 1, 1, LONGEST, 2 * LONGEST, ANSWER]).kinds()
    found = {name: x[0].nonzero().flatten().tolist() for name, x in kinds.items()}
    assert found == {"needed": [1, 2], "repeated": [3], "wrong": [0, 4], "unneeded": [5]}


def test_rewards_are_those_of_the_world_that_runs_the_tools():
    """Whatever is known, the tables pay what the executable world pays."""
    task = make_tasks("train")[position("gap-02")]
    q = position("gap-02")
    rollouts = play(q, [0, 0, 1, 3, 2, 3, ANSWER])
    world = ToolWorld()
    session = world.start(task.id, 0)
    blind = task.gold[3].to_json() | {"arguments": {"expression": "?"}}
    calls = [task.gold[i].to_json() for i in (0, 0, 1)] + [blind]
    calls += [task.gold[i].to_json() for i in (2, 3)]
    texts = [f"<tool_call>{c}</tool_call>".replace("'", '"') for c in calls]
    texts.append(f"<answer>{task.answer}</answer>")
    for text in texts:
        (step,) = world.step([session], [Reply(text)])
    np.testing.assert_allclose(
        rollouts.rewards("hungarian")[0, : len(texts)], step.info["turn_rewards"], atol=1e-12
    )


def test_rollouts_are_paid_as_the_loop_pays():
    rollouts = roll_out(half_trained(1), 1, 2, torch.Generator().manual_seed(0))
    table = tables()
    paid = rollouts.rewards("greedy")
    for e, q in enumerate(rollouts.task.tolist()):
        n = int(table.length[table.kind[q]])
        turns = [t for t in range(TURNS) if rollouts.call[e, t]]
        matrix = [
            table.similarity[q, int(rollouts.able[e, t]), rollouts.choice[e, t], :n].tolist()
            for t in turns
        ]
        expected = [
            row[j] if j >= 0 else 0.0 for row, j in zip(matrix, oracle.greedy(matrix), strict=True)
        ]
        np.testing.assert_allclose(paid[e, turns], expected, atol=1e-12)
    assert (paid[~rollouts.live] == 0).all()


def test_every_call_is_of_one_kind_and_dialogues_end():
    rollouts = roll_out(half_trained(2), 2, 4, torch.Generator().manual_seed(0))
    assert (sum(x.long() for x in rollouts.kinds().values()) == rollouts.call.long()).all()
    answered = rollouts.choice.eq(ANSWER) & rollouts.live
    assert (answered.sum(1) <= 1).all()
    assert (rollouts.live.sum(1)[~answered.any(1)] == TURNS).all()
    found = score(rollouts, 2)
    assert found.f1.shape == (2, 9)
    assert ((found.f1 >= 0) & (found.f1 <= 1) & (found.wrong >= 0) & (found.wrong <= 1)).all()


def test_runs_do_not_see_each_other():
    policy, seed = half_trained(3), torch.Generator().manual_seed(0)
    rollouts = roll_out(policy, 1, 4, seed)
    whole = credit(rollouts, SETTINGS["dual-km"], 3, 4)
    size = len(rollouts.task) // 3
    part = slice(size, 2 * size)
    alone = Rollouts(*(getattr(rollouts, f)[part] for f in ("task", "choice", "known", "live")))
    np.testing.assert_allclose(whole[part], credit(alone, SETTINGS["dual-km"], 1, 4), atol=1e-12)


def test_training_helps_and_can_be_repeated():
    rates = torch.tensor([0.0, 0.4])
    first, again = (train(SETTINGS["dual-km"], rates, 8, 3) for _ in range(2))
    assert torch.equal(first.curve, again.curve)
    assert float(first.final.f1[1].mean()) > float(first.final.f1[0].mean()) + 0.1


# ---------------------------------------------------------------------- verdicts


def trial(name, f1, redundant=1.0):
    seeds = [[x] * 9 for x in f1]
    return Trial(name, 0.1, [f1], seeds, f1, [redundant] * len(f1), [0.1] * len(f1))


@pytest.mark.parametrize(
    ("ours", "expected"),
    [((0.8, 0.9), "holds"), ((0.2, 0.1), "contradicted"), ((0.4, 0.6), "not shown")],
)
def test_a_verdict_is_as_it_falls(ours, expected):
    found = {"a": trial("a", list(ours)), "b": trial("b", [0.5, 0.5])}
    finding = measured.difference(found, "a", "b", "f1", "")
    assert finding.verdict == expected
    assert finding.details == {"a at 0.1": pytest.approx(list(ours)), "b at 0.1": [0.5, 0.5]}


def test_outcome_only_credit_gives_a_dialogue_one_number():
    found = credits(2, 0, within=True)
    for kind in ("repeated", "wrong"):
        np.testing.assert_allclose(told_apart(found, "outcome", kind), 0, atol=1e-12)
        assert (told_apart(found, "dual-km", kind) > 0).all()


def test_the_claims_judge_the_comparison(monkeypatch):
    made = {t.name: t for t in compare(TINY, 0)}
    monkeypatch.setattr(measured, "_trials", lambda: made)
    for claim in measured.MEASURED:
        finding = claim.check()
        assert finding.verdict in ("holds", "not shown", "contradicted")
        assert finding.details


# ---------------------------------------------------------------------- the run


def test_a_run_leaves_tables_plots_and_a_report(tmp_path):
    config = Config(seeds=2, tuning_seeds=1, updates=2, rates=(0.2, 0.4), seed=5)
    results = run(config, tmp_path)
    assert [row[0] for row in results["table"]["rows"]] == list(SETTINGS)
    assert len(results["credit"]["rows"]) == len(SETTINGS) * 4
    assert read_json(tmp_path, "results.json")["title"] == results["title"]
    assert [row["step"] for row in read_table(tmp_path)] == [1, 2, 3, 4, 5]
    trials = read_table(tmp_path, "trials")
    assert [len(t["f1"]) for t in trials] == [2] * 5
    assert len(list(tmp_path.glob("plots/*.png"))) == 3
    assert "<img" in (tmp_path / "report.html").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("flag", "value"),
    [
        ("seeds", 1),
        ("updates", 0),
        ("rates", ()),
        ("rates", (-1.0,)),
        ("reg", 0.0),
        ("heldout", 0),
        ("warm_start", -1),
    ],
)
def test_bad_flags_are_refused(flag, value):
    with pytest.raises(InputError, match=flag):
        Config(**{flag: value}).validate()


def test_a_chat_model_is_trained_in_the_tool_world(tmp_path, monkeypatch):
    """The smallest model there is: the whole path from question to report."""
    from normkit.rl import models
    from tests.rl.tiny import tiny_model, tiny_tokenizer

    tokenizer = tiny_tokenizer()
    model = tiny_model(tokenizer)
    model.config.max_position_embeddings = 8192
    monkeypatch.setattr(models, "load_policy", lambda *_: (model, tokenizer))
    config = Config(
        world="language",
        warm_start=1,
        steps=1,
        groups=1,
        group_size=2,
        max_turns=2,
        max_new_tokens=4,
        heldout=2,
    )
    results = run(config, tmp_path)
    assert "without them solve-F1 is 0.000" in results["summary"][-1]
    assert results["table"]["rows"][0][:2] == ["greedy", "score"]
    (step,) = read_table(tmp_path)
    assert np.isfinite(step["loss"] if "loss" in step else step["grad_norm"])
    assert (tmp_path / "report.html").exists()


def test_the_replies_that_a_warm_start_shows_solve_every_task():
    world = ToolWorld(ToolWorldConfig(max_turns=Config().max_turns))
    for task in (*world.tasks("train"), *world.tasks("heldout")):
        session = world.start(task, 0)
        while session.ended is None:
            world.step([session], [Reply(_reference(session))])
        assert session.ended == "success"
        assert world.score(session)["score"] == 1
