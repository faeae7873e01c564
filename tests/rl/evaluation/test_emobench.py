import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from normkit.errors import InputError, NormkitError
from normkit.rl.evaluation.emobench import (
    ask_emobench,
    item_messages,
    item_orders,
    question_prompt,
    read_emobench,
    score_emobench,
    weigh_emobench,
)
from normkit.rl.judge import Failed
from tests.reference import evaluation as reference

DATA = Path(__file__).parent / "data"


@pytest.fixture(scope="module")
def items():
    return read_emobench(DATA)


class Knowing:
    """Answers by a function of the item, the number of the conversation and its prompt."""

    name = "knowing"

    def __init__(self, answer):
        self.answer = answer
        self.asked = 0

    def complete(self, conversations):
        replies = []
        for (message,) in conversations:
            replies.append(self.answer(self.asked, message["content"]))
            self.asked += 1
        return replies


def letters(items, repeats, pick):
    """A model that picks, for item i and repeat r, the choices ``pick(item, r)`` by letter."""

    def answer(n, _prompt):
        item, repeat = items[n // repeats], n % repeats
        orders = item_orders(item, 0, repeat)
        said = {
            question.key: "ABCDEFG"[order.index(choice)]
            for question, order, choice in zip(
                item.questions, orders, pick(item, repeat), strict=True
            )
            if choice is not None
        }
        return json.dumps(said)

    return Knowing(answer)


def right(item, _repeat=0):
    return [question.label for question in item.questions]


def test_both_files_and_languages_are_read(items):
    assert [(i.task, i.language) for i in items].count(("EA", "en")) == 4
    assert {(i.task, i.language) for i in items} == {
        (task, language) for task in ("EA", "EU") for language in ("en", "zh")
    }
    causes = [len(i.questions[1].choices) for i in items if i.task == "EU"]
    assert causes == [4, 6, 7, 4]
    first = items[0]
    assert first.kind == "Response"
    assert first.questions[0].choices[first.questions[0].label].startswith("Say that missing it")


def test_one_of_the_files_is_enough(tmp_path):
    shutil.copy(DATA / "EU.jsonl", tmp_path)
    assert {item.task for item in read_emobench(tmp_path)} == {"EU"}
    with pytest.raises(InputError, match=r"must be a folder with EA.jsonl or EU.jsonl"):
        read_emobench(tmp_path / "nothing")


@pytest.mark.parametrize(
    ("task", "change", "words"),
    [
        ("EA", {"language": "fr"}, r"EA.jsonl line 2: language must be en or zh, got \"fr\""),
        ("EA", {"question type": "Song"}, "line 2: question type must be Action or Response"),
        ("EA", {"label": "no choice"}, "line 2: label must be one of choices"),
        ("EA", {"choices": ["a", "a"]}, "line 2: choices must be a list of 2 to 26 texts that"),
        ("EA", {"choices": "a"}, "line 2: choices must be a list"),
        ("EA", {"choices": ["a", ""]}, r"line 2: choices\[1\] must be a text that is not empty"),
        ("EA", {"scenario": None}, "line 2: scenario must be a text that is not empty"),
        ("EA", {"qid": "1"}, "line 2: qid must be different"),
        ("EU", {"cause_label": 3}, "EU.jsonl line 2: cause_label must be a text"),
        ("EU", {"emotion_choices": None}, "line 2: emotion_choices must be a list"),
        ("EU", {"coarse_category": " "}, "line 2: coarse_category must be a text"),
    ],
)
def test_a_wrong_field_is_named_with_file_and_line(tmp_path, task, change, words):
    lines = (DATA / f"{task}.jsonl").read_text(encoding="utf-8").splitlines()
    row = {**json.loads(lines[1]), **change}
    lines[1] = json.dumps(row)
    (tmp_path / f"{task}.jsonl").write_text("\n".join(lines), encoding="utf-8")
    with pytest.raises(InputError, match=words):
        read_emobench(tmp_path)


@pytest.mark.parametrize(
    ("text", "words"), [("{", "line 1 is not JSON"), ("", "empty"), ("[1]", "must be an object")]
)
def test_what_is_not_a_row_is_refused(tmp_path, text, words):
    (tmp_path / "EA.jsonl").write_text(text, encoding="utf-8")
    with pytest.raises(InputError, match=words):
        read_emobench(tmp_path)


def test_prompts_show_every_choice_and_ask_for_the_form(items):
    for item in items:
        orders = item_orders(item, 0, 0)
        (message,) = item_messages(item, orders)
        assert item.scenario in message["content"]
        for question, order in zip(item.questions, orders, strict=True):
            assert question.listed(order) in message["content"]
            assert f'"{question.key}": "<' in message["content"]
            prompt = question_prompt(item, question, order)
            assert question.listed(order) in prompt
            assert "JSON" not in prompt
        assert "{subject}" not in message["content"]


def test_prompts_do_not_hint_at_the_label(items):
    for item in items:
        prompt = item_messages(item, item_orders(item, 0, 0))[0]["content"]
        for question in item.questions:
            text = question.choices[question.label]
            assert prompt.count(text) == 1 + item.scenario.count(text)


def test_scores_are_the_oracles(items):
    rng = np.random.default_rng(0)
    answers = [
        tuple(
            None if rng.random() < 0.2 else int(rng.integers(len(q.choices))) for q in i.questions
        )
        for i in items
    ]
    answers[0] = (items[0].questions[0].label,)
    measures = {measure.name: measure for measure in score_emobench(items, answers)}

    def expected(task, language, parts, category=None):
        return reference.percent_right(
            [
                [(a, q.label) for a, q in list(zip(chosen, i.questions, strict=True))[parts]]
                for i, chosen in zip(items, answers, strict=True)
                if (i.task, i.language) == (task, language) and category in (None, i.category)
            ]
        )

    for language in ("en", "zh"):
        parts = {"both": slice(None), "emotion": slice(0, 1), "cause": slice(1, 2)}
        cases = {f"EmoBench EU {language} {k}": ("EU", language, v) for k, v in parts.items()}
        cases[f"EmoBench EA {language}"] = ("EA", language, slice(None))
        for name, case in cases.items():
            mean = measures[name].interval().mean
            assert mean == pytest.approx(expected(*case)), name
            for category in {i.category for i in items if (i.task, i.language) == case[:2]}:
                mean = measures[f"{name}: {category}"].interval().mean
                assert mean == pytest.approx(expected(*case, category)), name


def test_a_model_that_knows_the_answers_has_all_right(items):
    outcome = ask_emobench(letters(items, 3, right), items)
    assert all(measure.interval().mean == 100 for measure in outcome.measures)
    assert outcome.notes == ()
    assert outcome.counts == {
        "answers": 30,
        "failed": 0,
        "unreadable": 0,
        "items_without_answer": 0,
    }
    assert outcome.records[0]["vote"] == outcome.records[0]["label"]


def test_repeats_are_voted_on(items):
    def mostly(item, repeat):
        labels = right(item)
        return labels if repeat < 2 else [(label + 1) % 4 for label in labels]

    outcome = ask_emobench(letters(items, 3, mostly), items)
    assert all(measure.interval().mean == 100 for measure in outcome.measures)
    outcome = ask_emobench(letters(items, 1, lambda i, r: mostly(i, 2)), items, repeats=1)
    assert all(measure.interval().mean == 0 for measure in outcome.measures)


def test_always_the_same_letter_is_about_chance_over_shuffles(items):
    only = [item for item in items if item.task == "EA"]
    chat = Knowing(lambda n, prompt: "A")
    hits = [
        measure.interval().mean
        for seed in range(200)
        for measure in ask_emobench(chat, only, repeats=1, seed=seed).measures[:2]
    ]
    assert 20 < np.mean(hits) < 30  # four choices


def test_unreadable_answers_count_as_wrong_and_are_reported(items):
    def answer(n, _prompt):
        return Failed("time-out") if n == 0 else "I am not sure."

    outcome = ask_emobench(Knowing(answer), items, repeats=1)
    assert all(measure.interval().mean == 0 for measure in outcome.measures)
    assert outcome.counts["unreadable"] == len(items) - 1
    assert outcome.counts["failed"] == 1
    assert outcome.counts["items_without_answer"] == len(items)
    assert "10 of 10 answers (100%) could not be read" in outcome.notes[0]
    assert "time-out" in outcome.notes[1]


def test_a_half_answer_counts_for_its_half(items):
    outcome = ask_emobench(
        letters(items, 1, lambda i, r: [*right(i)[:1], None][: len(i.questions)]), items, 1
    )
    means = {measure.name: measure.interval().mean for measure in outcome.measures}
    assert means["EmoBench EU en emotion"] == 100
    assert means["EmoBench EU en both"] == means["EmoBench EU en cause"] == 0
    assert outcome.counts["unreadable"] == 4


def test_a_model_that_answers_nothing_stops_the_run(items):
    with pytest.raises(NormkitError, match="answered nothing; the last reason: no server"):
        ask_emobench(Knowing(lambda n, prompt: Failed("no server")), items)


def test_likelihood_takes_the_likeliest_choice_whatever_the_shuffle(items):
    def scorer(prompt, answers):
        assert all(answer in prompt for answer in answers)
        labels = {q.choices[q.label] for item in items for q in item.questions}
        return [0.0 if answer in labels else -1.0 for answer in answers]

    seen = []
    outcome = weigh_emobench(scorer, items, report=lambda *done: seen.append(done))
    assert all(measure.interval().mean == 100 for measure in outcome.measures)
    assert seen[-1] == (30, 30)
    assert outcome.notes == ()
