"""Checking EMPA's published numbers against ours: on a user's copy, and on files made here."""

from __future__ import annotations

import csv
import io
import re

import pytest

from normkit.errors import InputError
from normkit.rl.environments.empa_check import read_epmq_table, verify_results
from normkit.rl.environments.empa_results import read_results, recorded
from normkit.rl.environments.epm import EPMConfig, epm_q, epm_q_case
from tests.rl.environments.empa import BAD, FLAT, GOOD, result, write

INDICES = ("RDI", "Etot", "Snet", "Rho", "Sproj", "Tau", "Rpos", "Align", "Pen")
PARTS = {
    "Outcome Quality": "outcome",
    "Process Efficiency": "efficiency",
    "Process Stability": "stability",
    "EPM-Q Score": "score",
}
SUCCESS = "EPM v2.0 Success: Positional Victory (crossed/approached target zone)"


def table(rows):
    text = io.StringIO()
    writer = csv.DictWriter(text, rows[0])
    writer.writeheader()
    writer.writerows(rows)
    return "\ufeff" + text.getvalue()


def benchmark(root):
    """A small benchmark in EMPA's layout: two cases, one model, both tables."""
    folder = root / "results" / "some-model-7b"
    mixed = [(2, 0, 1, 0, 1, 0), BAD, GOOD, FLAT, None, GOOD] * 2 + [GOOD] * 4
    write(folder, result([GOOD] * 12, SUCCESS))
    other = result(mixed, "Reached max turns (16), timeout", script_id="script_901")
    write(folder, other, "script_901_result.json")
    write(root, "script_900\nscript_901\n", "official_cases.txt")
    trajectories = [recorded(found) for found in read_results(folder)]
    cases = []
    for name, trajectory in zip(("script_900", "script_901"), trajectories, strict=True):
        q = epm_q_case(trajectory).to_json()
        cases.append({"Case_ID": name} | {f"Idx_{key}": q[key.lower()] for key in INDICES})
    mean = {"Case_ID": "Mean"} | dict.fromkeys(list(cases[0])[1:], "")
    write(folder, table([*cases, mean]), "descriptive_statistics.csv")
    q = epm_q(trajectories).to_json()
    row = {"Model": "Some Model 7B"}
    row |= {f"Idx_{key}": round(q[key.lower()], 2) for key in INDICES}
    row |= {key: round(q[name], 2) for key, name in PARTS.items()}
    write(root / "results", table([row]), "epmq_summary.csv")
    return root


def test_every_published_number_is_ours(empa_dir):
    done = verify_results(empa_dir)
    assert done.mismatches == []
    assert done.files >= 12
    assert done.turns >= 200
    assert set(done.endings) == {"success", "failure", "max_turns"}
    # Distances are given in full, the rest to two decimals, some along a rounded direction.
    assert done.worst["distance"] < 1e-9
    assert done.worst["score of a row"] < 0.01


def test_files_and_tables_that_agree(tmp_path):
    done = verify_results(benchmark(tmp_path))
    assert done.mismatches == []
    assert (done.files, done.turns, done.cases, done.models) == (2, 28, 2, 1)
    assert done.endings == {"success": 1, "max_turns": 1}
    assert done.worst["rdi of a case"] < 1e-9
    assert 0 < done.worst["total_work"] < 0.01


_TURN = ("epj", "trajectory", 3)


@pytest.mark.parametrize(
    ("address", "value", "field"),
    [
        ((*_TURN, "v_t"), [1, 1, 2], "epj.trajectory[3] increment"),
        ((*_TURN, "P_t"), [0, 0, 0], "epj.trajectory[3] state"),
        ((*_TURN, "distance"), 5.0, "epj.trajectory[3] distance"),
        ((*_TURN, "epm", "P_norm"), 5.0, "epj.trajectory[3] norm"),
        ((*_TURN, "epm", "projection"), 5.0, "epj.trajectory[3] projection"),
        ((*_TURN, "epm", "delta_E"), 1.75, "epj.trajectory[3] work"),
        ((*_TURN, "epm", "E_total"), 5.0, "epj.trajectory[3] total_work"),
        ((*_TURN, "epm", "alignment"), 0.99, "epj.trajectory[3] alignment"),
        ((*_TURN, "mdep_analysis", "C_Prog_level"), 2, "epj.trajectory[3] increment"),
        (("epj", "P_0_initial_deficit"), [-8, -9, -9], "epj initial state"),
        (("epj", "P_final_position"), [0, 0, 1], "epj final state"),
        (("total_turns",), 11, "total_turns"),
        (("termination_reason",), SUCCESS.replace("Positional", "Geometric"), "rules"),
        (("termination_reason",), "EPM failure: collapsed", "outcome"),
    ],
)
def test_a_changed_number_is_found(tmp_path, address, value, field):
    data = result([GOOD] * 12, SUCCESS)
    holder = data
    for key in address[:-1]:
        holder = holder[key]
    holder[address[-1]] = value
    path = write(tmp_path, data)
    found = verify_results(path).mismatches
    assert field in [mismatch.field for mismatch in found]
    assert str(found[0]).startswith(f"{path}: ")


def test_a_dialogue_that_should_have_ended_is_found(tmp_path):
    path = write(tmp_path, result([GOOD] * 13, SUCCESS))
    assert [m.field for m in verify_results(path).mismatches] == ["epj.trajectory[13] goes on"]


def test_other_constants_give_other_numbers(tmp_path):
    path = write(tmp_path, result([GOOD] * 12, SUCCESS))
    found = verify_results(path, EPMConfig(epsilon=2.0)).mismatches
    assert {m.field.split()[-1] for m in found} == {"distance"}


@pytest.mark.parametrize(
    ("name", "column", "kind"),
    [
        ("some-model-7b/descriptive_statistics.csv", "Idx_Tau", "script_900 tau of a case"),
        ("epmq_summary.csv", "Idx_Tau", "Some Model 7B tau of a model"),
        ("epmq_summary.csv", "EPM-Q Score", "Some Model 7B score of a row"),
    ],
)
def test_a_changed_cell_is_found(tmp_path, name, column, kind):
    path = benchmark(tmp_path) / "results" / name
    rows = list(csv.DictReader(path.read_text(encoding="utf-8-sig").splitlines()))
    rows[0][column] = "12.5"
    path.write_text(table(rows), encoding="utf-8")
    assert kind in [mismatch.field for mismatch in verify_results(tmp_path).mismatches]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "must have rows with a column 'Model', got no row"),
        ("Model,Idx_RDI\na,1\n", "must have rows with a column 'Idx_Etot', got Model, Idx_RDI"),
        ("EMPTY", "Idx_Pen must be a finite number, got ''"),
    ],
)
def test_a_malformed_table_is_named(tmp_path, text, message):
    if text == "EMPTY":
        columns = ["Model", *(f"Idx_{key}" for key in INDICES), *PARTS]
        text = table([{c: "" if c == "Idx_Pen" else 1 for c in columns}])
    path = write(tmp_path, text, "epmq_summary.csv")
    with pytest.raises(InputError, match=re.escape(str(path)) + ".*" + re.escape(message)):
        read_epmq_table(path)


def test_the_published_table_combines(empa_dir):
    rows = read_epmq_table(next(empa_dir.rglob("epmq_summary.csv")))
    assert len(rows) == 16
    # The card's figures.
    known = {"Qwen 3 8B": 12.16, "GPT-4o": 33.73, "Claude 3.5 Sonnet": 85.12}
    assert {name: rows[name]["score"] for name in known} == known
