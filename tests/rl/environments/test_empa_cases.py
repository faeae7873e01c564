"""EMPA's cases as scenarios: the splits, the sheets, the forms, and what is malformed."""

from __future__ import annotations

import pytest

from normkit.errors import InputError
from normkit.rl.environments.empa_cases import load_empa, official_cases, scenario_id
from normkit.rl.environments.empa_results import read_results
from normkit.rl.environments.epm import initial_state
from normkit.rl.environments.scenario import INDICATORS
from normkit.rl.rubric import AXES
from tests.rl.environments.empa import FORM, metadata, result, sheet, story, write


@pytest.fixture
def root(tmp_path):
    """A copy of EMPA with one official case and two others, in the repository's layout."""
    data = tmp_path / "empa" / "data"
    for number in (900, 901, 902):
        write(data / "cases", sheet(), f"script_{number}.md")
    write(data, "script_900\n", "official_cases.txt")
    write(data, metadata("script_900"), "case_metadata.json")
    write(data / "scenarios", [story()], "character_stories.json")
    forms = [{"script_id": "script_901", "status": "success", "iedr": FORM | {"_detailed": {}}}]
    write(data / "precomputed", forms, "iedr_batch_results.json")
    write(tmp_path / "results" / "a-model", result([], ""))
    return tmp_path


def test_official_cases_are_held_out(root):
    assert [s.id for s in load_empa(root, "heldout")] == ["script-900"]
    assert [s.id for s in load_empa(root)] == ["script-901", "script-902"]
    assert [s.id for s in load_empa(root / "empa", "heldout")] == ["script-900"]
    assert load_empa(root / "empa" / "data") == load_empa(root)
    assert official_cases(root) == ["script_900"]
    (root / "empa" / "data" / "official_cases.txt").unlink()
    assert official_cases(root) == ["script_900"]


def test_a_case_is_read_whole(root):
    (case,) = load_empa(root, "heldout")
    assert case.category == "leisure"
    person = case.persona
    assert (person.name, person.age, person.threshold) == ("小禾", 31, "high")
    assert person.about == "在书店上班。 攒钱。"
    assert person.voice == "爱说笑 谨慎"
    assert case.situation == "链条断在路上。 第1段。 第2段。 第3段。 第4段。 她修了三次车。"
    assert case.needs == "想有人听。想有人懂！ 怕被催。"
    assert case.opening == "我的自行车 又坏了。"
    assert case.deficit == FORM
    assert case.points["affective"] == ("想有人陪她生气。", "也想有人笑")
    assert case.points["proactive"] == ("不想被催着买新车",)
    assert case.points["cognitive"] == ("想有人懂她为什么不换车",)
    # A chat model speaks for the person; there is nothing to recite.
    assert not any(case.lines[axis] for axis in AXES)
    assert case.hurt == case.relief == ()


def test_what_follows_a_name_is_not_part_of_it(root):
    longer = sheet().replace("姓名：小禾", "姓名：小禾\n示例参考：\n  大禾：早。\n姓名：XX")
    write(root / "empa" / "data" / "cases", longer, "script_902.md")
    assert load_empa(root)[1].persona.name == "小禾"


def test_forms_are_precomputed_recorded_or_estimated(root):
    first, second = load_empa(root)
    assert first.deficit == FORM
    assert first.category == "unknown"
    # The stated priorities of the sheet: affective high, cognitive medium, proactive low.
    assert [second.deficit[f"{letter}.3"] for letter in "CAP"] == [2, 3, 1]
    assert set(second.deficit) == set(INDICATORS)
    forms = {"script_902": {"status": "success", "iedr": dict.fromkeys(INDICATORS, 3)}}
    write(root / "empa" / "data" / "precomputed", forms, "iedr_batch_results.json")
    assert initial_state(load_empa(root)[1].deficit) == (-21, -27, -27)


@pytest.mark.parametrize(
    ("priorities", "levels"),
    [
        ("动机共情 > 情感共情 > 认知共情。想有人懂。", [1, 2, 3]),
        ("    认知共情：最高\n    情感共情：其次\n    动机共情：最低", [3, 2, 1]),
        ("1. 情感共情（高）：陪她。\n2. 认知共情（低）：懂她。", [1, 3, 2]),
        ("都想要。", [2, 2, 2]),
    ],
)
def test_priorities_are_understood_however_they_are_written(root, priorities, levels):
    write(root / "empa" / "data" / "cases", sheet(priorities), "script_902.md")
    case = load_empa(root)[1]
    assert [case.deficit[f"{letter}.3"] for letter in "CAP"] == levels
    assert all(case.points[axis] for axis in AXES)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("姓名：小禾", "", r"script_902\.md: 姓名 must be given, got nothing"),
        ("31岁", "成年", r"script_902\.md: 年龄 must have a number of years, got '成年'"),
        (
            "【高】",
            "很高",
            r"script_902\.md: 角色基础共情阈值 must name 【低】, 【中】 or 【高】, got",
        ),
        ("链条断在路上。", "", r"script_902\.md: 故事的起因 must be given, got nothing"),
        ("# 聊天话题", "# 话题", r"script_902\.md: 聊天话题 must be given, got nothing"),
    ],
)
def test_a_malformed_sheet_is_named(root, old, new, message):
    write(root / "empa" / "data" / "cases", sheet().replace(old, new), "script_902.md")
    with pytest.raises(InputError, match=message):
        load_empa(root)


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("case_metadata.json", {}, r"sampled_cases must be a list, got nothing"),
        ("case_metadata.json", metadata("a", category="钓鱼"), r"\[0\]\.category must be one of"),
        ("case_metadata.json", "{", r"is not JSON"),
        (
            "scenarios/character_stories.json",
            [{}],
            r"\[0\]\.故事的经过 must be an object, got noth",
        ),
        ("precomputed/iedr_batch_results.json", [{"iedr": FORM}], r"\[0\]\.script_id must be a t"),
        (
            "precomputed/iedr_batch_results.json",
            {"script_901": {"iedr": FORM | {"A.1": "2"}}},
            r'script_901\.iedr\.A\.1 must be an integer of at least 0 and of at most 3, got "2"',
        ),
        ("../../results/a-model/script_900_result.json", {"epj": 3}, r"epj must be an object, got"),
    ],
)
def test_a_malformed_file_is_named(root, name, data, message):
    path = write(root / "empa" / "data", data, name)
    with pytest.raises(InputError, match=message) as caught:
        load_empa(root)
    assert path.name in str(caught.value)


def test_folders_that_lack_what_is_asked_for(root):
    with pytest.raises(InputError, match="must hold official_cases"):
        load_empa(root / "results")
    for number in (901, 902):
        (root / "empa" / "data" / "cases" / f"script_{number}.md").unlink()
    with pytest.raises(InputError, match="that are other than official, got none"):
        load_empa(root)
    with pytest.raises(InputError, match="split must be train or heldout, got 'test'"):
        load_empa(root, "test")


def test_a_users_copy(empa_dir):
    """Every official case is read; its form gives the state that its results start from."""
    cases = load_empa(empa_dir, "heldout")
    assert len(cases) >= 3
    starts = {scenario_id(r.script_id): r.initial for r in read_results(empa_dir)}
    for case in cases:
        assert initial_state(case.deficit) == starts[case.id]
        assert case.category != "unknown"
