"""Reading EMPA's result files: every layout, every malformed field."""

from __future__ import annotations

import math
import re

import pytest

from normkit.errors import InputError
from normkit.rl.environments.empa_results import parse_result, read_results, recorded, replay
from normkit.rl.environments.epm import epm_q_case, increment
from normkit.rl.json_fields import Field
from tests.rl.environments.empa import BAD, FLAT, FORM, GOOD, ROLES, result, write

SUCCESS = "EPM v2.0 Success: Positional Victory (crossed/approached target zone)"
COLLAPSE = (
    "EPM v2.0 Failure: 5 consecutive negative-energy turns (Direction Collapse), "
    "Persistent Regression (70% of 8 turns negative)"
)


def read(folder, data):
    return read_results(write(folder, data))[0]


def test_a_file_is_read_whole(tmp_path):
    found = read(tmp_path, result([GOOD, None, BAD], "Reached max turns (3), timeout"))
    assert (found.model, found.script_id) == ("some/model", "script_900")
    assert found.history[0] == ("actor 0", "test_model 0")
    assert len(found.history) == found.total_turns == 3
    assert found.initial == (-7, -9, -9)
    assert found.levels == FORM
    first, failed, last = found.turns
    assert first.progress.cognitive.evidence == "C Prog / C Neg"
    assert first.increment == increment(first.progress) == (1, 1, 1)
    assert failed.progress is None
    assert failed.increment == (0, 0, 0)
    assert last.state == (-8, -10, -10)
    assert (found.epsilon, found.alpha, found.outcome) == (1.0, 0.1, "max_turns")
    assert found.final_state == last.state


@pytest.mark.parametrize(
    ("turns", "reason", "outcome", "rules"),
    [
        ([GOOD] * 12, SUCCESS, "success", {"positional"}),
        ([BAD] * 12, COLLAPSE, "failure", {"direction collapse", "persistent regression"}),
        (
            [BAD] * 12,
            "EPM v2.0 判定失败: 连续5轮负能量（方向崩溃）",
            "failure",
            {"direction collapse"},
        ),
        ([GOOD] * 12, "EPM v2.0 判定成功: 位置胜利（成功穿越）", "success", {"positional"}),
        (
            [FLAT] * 12,
            "对话停滞: 最近12次评估向量总变化量过小(仅0个单位)",
            "failure",
            {"standstill"},
        ),
        ([GOOD, BAD], "Reached max turns (2), timeout", "max_turns", set()),
        ([GOOD, BAD], "对话自然结束，成功安抚", None, set()),
        ([GOOD, BAD], "", None, set()),
    ],
)
def test_endings_are_understood_and_reproduced(tmp_path, turns, reason, outcome, rules):
    found = read(tmp_path, result(turns, reason))
    assert (found.outcome, found.rules) == (outcome, rules)
    ours = replay(found)
    assert ours.outcome() == outcome
    assert all(rule in ours.reason for rule in rules)


def test_oscillation_ends_files_of_the_published_version_only(tmp_path):
    up, down = (0, 0, 2, 0, 2, 0), (0, 0, 1, -1, 1, -1)
    swing = [up, down, down, down] * 3 + [up]
    reason = "EPM v2.0 Failure: Vector Oscillation (total change 36, net change 2)"
    published = read(tmp_path, result(swing, reason))
    assert replay(published).outcome() == published.outcome == "failure"
    assert replay(published).reason == "oscillation (total change 36, net change 2)"
    today = read(tmp_path, result(swing, "Reached", termination_type="DIRECTOR_END"))
    assert replay(today).outcome() is None


def test_a_file_of_todays_code(tmp_path):
    data = result([GOOD] * 6, "EPM success: geometric", every=2)
    data["termination_type"] = "EPM_SUCCESS_GEOMETRIC"
    del data["epj"]["epm_params"], data["status"]
    found = read(tmp_path, data)
    assert found.alpha == 0.05
    assert found.judged_every == 2
    assert [turn.turn for turn in found.turns] == [2, 4, 6, 8, 10, 12]
    assert found.rules == {"geometric"}
    data["epj"]["iedr_details"]["filled_iedr"]["epm"] = {"alpha": 0.2}
    assert read(tmp_path, data).alpha == 0.2


