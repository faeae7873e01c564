"""Similarity of tool calls: worked numbers of the card, laws, a loop and its pairs as oracles."""

from __future__ import annotations

import operator

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from normkit.rl.tool_calls import AnyOf, ToolCall, read_bfcl
from normkit.rl.tool_similarity import similarities, similarity_matrix, tool_similarity
from tests.reference import matchtir as oracle

GOLD = ToolCall("weather", {"city": "Paris", "unit": "C"})

values = st.sampled_from([1, 2, "1", "x", True, [1, 2], [2, 1], {"a": 1}, None])
calls = st.builds(
    ToolCall,
    st.sampled_from(["a", "A", "b"]),
    st.dictionaries(st.sampled_from("xyz"), values, max_size=3),
)


def plain(call):
    return call.name, dict(call.arguments)


@pytest.mark.parametrize(
    ("predicted", "gold", "expected"),
    [
        (ToolCall("weather", {"city": "Paris", "days": 3}), GOLD, 0.583333),
        (GOLD, GOLD, 1.0),
        (ToolCall("WEATHER", {"city": "Paris", "unit": "C"}), GOLD, 1.0),
        (ToolCall("climate", dict(GOLD.arguments)), GOLD, 0.0),
        (ToolCall("now"), ToolCall("now"), 1.0),
        (ToolCall("weather", {"place": 1}), GOLD, 1 / 4),
        (ToolCall("weather"), GOLD, 1 / 4),
        (GOLD, ToolCall("weather"), 1 / 2),
        (ToolCall("f", {"x": "3"}), ToolCall("f", {"x": 3}), 2 / 3),
        (ToolCall("f", {"x": 3.0}), ToolCall("f", {"x": 3}), 1.0),
        (ToolCall("f", {"x": True}), ToolCall("f", {"x": 1}), 1.0),
        (ToolCall("f", {"x": [2, 1]}), ToolCall("f", {"x": [1, 2]}), 2 / 3),
        # One parameter too many: J is 2/3, all values right.
        (ToolCall("weather", {**GOLD.arguments, "days": 3}), GOLD, (1 + 2 / 3 + 2) / 4),
    ],
)
def test_worked_similarities(predicted, gold, expected):
    assert tool_similarity(predicted, gold) == pytest.approx(expected, abs=1e-6)


@given(calls, calls)
def test_similarity_is_that_of_the_loop(p, g):
    s = tool_similarity(p, g)
    assert 0 <= s <= 1
    assert tool_similarity(g, g) == 1
    assert s == pytest.approx(oracle.similarity(plain(p), plain(g)), abs=1e-12)
    if len(p.arguments) == len(g.arguments):
        assert s == pytest.approx(tool_similarity(g, p), abs=1e-12)


def test_values_can_be_compared_otherwise():
    lenient = tool_similarity(
        ToolCall("f", {"x": "3", "y": ["A"]}),
        ToolCall("f", {"x": 3, "y": ["a"]}),
        lambda a, b: str(a).lower() == str(b).lower(),
    )
    assert lenient == 1


def test_accepted_values_and_parameters_that_may_be_left_out():
    (gold,) = read_bfcl([{"f": {"x": [1, "one"], "y": ["", 5], "z": [{"k": [1], "o": ["", 2]}]}}])

    def s(**arguments):
        return tool_similarity(ToolCall("f", arguments), gold)

    assert s(x="one", z={"k": 1}) == s(x=1, y=5, z={"k": 1, "o": 2}) == 1
    # y given wrongly: three parameters, two of them right.
    assert s(x=1, y=6, z={"k": 1}) == pytest.approx(4 / 5)
    assert s(x=1, z={}) == s(x=1, z={"k": 1, "q": 1}) == s(x=1, z=7) == pytest.approx(3 / 4)
    listed = ToolCall("f", {"x": AnyOf(([{"a": AnyOf((1, 2))}],))})
    assert tool_similarity(ToolCall("f", {"x": [{"a": 2}]}), listed) == 1
    assert tool_similarity(ToolCall("f", {"x": [{"a": 2}] * 2}), listed) == pytest.approx(2 / 3)


patterns = st.recursive(
    st.one_of(values, st.just(float("nan"))),
    lambda inner: st.one_of(
        st.builds(AnyOf, st.lists(inner, min_size=1, max_size=3).map(tuple), st.booleans()),
        st.lists(inner, max_size=2),
        st.dictionaries(st.sampled_from("ab"), inner, max_size=2),
    ),
    max_leaves=4,
)
references = st.builds(
    ToolCall,
    st.sampled_from(["a", "A", "b"]),
    st.dictionaries(st.sampled_from("xyz"), patterns, max_size=3),
)


@settings(deadline=None, max_examples=150)
@given(
    st.lists(st.tuples(st.lists(calls, max_size=4), st.lists(references, max_size=3)), max_size=4),
    st.booleans(),
)
def test_a_batch_has_the_similarities_of_its_pairs(dialogues, shared):
    if shared:  # one list of references for all, as dialogues of a group have
        dialogues = [(p, dialogues[0][1]) for p, _ in dialogues]
    predicted, gold = [p for p, _ in dialogues], [g for _, g in dialogues]
    flat = [call for p in predicted for call in p]
    for equal in (operator.eq, lambda a, b: str(a) == str(b)):
        found = similarities(flat, [len(p) for p in predicted], gold, equal)
        for row, p, g in zip(found, predicted, gold, strict=True):
            expected = np.zeros(row.shape)
            for i, j in np.ndindex(len(p), len(g)):
                expected[i, j] = tool_similarity(p[i], g[j], equal)
            assert row.tolist() == expected.tolist()


def test_values_that_are_not_of_json_are_compared_one_by_one():
    pair = ToolCall("f", {"x": {1, 2}}), ToolCall("f", {"x": {2, 1}})
    assert similarity_matrix(pair[:1], pair[1:]).tolist() == [[1.0]]
    nan = float("nan")
    gold = ToolCall("f", {"x": nan, "y": [nan]})
    assert similarity_matrix([gold], [gold]).item() == tool_similarity(gold, gold) == 1 / 2


@pytest.mark.parametrize(("m", "n"), [(0, 0), (0, 2), (2, 0), (3, 2)])
def test_the_matrix_has_a_row_per_call(m, n):
    assert similarity_matrix([GOLD] * m, [GOLD] * n).tolist() == [[1.0] * n] * m
