"""Scenario files: what is read, and how every mistake is named."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import json

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from normkit.errors import InputError
from normkit.rl.environments.scenario import (
    CATEGORIES,
    INDICATORS,
    builtin_scenarios,
    load_scenarios,
    parse_scenarios,
)
from normkit.rl.rubric import AXES
from tests.rl.fakes import scenario


def plain(**changes):
    return json.loads(json.dumps({**dataclasses.asdict(scenario()), **changes}))


def dump(*entries):
    return yaml.safe_dump(list(entries), sort_keys=False, allow_unicode=True)


def without(entry, *path):
    entry = copy.deepcopy(entry)
    inner = entry
    for key in path[:-1]:
        inner = inner[key]
    del inner[path[-1]]
    return entry


def problems(text, json_lines=False):
    with pytest.raises(InputError) as caught:
        parse_scenarios(text, "m.yaml", json_lines)
    return str(caught.value).splitlines()


# ------------------------------------------------------------------ what is read


@pytest.mark.parametrize("ending", ["yaml", "yml", "jsonl", "JSONL"])
def test_yaml_and_json_lines_are_read(ending, tmp_path):
    pair = [plain(), plain(id="career-other")]
    lines = "\n\n".join(json.dumps(entry) for entry in pair)
    path = tmp_path / f"mine.{ending}"
    path.write_text(dump(*pair) if ending.startswith("y") else lines, encoding="utf-8")
    assert load_scenarios(path) == [scenario(), scenario("career-other")]


def test_text_is_read_whatever_its_characters(tmp_path):
    opening = "Üben 😀 hilft\u2028nicht: \"so\" 'nicht' #3"
    read = "Üben 😀 hilft nicht: \"so\" 'nicht' #3"
    for number, text in enumerate(
        [
            json.dumps(plain(opening=opening)),
            json.dumps(plain(opening=opening), ensure_ascii=False),
            json.dumps(plain(opening=opening)).replace(", ", ",\t"),
            "\ufeff" + json.dumps(plain(opening=opening)) + "\r\n",
        ]
    ):
        path = tmp_path / f"{number}.jsonl"
        path.write_bytes(text.encode())
        assert load_scenarios(path)[0].opening == read
    assert parse_scenarios("\ufeff" + dump(plain(opening=opening)), "m.yaml")[0].opening == read


def test_lines_that_are_folded_in_the_file_are_one_line():
    text = dump(plain()).replace("My test broke.", ">\n    My test\n    broke.")
    assert parse_scenarios(text, "m.yaml") == [scenario()]


def test_anchors_serve_for_shared_parts():
    second = plain(id="career-two")
    first = dump(plain()).replace("persona:", "persona: &ada")
    second["persona"] = "PLACE"
    text = first + dump(second).replace("PLACE", "*ada")
    assert [s.persona.name for s in parse_scenarios(text, "m.yaml")] == ["Ada", "Ada"]


# ------------------------------------------------------------------ what is wrong in a field

PLAIN = plain()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"deficit": {**PLAIN["deficit"], "C.2": 4}}, "deficit.C.2 must be an integer 0..3, got "),
        ({"deficit": {**PLAIN["deficit"], "C.2": -1}}, "got the integer -1"),
        ({"deficit": {**PLAIN["deficit"], "C.2": True}}, "got the truth value true"),
        ({"deficit": {**PLAIN["deficit"], "C.2": 1.0}}, "got the number 1.0"),
        ({"deficit": {**PLAIN["deficit"], "C.2": None}}, "got nothing"),
        ({"deficit": {**PLAIN["deficit"], "C.2": 10**60}}, "an integer 0..3, got the integer 1000"),
        ({"deficit": dict.fromkeys(INDICATORS, 0)}, "deficit must have a level above 0"),
        ({"deficit": [1, 2]}, "deficit must be a mapping of C.1, C.2, C.3, A.1, "),
        ({"category": "cooking"}, "category must be one of living, health, "),
        (
            {"id": "Not Kebab"},
            "id must be kebab-case (a-z, 0-9 and single hyphens), got 'Not Kebab'",
        ),
        ({"id": "two--hyphens"}, "id must be kebab-case"),
        ({"id": 7}, "id must be a text (put it in quotes), got the integer 7"),
        ({"opening": "  "}, "opening must be a text that is not empty, got '  '"),
        ({"opening": ["a"]}, "opening must be a text, got a list"),
        ({"opening": {"a": 1}}, "opening must be a text, got a mapping"),
        ({"needs": None}, "needs must be a text, got nothing"),
        ({"situation": "lone \ud83d half"}, "situation must be a text of whole characters"),
        ({"hurt": []}, "hurt must be a list of at least one text, got a list without entries"),
        ({"relief": "fine"}, "relief must be a list of at least one text, got 'fine'"),
        ({"relief": ["a", "", "c"]}, "relief[1] must be a text that is not empty"),
        ({"relief": ["a", "b", " a "]}, "relief[2] must be unlike relief[0], got ' a '"),
        ({"lines": {**PLAIN["lines"], "affective": 3}}, "lines.affective must be a list"),
        ({"lines": without(PLAIN["lines"], "affective")}, "lines.affective must be given"),
        ({"points": without(PLAIN["points"], "proactive")}, "points.proactive must be given"),
        ({"points": {**PLAIN["points"], "social": ["x"]}}, "a key of points must be one of cogn"),
        ({"persona": without(PLAIN["persona"], "voice")}, "persona.voice must be given"),
        ({"persona": {**PLAIN["persona"], "age": "old"}}, "persona.age must be an integer 1..120"),
        ({"persona": {**PLAIN["persona"], "age": 0}}, "persona.age must be an integer 1..120"),
        ({"persona": {**PLAIN["persona"], "threshold": "any"}}, "persona.threshold must be one of"),
        ({"persona": "Ada"}, "persona must be a mapping of name, age, about, voice, threshold"),
        ({"colour": "red"}, "a key of a scenario must be one of id, category, "),
    ],
)
def test_a_wrong_field_is_named_with_its_line(changes, words):
    lines = [json.dumps(PLAIN), "", json.dumps({**plain(id="career-two"), **changes})]
    found = problems("\n".join(lines), json_lines=True)
    assert len(found) == 1
    assert found[0].startswith("m.yaml line 3: ")
    assert words in found[0]


@pytest.mark.parametrize("key", [f.name for f in dataclasses.fields(scenario())])
def test_every_key_must_be_given_once(key):
    assert problems(dump(without(PLAIN, key))) == [
        f"m.yaml line 1: {key} must be given, got nothing"
    ]
    twice = dump(PLAIN) + "".join(
        f"  {line}\n" for line in yaml.safe_dump({key: PLAIN[key]}).splitlines()
    )
    line = len(dump(PLAIN).splitlines()) + 1
    assert problems(twice) == [f"m.yaml line {line}: {key} must be given once, got it twice"]


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("category: career", "category: cooking", "category must be one of"),
        ("name: Ada", "name: No", "persona.name must be a text (put it in quotes), got the truth"),
        ("name: Ada", "name: 2024-01-02", "(put it in quotes), got the date 2024-01-02"),
        ("age: 30", "age: 1:30", "persona.age must be an integer 1..120, got the integer 1:30"),
        ("age: 30", "age: 0x1e", "persona.age must be an integer"),
        ("age: 30", "age: 030", "persona.age must be an integer 1..120, got the integer 030"),
        ("age: 30", f"age: {10**60}{'0' * 5000}", "persona.age must be an integer 1..120"),
        ("C.2: 1", "C.2: high", "deficit.C.2 must be an integer 0..3, got 'high'"),
        ("affective line 1", '" "', "lines.affective[1] must be a text that is not empty"),
        ("ouch two", "!!python/name:os.system ''", "a value with the tag tag:yaml.org,2002:python"),
        ("ouch two", "!!map text", "hurt[1] must be a text, got a value with the tag"),
        ("ouch two", "!!str [a]", "hurt[1] must be a text, got a value with the tag"),
        ("category: career", "[a, b]: career", "a key of a scenario must be one of"),
    ],
)
def test_the_line_in_yaml_is_that_of_the_field(old, new, words):
    text = dump(plain(id="career-first"), PLAIN)
    before, _, after = text.rpartition(old)
    line = before.count("\n") + 1
    found = problems(before + new + after)
    assert any(f.startswith(f"m.yaml line {line}: ") and words in f for f in found)


def test_names_are_unique_even_of_scenarios_with_other_problems():
    text = dump(PLAIN, plain(opening=""))
    second = text.rindex("- id:")
    line = text.count("\n", 0, second) + 1
    assert f"m.yaml line {line}: id must be unique (line 1 has the same), got 'career-test'" in (
        problems(text)
    )
    assert "id must be unique (line 1" in problems(json.dumps([PLAIN, PLAIN]))[0]


def test_all_problems_are_reported_in_the_order_of_the_file():
    entry = without(plain(category="x", opening="", hurt=[]), "persona", "age")
    found = problems(dump(entry))
    lines = [int(f.split()[2].rstrip(":")) for f in found]
    assert len(found) == 4
    assert lines == sorted(lines)


def test_the_first_twenty_problems_are_shown():
    found = problems(dump(*(plain(id=f"career-{i}", opening="") for i in range(27))))
    assert len(found) == 21
    assert found[-1] == "and 7 more"
    assert len(problems(dump(*(plain(id=f"career-{i}", opening="") for i in range(20))))) == 20


# ------------------------------------------------------------------ what is no scenario file


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "m.yaml must hold at least one scenario, got none"),
        ("# nothing yet\n", "m.yaml must hold at least one scenario"),
        ("[]", "m.yaml must hold at least one scenario"),
        ("a: 1", "m.yaml line 1: the file must be a list of scenarios, got a mapping"),
        ("\n\njust words", "m.yaml line 3: the file must be a list of scenarios, got 'just words'"),
        ("- [", "m.yaml line 1: it is not YAML: while parsing a flow"),
        ("- a\n- b: 'open\n", "m.yaml line 3: it is not YAML: "),
        ("- a\n\tb", "it is not YAML"),
        ("- a\n---\n- b\n", "expected a single document in the stream"),
        ("- *nowhere", "found undefined alias"),
        ("- a\n- b\x00", "m.yaml line 2: it is not YAML: character U+0000"),
        ("[" * 5000, "nested too deeply"),
        ("- text", "a scenario must be a mapping of id, category, "),
        ("- &a [*a]", "a scenario must be a mapping"),
        ("- !!python/object:os.system {}", "m.yaml line 1: a scenario must be a mapping"),
        ("- !!map [a]", "m.yaml line 1: a scenario must be a mapping"),
    ],
)
def test_what_is_not_a_scenario_file(text, words):
    assert any(words in problem for problem in problems(text))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("\n \n", "m.yaml must hold at least one scenario"),
        ('\n{"id": }', "m.yaml line 2: it is not JSON: Expecting value (column 8)"),
        ("[1]", "m.yaml line 1: a scenario must be a mapping of id"),
        ("NaN", "m.yaml line 1: a scenario must be a mapping"),
        ("[" * 99999, "m.yaml line 1: it is not JSON that can be read"),
        ("1" * 5000, "m.yaml line 1: it is not JSON that can be read"),
    ],
)
def test_what_is_not_json_lines(text, words):
    assert any(words in problem for problem in problems(text, json_lines=True))


def test_every_broken_json_line_is_reported():
    found = problems("\n".join(['{"id"', json.dumps(PLAIN), "oops"]), json_lines=True)
    assert [f.split(":")[0] for f in found] == ["m.yaml line 1", "m.yaml line 3"]


def test_files_that_cannot_be_read(tmp_path):
    with pytest.raises(InputError, match="cannot be read"):
        load_scenarios(tmp_path / "absent.yaml")
    (tmp_path / "latin.yaml").write_bytes("- Ä".encode("latin-1"))
    with pytest.raises(InputError, match="cannot be read"):
        load_scenarios(tmp_path / "latin.yaml")
    (tmp_path / "folder.yaml").mkdir()
    with pytest.raises(InputError, match="cannot be read"):
        load_scenarios(tmp_path / "folder.yaml")
    with pytest.raises(InputError, match=r"must be a \.yaml or \.jsonl file, got 'my\.csv'"):
        load_scenarios(tmp_path / "my.csv")
    with pytest.raises(InputError, match="split must be train or heldout, got 'test'"):
        builtin_scenarios("test")


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=5,
)
PATHS = st.sampled_from(
    [(key,) for key in PLAIN]
    + [(key, inner) for key in ("persona", "deficit", "points", "lines") for inner in PLAIN[key]]
)


@settings(max_examples=150, deadline=None)
@given(PATHS, VALUES)
def test_any_value_anywhere_is_read_or_named(path, value):
    entry = copy.deepcopy(PLAIN)
    inner = entry
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = value
    for text, json_lines in ((json.dumps(entry), True), (json.dumps([entry]), False)):
        message = ""
        try:
            parse_scenarios(text, "m", json_lines)
        except InputError as error:
            message = str(error)
        assert not message or path[0] in message


@settings(max_examples=150, deadline=None)
@given(st.text(alphabet="-:{}[]&*!|>'\"#%@,? \n\tab1~\x00é", max_size=40), st.booleans())
def test_no_text_breaks_the_reader(text, json_lines):
    with contextlib.suppress(InputError):
        parse_scenarios(text, "m", json_lines)


# ------------------------------------------------------------------ the shipped files


@pytest.mark.parametrize(("split", "count", "each"), [("train", 48, 8), ("heldout", 24, 4)])
def test_the_shipped_scenarios(split, count, each):
    shipped = builtin_scenarios(split)
    assert len(shipped) == count
    for category in CATEGORIES:
        assert sum(s.category == category for s in shipped) == each


def test_the_shipped_splits_share_nothing():
    train, heldout = builtin_scenarios("train"), builtin_scenarios("heldout")
    assert not {s.id for s in train} & {s.id for s in heldout}
    openings = [s.opening for s in [*train, *heldout]]
    assert len(set(openings)) == len(openings)
    names = [(s.persona.name, s.situation) for s in [*train, *heldout]]
    assert len(set(names)) == len(names)


def test_the_shipped_lines_do_not_serve_two_banks():
    for s in [*builtin_scenarios("train"), *builtin_scenarios("heldout")]:
        said = [s.opening, *s.hurt, *s.relief, *(line for axis in AXES for line in s.lines[axis])]
        assert len(set(said)) == len(said), s.id
