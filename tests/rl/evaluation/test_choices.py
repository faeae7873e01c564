from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from normkit.rl.evaluation.choices import Question, read_answers, vote
from tests.reference import evaluation as reference

QUESTION = Question("answer", ("Call her", "Go away", "Say nothing", "I am sorry"), 0)
ORDER = (2, 0, 3, 1)
EMOTION = Question("emotion", ("Joy", "Fear"), 1)
CAUSE = Question("cause", tuple(f"cause {i}" for i in range(7)), 3)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("A", 2),
        ("b", 0),
        (" (C) ", 3),
        ("D.", 1),
        ("**B**", 0),
        ("B) Call her", 0),
        ("B：call her.", 0),
        ("Call her", 0),
        ('"Go away!"', 1),
        ("I am sorry", 3),  # a text that begins with a letter of its own
        ("B) Go away", None),  # letter and text contradict each other
        ("E", None),
        ("The answer is B", None),
        ("A or B", None),
        ("", None),
        ("call", None),
    ],
)
def test_a_choice_is_named_by_letter_or_text(text, expected):
    assert QUESTION.read(text, ORDER) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('{"answer": "B"}', 0),
        ('Here you are:\n```json\n{"Answer": "b) Call her"}\n```', 0),
        ("Answer: B", 0),
        ("**Answer:** B", 0),
        ("B", 0),
        ('{"answer": "B"} or rather {"answer": "C"}', None),
        ('{"answer": "B"} and again {"answer": "b"}', 0),
        ("answer: A\nanswer: B", None),
        ('{"answer": 1}', None),
        ('{"answer": "B"', None),
        ('{"choice": "B"}', None),
        ("I would take B because it helps.", None),
    ],
)
def test_one_answer_is_read_from_json_lines_or_bare(text, expected):
    assert read_answers(text, [QUESTION], [ORDER]) == (expected,)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('{"emotion": "A", "cause": "G"}', (1, 6)),
        ('{"emotion": "Fear", "cause": "cause 3"}', (1, 3)),
        ("emotion: B\ncause: D", (0, 3)),
        ("情 emotion：B\nCause: H", (None, None)),
        ('{"emotion": "B"}', (0, None)),
        ("A, B", (None, None)),
        ("", (None, None)),
    ],
)
def test_two_answers_need_their_names(text, expected):
    orders = [(1, 0), tuple(range(7))]
    assert read_answers(text, [EMOTION, CAUSE], orders) == expected


def test_shuffles_are_permutations_that_depend_on_the_seed_alone():
    orders = [CAUSE.shuffled(f"seed {i}") for i in range(300)]
    assert orders == [CAUSE.shuffled(f"seed {i}") for i in range(300)]
    assert all(sorted(order) == list(range(7)) for order in orders)
    # The right choice stands at each of 7 places about 300 / 7 = 43 times.
    places = Counter(order.index(CAUSE.label) for order in orders)
    assert len(places) == 7
    assert all(20 < n < 70 for n in places.values())
    assert CAUSE.listed((1, 0)) == "A) cause 1\nB) cause 0"


@given(st.lists(st.one_of(st.none(), st.integers(0, 3)), max_size=9))
def test_the_vote_is_the_oracles(answers):
    assert vote(answers) == reference.majority(answers)


def test_a_tie_goes_to_the_earlier_answer():
    assert vote([None, 2, 1, 1, 2]) == 2
    assert vote([None, None]) is None