def test_drafts_ended_dialogues_before_turn_twelve(tmp_path):
    found = read(tmp_path, result([BAD] * 5, COLLAPSE))
    assert found.config().min_turns == 1
    assert replay(found).outcome() == "failure"
    assert read(tmp_path, result([BAD] * 12, COLLAPSE)).config().min_turns == 12


def test_what_older_files_lack_is_filled_in(tmp_path):
    data = result([GOOD, GOOD], "")
    epj = data["epj"]
    for key in ("script_id", "test_model_name", "history", "total_turns", "status"):
        del data[key]
    for key in ("P_0_initial_deficit", "P_final_position", "K", "epsilon", "epm_params"):
        del epj[key]
    for point in epj["trajectory"]:
        del point["epm"]
    del epj["trajectory"][1]["v_t"], epj["trajectory"][2]["turn"]
    found = read(tmp_path / "a-model", data)
    assert (found.model, found.script_id) == ("a-model", "script_900")
    assert found.initial == (-7, -9, -9)
    assert [turn.increment for turn in found.turns] == [(1, 1, 1)] * 2
    assert found.total_turns == 2
    # Without a starting point the form gives P_0; without a form the starting point does.
    del epj["trajectory"][0]
    assert read(tmp_path, data).initial == (-7, -9, -9)
    del epj["iedr_details"]
    epj["P_0_initial_deficit"] = [-1, -2, -3]
    assert read(tmp_path, data).initial == (-1, -2, -3)


def test_levels_that_empas_code_gives_no_points_for(tmp_path):
    data = result([(2, -1, 1, 0, 1, 0)], "")
    form = data["epj"]["trajectory"][1]["mdep_analysis"]
    form["CNeg_level"] = form.pop("C_Neg_level")
    form["A_Prog_level"] = 3
    found = read(tmp_path, data)
    progress = found.turns[0].progress
    assert (progress.cognitive.progress, progress.cognitive.setback) == (2, 0)
    assert progress.affective.progress == 0
    short = {"C.Prog": 1, "C.Neg": -1, "A.Prog": 0, "A.Neg": 0, "P.Prog": 2, "P.Neg": 0}
    data["epj"]["trajectory"][1]["mdep_analysis"] = short
    assert increment(read(tmp_path, data).turns[0].progress) == (-1, 0, 3)


def test_messages_of_one_speaker_in_a_row_are_joined(tmp_path):
    said = [("user", "a"), ("user", "b"), ("assistant", None), ("user", "c")]
    history = [{"role": role, "content": content} for role, content in said]
    found = read(tmp_path, result([GOOD], "", history=history))
    assert found.history == (("a\nb", ""), ("c", ""))


def test_recorded_numbers_are_the_files_own(tmp_path):
    found = read(tmp_path, result([(2, 0, 1, 0, 0, 0), BAD], ""))
    exact, rounded = replay(found), recorded(found)
    for ours, turn, file in zip(exact.turns, rounded.turns, found.turns, strict=True):
        assert turn.work == file.numbers["work"] == pytest.approx(ours.work, abs=0.0055)
        assert turn.state == ours.state
    assert epm_q_case(rounded).score == pytest.approx(epm_q_case(exact).score, abs=0.2)


def test_runs_that_failed_are_passed_over(tmp_path):
    write(tmp_path, result([GOOD], ""))
    failed = {"script_id": "script_901", "status": "error", "error": "no connection"}
    path = write(tmp_path, failed, "script_901_result.json")
    assert [found.script_id for found in read_results(tmp_path)] == ["script_900"]
    with pytest.raises(InputError, match=r"must hold a dialogue, got a run .* no connection"):
        read_results(path)
    with pytest.raises(InputError, match="must hold EMPA result files"):
        read_results(write(tmp_path / "none", failed, "script_901_result.json").parent)


def _at(data, address):
    for key in address[:-1]:
        data = data[key]
    return data, address[-1]


