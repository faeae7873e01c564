"""Readers of tool calls: the public forms, and what models write instead."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from normkit.errors import InputError
from normkit.rl.tool_calls import (
    MAX_CHARACTERS,
    AnyOf,
    Reference,
    ToolCall,
    read_bfcl,
    read_ftrl,
    read_openai,
    read_python,
    read_qwen,
)
from normkit.rl.tool_similarity import tool_similarity

WEATHER = ToolCall("weather", {"city": "Paris", "days": 3})


def function(name, arguments):
    return {"id": "1", "type": "function", "function": {"name": name, "arguments": arguments}}


def tag(text):
    return f"<tool_call>\n{text}\n</tool_call>"


@pytest.mark.parametrize("arguments", [dict(WEATHER.arguments), json.dumps(WEATHER.arguments)])
def test_arguments_may_be_an_object_or_a_string(arguments):
    assert read_openai([function("weather", arguments)]).calls == [WEATHER]
    text = tag(json.dumps({"name": "weather", "arguments": arguments}))
    assert read_qwen(f"Let me look.\n{text}\n{text}").calls == [WEATHER, WEATHER]
    bare = {"name": "weather", "arguments": arguments}
    assert read_openai([bare]).calls == [WEATHER]


@pytest.mark.parametrize("arguments", ["", None, {}, "{}"])
def test_no_arguments(arguments):
    assert read_openai([function("now", arguments)]).calls == [ToolCall("now")]


@pytest.mark.parametrize("nothing", [None, []])
def test_no_calls(nothing):
    assert read_openai(nothing).calls == read_openai(nothing).failures == []
    assert read_qwen("It rains.").calls == []


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ("{'name': 'now'}", "not JSON"),
        ("[1, 2]", "not an object"),
        ('{"arguments": {}}', "no name"),
        ('{"name": 3}', "no name"),
        ('{"name": "f", "arguments": [1]}', "arguments are not an object"),
        ('{"name": "f", "arguments": "3"}', "arguments are not an object"),
        ('{"name": "f", "arguments": "{"}', "not JSON"),
        ('{"name": "f", "arguments": {"x": ' + "9" * 5000 + "}}", "not JSON"),
        ('{"name": "f", "arguments": {"x": ' + "[" * 200 + "]" * 200 + "}}", "deep"),
        ("[" * 15_000, "not JSON"),
        ('"' + "x" * MAX_CHARACTERS + '"', "longer than"),
        ('{"name": "f", "arguments": {"x": "\\ud800"}}', "surrogates"),
        ('{"name": "a"}{"name": "b"}', "not JSON"),
        ('[{"name": "a"}, {"name": "b"}]', "not an object"),
        ('{"name": "f", "arguments": {"x": ' + "9" * 10**7 + "}}", "longer than"),
        ("", "not JSON"),
    ],
)
def test_what_cannot_be_read_is_counted_with_its_reason(body, reason):
    good = tag('{"name": "now"}')
    found = read_qwen(tag(body) + good)
    assert found.calls == [ToolCall("now")]
    (failure,) = found.failures
    assert reason in failure


def test_of_a_parameter_that_stands_twice_the_last_counts():
    (call,) = read_qwen(tag('{"name": "f", "arguments": {"x": 1, "x": 2}}')).calls
    assert call == ToolCall("f", {"x": 2})


def test_arguments_that_are_too_deep_to_compare_are_refused_as_objects_too():
    deep = 1
    for _ in range(900):
        deep = [deep]
    found = read_openai([function("f", {"x": deep}), function("f", {"x": [[1]]})])
    assert found.calls == [ToolCall("f", {"x": [[1]]})]
    assert found.failures == ["the call is nested more than 50 deep"]


def test_a_tag_that_does_not_end_is_a_failure():
    found = read_qwen(
        '<tool_call>{"name": "a"}\n<tool_call>{"name": "b"}</tool_call><tool_call>{"n'
    )
    assert found.calls == [ToolCall("b")]
    assert found.failures == ["the tag <tool_call> does not end"] * 2


@pytest.mark.parametrize("tool_calls", ["x", 3, {"name": "f"}])
def test_tool_calls_of_another_kind(tool_calls):
    assert read_openai(tool_calls).failures == ["tool_calls is not a list"]


@pytest.mark.parametrize("entry", [None, 3, {"function": None}, {}, {"function": {"name": ""}}])
def test_entries_of_another_kind(entry):
    found = read_openai([entry, function("now", "")])
    assert found.calls == [ToolCall("now")]
    assert len(found.failures) == 1


@given(st.text(alphabet='<>/tol_ca{}[]":,1 ', max_size=80))
def test_no_text_raises(text):
    found = read_qwen(text)
    assert len(found.calls) + len(found.failures) == text.count("<tool_call>")


def test_bfcl():
    calls = read_bfcl(
        [
            {"book": {"city": ["Paris", "paris"], "class": ["", "eco"], "note": [""]}},
            {"go": {"to": [{"lat": [1.0], "lng": [2, 2.0]}], "ids": [[1, 2], [2, 1]]}},
        ]
    )
    assert calls[0] == ToolCall(
        "book",
        {
            "city": AnyOf(("Paris", "paris")),
            "class": AnyOf(("eco",), True),
            "note": AnyOf(("",), True),
        },
    )
    assert calls[1].arguments["to"] == AnyOf(({"lat": AnyOf((1.0,)), "lng": AnyOf((2, 2.0))},))
    assert calls[1].arguments["ids"] == AnyOf(([1, 2], [2, 1]))


def test_bfcl_of_objects_of_plain_values_and_of_nothing():
    """Both stand in the published files (live_multiple_121-46-0, live_simple_112-68-0)."""
    where = {"position": [{"lateral": 10.5}], "orientation": [30], "meta": "x"}
    (call,) = read_bfcl([{"headway": {"ego": [where], "start": []}}])
    assert call.arguments["start"] == AnyOf(())
    given = {"position": {"lateral": 10.5}, "orientation": 30, "meta": "x"}
    # Name, names of parameters, one value of two.
    assert tool_similarity(ToolCall("headway", {"ego": given, "start": []}), call) == 3 / 4
    given["position"] = {"lateral": 10}
    assert tool_similarity(ToolCall("headway", {"ego": given, "start": []}), call) == 2 / 4


def test_bfcl_of_turns_in_python():
    turns = [["cd(folder='document')", "sort('report.pdf')"], [], ["ls(a=True)"]]
    assert read_bfcl(turns, {"sort": ["file_name"]}) == [
        ToolCall("cd", {"folder": "document"}),
        ToolCall("sort", {"file_name": "report.pdf"}),
        ToolCall("ls", {"a": True}),
    ]


@pytest.mark.parametrize(
    ("text", "calls"),
    [
        ("now()", [ToolCall("now")]),
        (" [now(), now()] ", [ToolCall("now")] * 2),
        ("[]", []),
        (
            "math.sum(x=[1, -2.5], y=(None, True))",
            [ToolCall("math.sum", {"x": [1, -2.5], "y": [None, True]})],
        ),
        (
            "f(x={'a': {'b': 'é'}}, y='\\d')",
            [ToolCall("f", {"x": {"a": {"b": "é"}}, "y": "\\d"})],
        ),
        ("weather('Paris', days=3)", [WEATHER]),
    ],
)
def test_calls_in_python(text, calls):
    found = read_python(text, {"weather": ["city", "days"]})
    assert (found.calls, found.failures) == (calls, [])


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("It rains.", "not Python"),
        ("", "not Python"),
        ("f(", "not Python"),
        ("f(x=1, x=2)", "same name"),
        ("weather('Paris', city='Rome')", "same name"),
        ("f(**{'x': 1})", "of none"),
        ("weather(*['Paris'])", "not a literal"),
        ("weather(1, 2, 3)", "without a name"),
        ("f(x=9**9**9)", "not a literal"),
        ("f(x=open('y'))", "not a literal"),
        ("f(x={1, 2})", "not a literal"),
        ("f(x=b'1')", "not a literal"),
        ("f(x=1j)", "not a literal"),
        ("f(x='\\ud800')", "surrogates"),
        ("(lambda: 0)()", "no name"),
        ("3", "not one of Python"),
        ("f(x=" + "[" * 80 + "]" * 80 + ")", "deep"),
        ("f(x=" + "[" * 5000 + "]" * 5000 + ")", "not Python"),
        ("f(x=" + "-" * 15_000 + "1)", "not Python|not a literal"),
        ("f(x=" + "9" * 5000 + ")", "not Python|not a literal"),
        ("\0", "not Python"),
        ("x" * (MAX_CHARACTERS + 1), "longer than"),
    ],
)
def test_what_is_no_call_of_python(text, reason):
    found = read_python(text, {"weather": ["city", "days"]})
    assert found.calls == []
    (failure,) = found.failures
    assert any(one in failure for one in reason.split("|")), failure


@given(st.text(alphabet="fg(x=1,'[]{}:*-.)\\ \n", max_size=40))
def test_no_text_of_python_raises(text):
    found = read_python(text)
    assert all(json.loads(json.dumps(c.to_json())) == c.to_json() for c in found.calls)


@pytest.mark.parametrize(
    ("ground_truth", "message"),
    [
        ("x", "must be a list of calls"),
        ([3], r"\[0\] must be an object with one name"),
        ([{"a": {}, "b": {}}], "one name"),
        ([{"f": [1]}], "map f to its parameters"),
        ([{"f": {}}, {"f": {"x": 3}}], r"\[1\]: f.x must be a list of accepted values"),
        ([{"f": {"x": "3"}}], r"\[0\]: f.x must be a list"),
        (["f(x=1)", "f(3)"], r"\[1\]: f has arguments without a name"),
        ([["f(x=1)"], ["f(x=y)"]], r"\[1\]: an argument is not a literal"),
        (["f(x=1"], r"\[0\]: the calls are not Python"),
    ],
)
def test_wrong_bfcl(ground_truth, message):
    with pytest.raises(InputError, match=message):
        read_bfcl(ground_truth)


@pytest.mark.parametrize("dump", [json.dumps, lambda x: x])
def test_ftrl(dump):
    record = {
        "ground_truth": dump([{"name": "weather", "parameters": {"city": "Paris", "days": 3}}]),
        "unsolved_set": dump({"weather": ["rain"]}),
        "answer": 7,
        "codes": "{not looked at",
    }
    assert read_ftrl(record) == Reference([WEATHER], "7", {"weather": ["rain"]})
    assert read_ftrl({"ground_truth": dump([])}) == Reference([])
    del record["ground_truth"]  # as in the lines to test on
    assert read_ftrl(record) == Reference([], "7", {"weather": ["rain"]})


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({}, "ground_truth must be a list, got NoneType"),
        ({"ground_truth": "[{"}, "ground_truth is not JSON"),
        ({"ground_truth": [{"name": "f"}]}, r"ground_truth\[0\] must have a name and parameters"),
        ({"ground_truth": [], "unsolved_set": "[1]"}, "unsolved_set must be an object, got list"),
    ],
)
def test_wrong_ftrl(record, message):
    with pytest.raises(InputError, match=message):
        read_ftrl(record)
