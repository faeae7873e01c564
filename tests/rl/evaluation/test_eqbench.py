import json
import math
from pathlib import Path

import numpy as np
import pytest

from normkit.errors import InputError
from normkit.rl.evaluation.eqbench import (
    Item,
    ask_eqbench,
    question_score,
    read_eqbench,
    read_ratings,
    scaled_difference,
    score_eqbench,
)
from normkit.rl.judge import Failed
from tests.reference import evaluation as reference

FILE = Path(__file__).parent / "data" / "eqbench.json"
REFERENCE = {"Calm": 1.0, "Angry": 7.0, "Sad": 0.0, "Glad": 4.0}
ITEM = Item("1", "Rate. Revised scores: yours", REFERENCE)
PLAIN = Item("1", "Rate.", REFERENCE)


def ratings(*numbers):
    return "\n".join(f"{name}: {n}" for name, n in zip(REFERENCE, numbers, strict=True))


def reply(first, revised):
    return (
        f"First pass scores:\n{ratings(*first)}\n\nCritique: too low.\n\n"
        f"Revised scores:\n{ratings(*revised)}\n\n[End of answer]"
    )


@pytest.mark.parametrize(
    ("d", "penalty"),
    # Worked out by hand from 6.5 / (1 + exp(-1.2 (d - 4))); above 5 the distance itself.
    [
        (0, 0),
        (1, 0.17288),
        (2, 0.540623),
        (3, 1.504589),
        (4, 3.25),
        (5, 4.995411),
        (6, 6),
        (10, 10),
    ],
)
def test_penalties_are_those_worked_out(d, penalty):
    assert scaled_difference(d) == pytest.approx(penalty, abs=1e-6)


def test_score_of_a_worked_answer():
    rated = dict(zip(REFERENCE, (2, 5, 0, 10), strict=True))  # distances 1, 2, 0, 6
    assert question_score(rated, REFERENCE) == pytest.approx(49.80314, abs=1e-5)
    assert question_score(REFERENCE, REFERENCE) == 100


def test_scores_are_the_oracles_and_random_ones_average_to_about_zero():
    rng = np.random.default_rng(0)
    scores = []
    for _ in range(4000):
        rated, right = rng.integers(0, 11, (2, 4))
        score = question_score(dict(enumerate(rated)), dict(enumerate(right)))
        assert score == pytest.approx(reference.eqbench_score(rated, right), abs=1e-9)
        scores.append(score)
    assert min(scores) < -50  # not floored
    # References spread evenly are farther from random answers than the real ones are.
    assert -20 < np.mean(scores) < 20


def test_first_and_revised_ratings_are_read_apart():
    first, revised = read_ratings(reply((1, 2, 3, 4), (5, 6, 7, 8)), ITEM)
    assert first == dict(zip(REFERENCE, (1, 2, 3, 4), strict=True))
    assert revised == dict(zip(REFERENCE, (5, 6, 7, 8), strict=True))
    assert read_ratings(ratings(1, 2, 3, 4), PLAIN) == (first, None)


@pytest.mark.parametrize(
    ("text", "readable"),
    [
        ("", (False, False)),
        (ratings(1, 2, 3, 4), (False, False)),  # headings are missing
        (reply((1, 2, 3, 4), (5, 6, 7, 8)).split("Critique")[0], (False, False)),
        (f"Revised scores:\n{ratings(1, 2, 3, 4)}", (False, True)),
        (reply((1, 2, 3, 4), (5, 6, 7, 8)).replace("Calm", "Cool", 1), (False, True)),
        (reply((1, 2, 3, 4), (5, 6, 7, "much")), (True, False)),
        (reply((1, 2, 3, 4), (5, 6, 7, 8)) + "\nBored: 3", (True, False)),
        (reply((1, 2, 3, 4), (5, 6, 7, 8)).upper(), (False, False)),  # names are not any names
        (reply((1, 2, 3, 4), (5, 6, 7, 8)).replace("First pass", "FIRST PASS"), (True, True)),
    ],
)
def test_only_the_four_names_of_the_reference_are_an_answer(text, readable):
    assert tuple(found is not None for found in read_ratings(text, ITEM)) == readable


def test_the_official_score_is_that_of_the_better_pass():
    near, far = (1, 7, 0, 4), (9, 0, 9, 9)
    items = [Item(str(i), ITEM.prompt, REFERENCE) for i in range(3)]

    def means(replies):
        return [m.interval().mean for m in score_eqbench(items, replies)]

    official, first, revised = means([reply(far, near)] * 3)
    assert official == revised == 100 > first
    official, first, revised = means([reply(near, far)] * 3)
    assert official == first == 100 > revised
    # The better pass does not count where it could be read far less often.
    official, first, revised = means([reply(far, near), *[reply(far, (1, 1, 1, "?"))] * 2])
    assert revised == 100
    assert official == first < 0


