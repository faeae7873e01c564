"""Turn rewards and metrics: worked numbers of the card, laws, a loop as oracle."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from normkit.errors import InputError
from normkit.rl.tool_calls import Parsed, ToolCall
from normkit.rl.tool_rewards import (
    MatchOptions,
    Trace,
    answer_f1,
    count_solved,
    find_answer,
    tool_trace,
    turn_rewards,
)
from tests.reference import matchtir as oracle

values = st.sampled_from([1, 2, "1", "x", True, [1, 2], [2, 1], {"a": 1}, None])
calls = st.builds(
    ToolCall,
    st.sampled_from(["a", "A", "b"]),
    st.dictionaries(st.sampled_from("xyz"), values, max_size=3),
)


def plain(call):
    return call.name, dict(call.arguments)


def trace(turns, gold, answers=None):
    return Trace([Parsed(list(turn), []) for turn in turns], gold, answers or {})


def pay(turns, gold, answers=None, **options):
    return turn_rewards([trace(turns, gold, answers)], MatchOptions(**options))[0]


# ---------------------------------------------------------------------- turns


A, B, C = (ToolCall(name, {"x": 1}) for name in "abc")
WRONG = ToolCall("a", {"x": 2})


def test_a_turn_earns_the_mean_of_its_calls():
    assert pay([[A], [B], [C]], [A, B, C]).turns == [1, 1, 1]
    assert pay([[A, B, C]], [A, B, C]).turns == [1]
    assert pay([[A, A, A, A]], [A]).turns == [0.25]
    found = pay([[WRONG, A], []], [A])
    assert found.turns == [0.5, 0]
    assert found.calls == [0, 1]
    assert found.assignment == [-1, 0]
    assert found.plan is None


def test_order_does_not_matter_over_the_whole_dialogue():
    assert pay([[C], [A], [B]], [A, B, C]).turns == [1, 1, 1]


@pytest.mark.parametrize("method", ["hungarian", "greedy", "ot"])
def test_more_predicted_than_gold_and_the_reverse_and_neither(method):
    assert sum(pay([[A], [B], [C]], [A], method=method).turns) <= 1
    assert pay([[A]], [A, B, C], method=method).turns == (
        pytest.approx([1 / 3], abs=1e-4) if method == "ot" else [1]
    )
    assert pay([[A], []], [], method=method).turns == [0, 0]
    assert pay([[], []], [A], method=method).turns == [0, 0]
    assert pay([], [A], method=method).turns == []
    assert turn_rewards([], MatchOptions(method)) == []


def test_the_penalty_of_what_is_not_needed():
    assert pay([[A, B]], [A], unmatched=-0.5).turns == [0.25]
    assert pay([[A]], [], unmatched=-0.5).turns == [-0.5]


def test_transport_pays_by_its_plan():
    found = pay([[A], [A], [B]], [A, B], method="ot")
    np.testing.assert_allclose(found.turns, [0.25, 0.25, 1 / 3], atol=1e-4)
    np.testing.assert_allclose(found.plan.sum(1), [1 / 3] * 3)
    assert found.assignment is None
    whole = pay([[A], [B]], [A, B], method="ot", rescale=True)
    np.testing.assert_allclose(whole.turns, [1, 1], atol=1e-3)


def test_unreadable_calls_are_counted_and_paid_as_asked():
    turns = [Parsed([A], ["not JSON"]), Parsed([], ["no name"])]
    for unreadable, expected in (("drop", [1, 0]), ("count", [0.25, -0.5])):
        options = MatchOptions(unmatched=-0.5, unreadable=unreadable)
        (found,) = turn_rewards([Trace(turns, [A])], options)
        assert found.turns == expected
        assert found.failures == ["not JSON", "no name"]


@settings(deadline=None, max_examples=100)
@given(
    st.lists(
        st.tuples(st.lists(st.lists(calls, max_size=3), max_size=4), st.lists(calls, max_size=4)),
        max_size=4,
    )
)
def test_a_batch_is_the_authors_loop_dialogue_by_dialogue(dialogues):
    found = turn_rewards([trace(t, g) for t, g in dialogues], MatchOptions("greedy"))
    for got, (turns, gold) in zip(found, dialogues, strict=True):
        expected = oracle.turn_rewards([[plain(c) for c in t] for t in turns], [*map(plain, gold)])
        np.testing.assert_allclose(got.turns, expected, atol=1e-12)
        assert len(got.calls) == sum(map(len, turns))


# ---------------------------------------------------------------------- conversations


def test_a_conversation_is_paid_turn_by_turn():
    messages = [
        {"role": "system", "content": "Use tools."},
        {"role": "user", "content": "Weather in Paris?"},
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [{"function": {"name": "a", "arguments": json.dumps({"x": 1})}}],
        },
        {"role": "tool", "content": '<tool_call>{"name": "b"}</tool_call>'},
        {
            "role": "assistant",
            "content": 'Hm. <tool_call>{"name": "b", "arguments": {"x": 2}}</tool_call>',
        },
        {"role": "assistant", "content": "I am thinking."},
        {
            "role": "assistant",
            "content": '<answer>Rain, at 7.</answer><tool_call>{"name": "c"}</tool_call>',
        },
    ]
    found = tool_trace(messages, [A, B, C], answer="rain 8")
    assert found.turns == pytest.approx([1, 2 / 3, 0, 2 * 1 / (3 + 2)])
    assert found.calls == pytest.approx([1, 2 / 3])
    assert tool_trace(messages, [A, B, C]).turns[-1] == 0


def test_a_conversation_without_an_assistant():
    assert tool_trace([{"role": "user", "content": "hi"}], [A]).turns == []


@pytest.mark.parametrize(
    ("content", "reward"),
    [
        ([{"type": "text", "text": "<answer>"}, {"type": "text", "text": "7</answer>"}], 1),
        ("<think><answer>7</answer></think>no", 0),
        ("<think>8?</think><answer>7</answer>", 1),
        ('<think><tool_call>{"name": "a", "arguments": {"x": 1}}</tool_call></think>', 0),
        (7, 0),
    ],
)
def test_content_comes_in_parts_and_thoughts_do_not_count(content, reward):
    assert tool_trace([{"role": "assistant", "content": content}], [A], "7").turns == [reward]


@pytest.mark.parametrize(
    ("messages", "gold", "name"),
    [([3], [], "messages"), (None, [], "messages"), ([], [{"name": "a"}], "gold")],
)
def test_a_wrong_conversation_is_named(messages, gold, name):
    with pytest.raises(InputError, match=f"{name} must"):
        tool_trace(messages, gold)


@given(st.text(max_size=30), st.text(max_size=30))
def test_answers_are_scored_as_sets_of_words(a, b):
    assert 0 <= answer_f1(a, b) <= 1
    assert answer_f1(a, b) == pytest.approx(answer_f1(b, a))


@pytest.mark.parametrize(
    ("a", "b", "expected"),
    [
        ("The answer: 7!", "the ANSWER 7", 1),
        ("7 7 7", "7", 1),
        ("a b", "b c d", 0.4),
        ("", "", 0),
        ("x", "y", 0),
    ],
)
def test_worked_answers(a, b, expected):
    assert answer_f1(a, b) == pytest.approx(expected) == pytest.approx(oracle.answer_f1(a, b))


def test_finding_the_answer():
    assert find_answer("so <answer>\n7 kg </answer> or <answer>8</answer>") == "7 kg"
    assert find_answer("<answer>7") is None


# ---------------------------------------------------------------------- metrics


def test_what_was_solved():
    needed = [("a", "1"), ("b", "2"), ("a", "3")]
    made = [A, A, WRONG, ToolCall("B", {"x": 1}), C]
    found = count_solved(made, ["1", "1", "error", "2", "2"], needed)
    assert (found.solved, found.calls, found.needed) == (2, 5, 3)
    assert (found.repeated, found.wrong) == (1, 1)
    assert (found.precision, found.rate, found.f1) == (2 / 5, 2 / 3, 4 / 8)


def test_nothing_made_and_nothing_needed():
    assert count_solved([], [], [("a", "1")]).f1 == 0
    assert count_solved([], [], []).f1 == count_solved([], [], []).rate == 1
    assert count_solved([A], ["1"], []).f1 == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "km"}, "method"),
        ({"unreadable": "x"}, "unreadable"),
        ({"unmatched": float("nan")}, "unmatched"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(InputError, match=f"{message} must be"):
        MatchOptions(**options)