_FIRST = ("epj", "trajectory", 1)


@pytest.mark.parametrize(
    ("address", "value", "message"),
    [
        (("epj",), None, "epj must be an object, got nothing"),
        (("epj",), [1], "epj must be an object, got [1]"),
        (("epj", "trajectory"), {}, "epj.trajectory must be a list, got {}"),
        (("epj", "trajectory", 0), 7, "epj.trajectory[0] must be an object, got 7"),
        ((*_FIRST, "turn"), 0, "epj.trajectory[1].turn must be an integer of at least 1, got 0"),
        ((*_FIRST, "turn"), 1.5, "epj.trajectory[1].turn must be an integer of at least 1, got 1."),
        ((*_FIRST, "v_t"), [1, 2], "epj.trajectory[1].v_t must be a list of 3 numbers, got [1, 2]"),
        ((*_FIRST, "v_t", 2), "x", 'epj.trajectory[1].v_t[2] must be a number, got "x"'),
        ((*_FIRST, "P_t", 0), math.inf, "epj.trajectory[1].P_t[0] must be a finite number, got In"),
        ((*_FIRST, "distance"), True, "epj.trajectory[1].distance must be a number, got true"),
        ((*_FIRST, "epm", "delta_E"), "", 'epj.trajectory[1].epm.delta_E must be a number, got ""'),
        ((*_FIRST, "mdep_analysis"), "C", "epj.trajectory[1].mdep_analysis must be an object, got"),
        (
            (*_FIRST, "mdep_analysis", "C_Neg_level"),
            "-1",
            'epj.trajectory[1].mdep_analysis.C_Neg_level must be an integer, got "-1"',
        ),
        (
            ("epj", "iedr_details", "filled_iedr", "A.2"),
            4,
            "epj.iedr_details.filled_iedr.A.2 must be an integer of at least 0 and of at most 3",
        ),
        (
            ("epj", "iedr_details", "filled_iedr", "P.3"),
            None,
            "epj.iedr_details.filled_iedr.P.3 must be an integer of at least 0 and of at most 3",
        ),
        (("epj", "P_0_initial_deficit"), 3, "epj.P_0_initial_deficit must be a list of 3 numbers"),
        (("epj", "K"), 0, "epj.K must be an integer of at least 1, got 0"),
        (("epj", "epsilon"), "1", 'epj.epsilon must be a number, got "1"'),
        (("history", 0, "role"), "robot", "history[0].role must be one of actor, user, test_model"),
        (("history", 0, "content"), 5, "history[0].content must be a text, got 5"),
        (("termination_reason",), 5, "termination_reason must be a text, got 5"),
        (("total_turns",), -1, "total_turns must be an integer of at least 0, got -1"),
    ],
)
def test_a_malformed_field_is_named(tmp_path, address, value, message):
    data = result([GOOD, BAD], "")
    holder, key = _at(data, address)
    holder[key] = value
    path = write(tmp_path, data)
    with pytest.raises(InputError, match=re.escape(f"{path}: {message}")) as caught:
        read_results(path)
    assert "\n" not in str(caught.value)


def test_without_form_and_start_there_is_no_state(tmp_path):
    data = result([GOOD], "")
    del data["epj"]["P_0_initial_deficit"], data["epj"]["iedr_details"]
    del data["epj"]["trajectory"][0]
    with pytest.raises(InputError, match="P_0_initial_deficit must be a list of 3 numbers, got no"):
        read(tmp_path, data)


@pytest.mark.parametrize(("text", "words"), [("{", "is not JSON"), ("[]", "it must be an object")])
def test_a_file_that_is_no_result(tmp_path, text, words):
    with pytest.raises(InputError, match=words):
        read(tmp_path, text)
    with pytest.raises(InputError, match="cannot be read"):
        read_results(tmp_path / "no-such-file.json")


def test_a_value_that_was_read_already(tmp_path):
    path = tmp_path / "elsewhere.json"
    found = parse_result(Field(result([GOOD], ""), str(path)), path)
    assert found.path == path
    assert [role for role in ROLES if role in found.history[0][0]] == ["actor"]