@pytest.mark.parametrize("form", ["object", "list", "lines", "literal"])
def test_all_forms_of_the_file_are_read_alike(tmp_path, form):
    questions = json.loads(FILE.read_text(encoding="utf-8"))
    expected = read_eqbench(FILE)
    assert [item.qid for item in expected] == ["1", "2", "3"]
    assert all(item.revises for item in expected)
    assert expected[0].reference == {"Touched": 8, "Bored": 0, "Ashamed": 2, "Surprised": 7}
    rows = list(questions.values())
    if form == "literal":
        key = "reference_answer_fullscale"
        rows = [{**row, key: repr(row[key])} for row in rows]
    path = tmp_path / ("file.jsonl" if form in ("lines", "literal") else "file.json")
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    else:
        path.write_text(json.dumps(rows if form == "list" else questions), encoding="utf-8")
    assert read_eqbench(path) == expected


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"prompt": ""}, r"line 2: prompt must be a text that is not empty"),
        ({"reference_answer_fullscale": None}, "reference_answer_fullscale must be an object"),
        ({"reference_answer_fullscale": "__import__('os').getcwd()"}, "must be an object, or a"),
        ({"reference_answer_fullscale": "[1, 2]"}, "must be an object, or a text that spells one"),
        ({"reference_answer_fullscale": "{" * 200}, "must be an object, or a text that spells one"),
        ({"reference_answer_fullscale": "[" * 9000}, "must be an object, or a text that spells"),
        ({"emotion2_score": 11}, r"emotion2_score must be a number from 0 to 10, got 11"),
        ({"emotion2_score": "much"}, "emotion2_score must be a number"),
        ({"emotion2_score": None}, "emotion2_score must be a number, got nothing"),
        ({"emotion2": "Touched"}, "must be an object with four different emotions"),
        ({"emotion2": "very sad"}, "emotion2 must be one word"),
    ],
)
def test_a_wrong_field_is_named_with_file_and_line(tmp_path, change, words):
    rows = list(json.loads(FILE.read_text(encoding="utf-8")).values())
    first, row = rows[0], dict(rows[0])
    for key, value in change.items():
        if key.startswith("emotion"):
            answer = {**row["reference_answer_fullscale"], key: value}
            row["reference_answer_fullscale"] = answer
        else:
            row[key] = value
    path = tmp_path / "file.jsonl"
    path.write_text(json.dumps(first) + "\n" + json.dumps(row) + "\n", encoding="utf-8")
    with pytest.raises(InputError, match=words) as caught:
        read_eqbench(path)
    assert "file.jsonl line 2" in str(caught.value)


@pytest.mark.parametrize(
    ("text", "words"), [("{}", "at least one"), ("3", "object"), ("x", "JSON")]
)
def test_what_is_no_question_file_is_refused(tmp_path, text, words):
    path = tmp_path / "file.json"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(InputError, match=words):
        read_eqbench(path)
    with pytest.raises(InputError, match="cannot be read"):
        read_eqbench(tmp_path / "absent.json")


class Saying:
    name = "saying"

    def __init__(self, replies):
        self.replies = replies
        self.asked = []

    def complete(self, conversations):
        self.asked += conversations
        return self.replies[len(self.asked) - len(conversations) : len(self.asked)]


def test_unreadable_answers_are_left_out_and_counted():
    items = [Item(str(i), ITEM.prompt, REFERENCE) for i in range(6)]
    good = reply((1, 7, 0, 4), (1, 7, 0, 4))
    outcome = ask_eqbench(Saying([good] * 5 + ["no"]), items)
    assert outcome.measures[0].interval().mean == 100
    assert outcome.counts == {"answers": 6, "failed": 0, "parsed": 5}
    assert math.isnan(outcome.records[5]["score"])
    assert not any("83%" in note for note in outcome.notes)  # 5 of 6 are 83.33%, as official
    outcome = ask_eqbench(Saying([good] * 4 + ["no", Failed("time-out")]), items)
    assert "4 of 6 answers could be read" in outcome.notes[0]
    assert "under 83%" in outcome.notes[1]
    assert "time-out" in outcome.notes[2]


def test_nothing_readable_is_no_score():
    outcome = ask_eqbench(Saying(["no", "no"]), [ITEM, Item("2", ITEM.prompt, REFERENCE)])
    assert outcome.measures[0].interval() is None
    assert "under 83%" in outcome.notes[1]
