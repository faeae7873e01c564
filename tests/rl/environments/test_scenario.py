"""Scenario files: what is read, and how every mistake is named."""

from __future__ import annotations

import dataclasses
import json

import pytest
import yaml

from normkit.errors import InputError
from normkit.rl.environments.scenario import (
    CATEGORIES,
    builtin_scenarios,
    load_scenarios,
    parse_scenarios,
)
from tests.rl.fakes import scenario


def plain(**changes):
    return json.loads(json.dumps({**dataclasses.asdict(scenario()), **changes}))


def test_yaml_and_json_lines_are_read(tmp_path):
    pair = [plain(), plain(id="career-other")]
    (tmp_path / "a.yaml").write_text(yaml.safe_dump(pair, sort_keys=False))
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(x) + "\n" for x in pair))
    expected = [scenario(), scenario("career-other")]
    assert load_scenarios(tmp_path / "a.yaml") == expected
    assert load_scenarios(tmp_path / "a.jsonl") == expected


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"deficit": {**plain()["deficit"], "C.2": 4}}, r"deficit\.C\.2 must be an integer 0\.\.3"),
        ({"deficit": {**plain()["deficit"], "C.2": True}}, r"deficit\.C\.2"),
        ({"category": "cooking"}, "category must be one of living"),
        ({"id": "Not Kebab"}, "id must be kebab-case"),
        ({"opening": "  "}, "opening must be a text"),
        ({"hurt": []}, "hurt must be a list"),
        ({"lines": {"cognitive": ["x"]}}, "lines: affective must be given"),
        ({"persona": {**plain()["persona"], "age": "old"}}, r"persona\.age must be an integer"),
        ({"persona": {**plain()["persona"], "threshold": "any"}}, r"persona\.threshold"),
        ({"colour": "red"}, "colour"),
    ],
)
def test_a_wrong_field_is_named_with_its_line(changes, words, tmp_path):
    lines = [json.dumps(plain()), "", json.dumps({**plain(id="career-two"), **changes})]
    with pytest.raises(InputError, match=words) as caught:
        parse_scenarios("\n".join(lines), "mine.jsonl", json_lines=True)
    assert str(caught.value).startswith("mine.jsonl line 3:")


def test_the_line_in_yaml_is_that_of_the_field():
    text = yaml.safe_dump([plain(category="cooking")], sort_keys=False)
    line = next(n for n, row in enumerate(text.splitlines(), 1) if "cooking" in row)
    with pytest.raises(InputError, match=f"mine.yaml line {line}: category"):
        parse_scenarios(text, "mine.yaml")


def test_all_problems_are_reported_at_once():
    with pytest.raises(InputError) as caught:
        parse_scenarios(yaml.safe_dump([plain(category="x", opening="", hurt=[])]), "m.yaml")
    assert len(str(caught.value).splitlines()) == 3


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "holds no scenario"),
        ("a: 1", "a list of scenarios"),
        ("- [", "line"),
        ("- text", "a scenario must be a mapping"),
        ("- !!python/object:os.system {}", "line 1"),
    ],
)
def test_what_is_not_a_scenario_file(text, words):
    with pytest.raises(InputError, match=words):
        parse_scenarios(text, "m.yaml")


def test_names_are_unique(tmp_path):
    with pytest.raises(InputError, match="id must be a unique name"):
        parse_scenarios(yaml.safe_dump([plain(), plain()]), "m.yaml")
    with pytest.raises(InputError, match="cannot be read"):
        load_scenarios(tmp_path / "absent.yaml")


def test_the_shipped_scenarios():
    train, heldout = builtin_scenarios("train"), builtin_scenarios("heldout")
    assert len(train) >= 24
    assert len(heldout) >= 12
    assert not {s.id for s in train} & {s.id for s in heldout}
    for split, least in ((train, 4), (heldout, 2)):
        for category in CATEGORIES:
            assert sum(s.category == category for s in split) >= least
    openings = [s.opening for s in [*train, *heldout]]
    assert len(set(openings)) == len(openings)
