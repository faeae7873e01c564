"""``normkit advantages``: what it reads, what it computes, what it draws, and what it refuses."""

from __future__ import annotations

import json
import re

import pytest
import torch

from normkit.cli import main
from normkit.commands.advantages import read_judged, turn_rows
from normkit.errors import InputError
from normkit.rl.advantage import estimate
from tests.rl.environments.empa import BAD, GOOD, result, write

LINES = ([1, 0, 2], [3, -1, 1], [0, None])


def turns(rewards):
    return [{"message": "m", "reply": "r", "reward": reward} for reward in rewards]


@pytest.fixture
def log(tmp_path):
    rows = [
        {"step": step, "task": "a", "turns": turns(line)}
        for step, line in enumerate(LINES, start=1)
    ]
    return write(tmp_path, "".join(json.dumps(row) + "\n" for row in rows), "dialogues.jsonl")


def run(capsys, *arguments):
    assert main(["advantages", *map(str, arguments), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_the_worked_numbers_of_the_card(capsys, tmp_path):
    rows = [{"step": 1, "task": "a", "turns": turns(line)} for line in LINES[:2]]
    path = write(tmp_path, "\n".join(map(json.dumps, rows)), "dialogues.jsonl")
    found = run(capsys, path, "--gamma", 1)
    first, second = (dialogue["advantages"] for dialogue in found["dialogues"])
    assert first == pytest.approx([0, 0.112702, 0.887298], abs=1e-6)
    assert second == pytest.approx([0.774597, -1.274597, -0.5], abs=1e-6)
    assert found["survivors"] == [2, 2, 2]
    assert found["zero_variance"] == pytest.approx(1 / 3)


def test_options_reach_the_estimator(capsys, log):
    rows = turn_rows(read_judged(log))
    for flags, options in (
        ((), {}),
        (("--alpha", 0.2, "--batch-scope", "batch"), {"alpha": 0.2, "batch_scope": "batch"}),
        (("--gamma", 0.5), {"gamma": 0.5}),
    ):
        found = run(capsys, log, *flags)
        given = torch.tensor([a for d in found["dialogues"] for a in d["advantages"]])
        torch.testing.assert_close(given.double(), estimate("mapo", *rows, **options))


def test_unknown_rewards_are_null_and_earn_nothing(capsys, log):
    last = run(capsys, log, "--estimator", "turn")["dialogues"][-1]
    assert last["dialogue"] == "step 3"
    assert last["rewards"] == [0, None]
    assert last["advantages"][1] == 0


def test_evaluations_of_a_run_are_compared_task_by_task(capsys, tmp_path):
    for name, gain in (("before", 0), ("after", 1)):
        rows = [{"task": task, "scores": {}, "turns": turns([gain, 2 * gain])} for task in "ab"]
        write(tmp_path, {"greedy": rows, "sampled": rows}, f"{name}.json")
    found = run(capsys, tmp_path, "--estimator", "rloo")["dialogues"]
    assert len(found) == 8
    assert {d["dialogue"] for d in found} == {
        "before, greedy",
        "before, sampled",
        "after, greedy",
        "after, sampled",
    }
    # Totals are 3 after and 0 before: the leave-one-out mean of the four is 1 or 2.
    assert {(d["dialogue"][:3], *d["advantages"]) for d in found} == {
        ("bef", -2.0, -2.0),
        ("aft", 2.0, 2.0),
    }


def test_models_on_one_case_form_a_group(capsys, tmp_path):
    for model, levels in (("good", GOOD), ("bad", BAD)):
        write(tmp_path / model, result([levels, None, levels], "", test_model_name=model))
    write(tmp_path / "bad", {"status": "error", "error": "down"}, "script_901_result.json")
    found = run(capsys, tmp_path, "--estimator", "grpo")
    bad, good = found["dialogues"]
    assert (bad["group"], bad["dialogue"]) == ("script_900", "bad")
    # P_0 = (-7, -9, -9), so that (6, 8, 8) points are left to the tolerance.
    start, after = (6, 8, 8), (5, 7, 7)
    assert good["rewards"][0] == pytest.approx(
        float(torch.tensor(start).double().norm() - torch.tensor(after).double().norm())
    )
    assert good["rewards"][1] is None
    assert good["advantages"][0] == pytest.approx(2**-0.5, abs=1e-5)
    assert bad["advantages"][0] == pytest.approx(-(2**-0.5), abs=1e-5)


def test_estimators_are_compared(capsys, log, tmp_path):
    plot = tmp_path / "credit.png"
    flags = ("--compare", "mica", "turn", "batch", "grpo", "--alpha", 1, "--plot", plot)
    compared = run(capsys, log, *flags)["correlations"]
    assert compared["estimators"] == ["mapo", "turn", "batch", "grpo"]
    matrix = torch.tensor(compared["matrix"])
    torch.testing.assert_close(matrix, matrix.T)
    # With alpha = 1 the mixed estimator is the turn-level one.
    assert compared["matrix"][0][1] == pytest.approx(1)
    assert compared["matrix"][1][2] < 0.99
    assert plot.read_bytes().startswith(b"\x89PNG")


def test_a_comparison_gives_each_estimator_the_options_it_has(capsys, log):
    rows = turn_rows(read_judged(log))
    found = run(capsys, log, "--estimator", "grpo", "--compare", "turn", "--gamma", 0.5)
    columns = [estimate("grpo", *rows), estimate("turn", *rows, gamma=0.5)]
    known = torch.isfinite(rows[0])
    expected = torch.corrcoef(torch.stack(columns)[:, known])[0, 1]
    assert found["correlations"]["matrix"][0][1] == pytest.approx(float(expected))


def test_tables_for_people(capsys, log):
    assert main(["advantages", str(log), "--compare", "grpo"]) == 0
    said = capsys.readouterr().out
    for words in (
        "step 1",
        "survivors per turn",
        "turns without variance",
        "correlation of credit",
    ):
        assert words in said


def test_a_users_copy(empa_dir, capsys, tmp_path):
    plot = tmp_path / "credit.png"
    found = run(capsys, empa_dir, "--plot", plot)
    assert len(found["dialogues"]) >= 12
    assert found["survivors"][0] >= 3
    assert all(len(d["rewards"]) == len(d["advantages"]) for d in found["dialogues"])
    assert plot.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--estimator", "nope"), "estimator must be one of"),
        (("--estimator", "ppo"), "estimator 'ppo' needs a critic"),
        (("--compare", "ppo"), "estimator 'ppo' needs a critic"),
        (("--estimator", "grpo", "--alpha", "1"), "alpha is no option of grpo"),
        (
            ("--estimator", "grpo", "--compare", "rloo", "--alpha", "1"),
            "alpha is no option of grpo or of rloo",
        ),
    ],
)
def test_flags_that_cannot_be_met(capsys, log, flags, message):
    assert main(["advantages", str(log), *flags]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert len(error.strip().splitlines()) == 1


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("dialogues.jsonl", "{", "line 1 is not JSON"),
        ("dialogues.jsonl", '{"step": 1, "turns": []}', "line 1: task must be a text that is not"),
        (
            "dialogues.jsonl",
            '{"step": 1, "task": "a"}',
            "line 1: turns must be a list, got nothing",
        ),
        (
            "dialogues.jsonl",
            '\n{"step": 1, "task": "a", "turns": [{"reward": "x"}]}',
            'line 2: turns[0].reward must be a number, got "x"',
        ),
        ("before.json", {"greedy": [{"task": "a", "turns": 1}]}, "greedy[0].turns must be a list"),
        ("other.json", {"a": 1}, "epj must be an object, got nothing"),
        ("other.json", [], "it must be an object, got []"),
    ],
)
def test_a_malformed_file_is_named(tmp_path, name, data, message):
    path = write(tmp_path, data, name)
    with pytest.raises(InputError, match=re.escape(str(path)) + ".*" + re.escape(message)):
        read_judged(path)


def test_folders_without_dialogues(capsys, tmp_path):
    assert main(["advantages", str(tmp_path)]) == 2
    assert "files must hold judged dialogues" in capsys.readouterr().err
    write(tmp_path, {"step": 1, "task": "a", "turns": []}, "dialogues.jsonl")
    assert main(["advantages", str(tmp_path)]) == 2
