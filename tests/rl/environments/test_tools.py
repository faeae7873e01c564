"""The tool world: its tools on bad input, its tasks run again, its sessions."""

from __future__ import annotations

import json
import math
import re
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from normkit.errors import InputError
from normkit.rl.dialogue import Dialogue, Turn, settle
from normkit.rl.environment import Reply
from normkit.rl.environments import toolbox
from normkit.rl.environments.tool_tasks import TEMPLATES, make_tasks
from normkit.rl.environments.toolbox import MAX_RESULT, Toolbox, load_land
from normkit.rl.environments.tools import ToolWorld, ToolWorldConfig
from normkit.rl.tool_calls import ToolCall
from normkit.rl.tool_rewards import MatchOptions, answer_f1

BOX = Toolbox()
SPLITS = ("train", "heldout")


def run(name, **arguments):
    return BOX.run(ToolCall(name, arguments))


# ---------------------------------------------------------------------- calculator


@pytest.mark.parametrize(
    ("expression", "value"),
    [
        ("1 + 2 * 3", "7"),
        ("(1 + 2) * 3", "9"),
        ("10 - 4 - 3", "3"),
        ("2 ^ 3 ^ 2", "512"),
        ("2 ** -1", "0.5"),
        ("-2 ^ 2", "-4"),
        ("--3 - -4", "7"),
        ("1e3 / 8 / 5", "25"),
        (" .5*4. ", "2"),
        ("1/3", "0.3333333333"),
        ("0 * -1", "0"),
    ],
)
def test_calculator(expression, value):
    assert run("calculator", expression=expression).text == value


@pytest.mark.parametrize(
    ("expression", "reason"),
    [
        ("", "ends too early"),
        ("1 +", "ends too early"),
        ("1 2", "out of place"),
        ("(1", "ends too early"),
        ("(1 + 2 3", "does not close"),
        (")", "out of place"),
        ("1 / 0", "division by zero"),
        ("0 ^ -1", "division by zero"),
        ("9 ^ 9 ^ 9 ^ 9", "too large"),
        ("1e308 * 10", "not a finite"),
        ("(0 - 8) ^ .5", "not a finite"),
        ("__import__('os')", "no part of an expression"),
        ("abs(-1)", "no part of an expression"),
        ("1٢", "no part of an expression"),
        ("nan", "no part of an expression"),
        ("True", "no part of an expression"),
        ("1 if 1 else 2", "no part of an expression"),
        ("(" * 200 + "1" + ")" * 200, "longer than|too deep"),
        ("(" * 100 + "1" + ")" * 100, "too deep"),
        ("-" * 200 + "1", "too deep"),
        ("1+" * 1000 + "1", "longer than"),
    ],
)
def test_what_is_no_expression(expression, reason):
    result = run("calculator", expression=expression)
    assert not result.ok
    assert any(r in result.text for r in reason.split("|")), result.text


numbers = st.floats(0.01, 100).map(lambda x: f"{x:.3f}")


@given(
    st.recursive(
        numbers,
        lambda s: st.tuples(s, st.sampled_from("+-*"), s).map(lambda t: f"({t[0]} {t[1]} {t[2]})"),
        max_leaves=8,
    )
)
def test_the_calculator_is_pythons_arithmetic(expression):
    result = run("calculator", expression=expression)
    if len(expression) <= toolbox.MAX_TEXT:
        assert math.isclose(float(result.text), eval(expression), rel_tol=1e-8, abs_tol=1e-6)


# ---------------------------------------------------------------------- the other tools


@pytest.mark.parametrize(
    ("name", "arguments", "text"),
    [
        ("convert", {"value": 1, "source": "mi", "target": "km"}, "1.609344"),
        ("convert", {"value": 212, "source": "F", "target": "C"}, "100"),
        ("convert", {"value": -40, "source": "C", "target": "F"}, "-40"),
        ("convert", {"value": 0, "source": "K", "target": "C"}, "-273.15"),
        ("convert", {"value": 16, "source": "oz", "target": "lb"}, "1"),
        ("weekday", {"day": "2026-11-25"}, "Wednesday"),
        ("add_days", {"day": "2024-02-28", "count": 2}, "2024-03-01"),
        ("add_days", {"day": "2024-03-01", "count": -2.0}, "2024-02-28"),
        ("days_between", {"start": "2024-03-01", "end": "2023-03-01"}, "-366"),
        ("lookup", {"table": "towns", "name": "Norford", "field": "population"}, "20305"),
        ("query", {"sql": "SELECT COUNT(*), MAX(name) FROM towns WHERE 0"}, "0, none"),
        ("query", {"sql": "SELECT name FROM towns WHERE name = 'x'"}, "no rows"),
        ("search", {"text": "the Scarlet Harbour?"}, "Sailors call Rosthorpe the Scarlet Harbour."),
        ("search", {"text": "xyzzy"}, "no note fits"),
    ],
)
def test_tools(name, arguments, text):
    assert BOX.run(ToolCall(name, arguments)).text == text
    assert BOX.run(ToolCall(name.upper(), arguments)).text == text


@pytest.mark.parametrize(
    ("name", "arguments", "reason"),
    [
        ("teleport", {}, "no tool 'teleport'"),
        ("weekday", {}, "weekday takes day"),
        ("weekday", {"day": "2026-11-25", "zone": "x"}, "weekday takes day"),
        ("weekday", {"day": 20261125}, "day must be a string"),
        ("weekday", {"day": "2026-13-01"}, "not a date"),
        ("weekday", {"day": "25 Nov 2026"}, "not a date"),
        ("weekday", {"day": "٢٠٢٦-١١-٢٥"}, "not a date"),
        ("add_days", {"day": "2026-01-01", "count": 0.5}, "whole number"),
        ("add_days", {"day": "2026-01-01", "count": 10**9}, "out of range"),
        ("add_days", {"day": "2026-01-01", "count": 10**12}, "out of range"),
        ("convert", {"value": True, "source": "m", "target": "km"}, "value must be a number"),
        ("convert", {"value": math.nan, "source": "m", "target": "km"}, "within 1e15"),
        ("convert", {"value": 10**400, "source": "m", "target": "km"}, "within 1e15"),
        ("convert", {"value": 1, "source": "m", "target": "kg"}, "m is a length, kg a mass"),
        ("convert", {"value": 1, "source": "m", "target": "parsec"}, "no unit 'parsec'"),
        ("lookup", {"table": "sqlite_master", "name": "x", "field": "sql"}, "no table"),
        ("lookup", {"table": "towns", "name": "x", "field": 'a" FROM b --'}, "no field"),
        ("lookup", {"table": "towns", "name": "' OR 1 --", "field": "name"}, "no row named"),
        ("search", {"text": "x" * 301}, "longer than 300"),
    ],
)
def test_wrong_calls_are_told_what_is_wrong(name, arguments, reason):
    result = BOX.run(ToolCall(name, arguments))
    assert not result.ok
    assert reason in result.text


@pytest.mark.parametrize(
    "sql",
    [
        "DELETE FROM towns",
        "INSERT INTO towns (name) VALUES ('x')",
        "DROP TABLE towns",
        "CREATE TABLE x (y)",
        "PRAGMA query_only = OFF",
        "ATTACH 'x.db' AS x",
        "SELECT 1; DELETE FROM towns",
        "SELECT load_extension('x')",
        "SELECT * FROM pragma_table_info('towns')",
        "VACUUM INTO 'x'",
        "BEGIN",
        "SELECT a.name FROM goods a, goods b, goods c ORDER BY a.name || b.name || c.name",
        "SELECT randomblob(1000000000)",
        "SELECT printf('%.*c', 1000000000, 'x')",
        "SELECT readfile('x')",
        "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n) SELECT MAX(i) FROM n",
        "SELECT COUNT(*) FROM goods a, goods b, goods c, goods d, goods e",
        "SELECT * FROM nowhere",
        "SELEKT 1",
        "SELECT '\ud800'",
        "SELECT ?",
        "\0",
    ],
)
def test_the_database_is_only_read_and_never_for_long(sql):
    result = run("query", sql=sql)
    assert not result.ok
    assert run("query", sql="SELECT COUNT(*) FROM towns").text == "40"


def doubling(times):
    """SQL that puts a text of ``9 * 6 ** times`` characters together, step by step."""
    sql = "SELECT 'aaaaaaaaa' a"
    for _ in range(times):
        sql = f"SELECT a||a||a||a||a||a a FROM({sql} LIMIT 1)"
    return sql


@pytest.mark.skipif(sys.version_info < (3, 11), reason="Python does not hand SQLite's limit on")
def test_texts_of_a_query_stay_short():
    assert run("query", sql=f"SELECT length(a) FROM({doubling(3)})").text == str(9 * 6**3)
    result = run("query", sql=f"SELECT a, a, a FROM({doubling(5)}), towns")
    assert result.text == "error: SQL: string or blob too big"


def test_a_query_of_few_but_slow_steps_is_stopped_by_the_clock(monkeypatch):
    monkeypatch.setattr(toolbox, "SQL_STEPS", 10**9)
    monkeypatch.setattr(toolbox, "_SQL_CHECKS", 10**6)
    monkeypatch.setattr(toolbox, "SQL_SECONDS", 0.05)
    sql = "SELECT COUNT(*) FROM goods a, goods b, goods c, goods d, goods e, goods f"
    assert "interrupted" in run("query", sql=sql).text


def test_any_thread_may_ask_the_database():
    with ThreadPoolExecutor(4) as pool:
        names = [row["name"] for row in load_land().tables["towns"]]
        calls = [ToolCall("lookup", {"table": "towns", "name": n, "field": "name"}) for n in names]
        assert [result.text for result in pool.map(BOX.run, calls)] == names


def test_results_are_cut():
    result = run("query", sql="SELECT * FROM towns")
    assert result.ok
    assert len(result.text) == MAX_RESULT


@settings(max_examples=200)
@given(
    st.sampled_from([*BOX.tools, "x"]),
    st.dictionaries(
        st.sampled_from(sorted({p for t in BOX.tools.values() for p in t.parameters})),
        st.text(max_size=20) | st.integers() | st.floats() | st.none() | st.lists(st.integers()),
        max_size=4,
    ),
)
def test_no_call_raises(name, arguments):
    assert isinstance(BOX.run(ToolCall(name, arguments)).text, str)


# ---------------------------------------------------------------------- tasks


def test_there_are_enough_tasks_of_three_to_six_calls():
    assert [len(make_tasks(split)) for split in SPLITS] == [252, 80]
    for split in SPLITS:
        assert {len(task.gold) for task in make_tasks(split)} == {3, 4, 5, 6}


@pytest.mark.parametrize("split", SPLITS)
def test_reference_traces_do_what_they_say(split):
    fresh = Toolbox()
    for task in make_tasks(split):
        results = [fresh.run(call) for call in task.gold]
        assert all(r.ok for r in results)
        assert tuple(r.text for r in results) == task.results
        assert task.answer == task.template.answer.format(*task.results)
        assert all(max(task.template.needs(i), default=-1) < i for i in range(len(task.gold)))
        assert json.loads(json.dumps([c.to_json() for c in task.gold]))


@pytest.mark.parametrize("split", SPLITS)
def test_answers_are_not_to_be_had_without_the_tools(split):
    tasks = make_tasks(split)
    assert len({json.dumps([c.to_json() for c in task.gold]) for task in tasks}) == len(tasks)
    assert not any(set(t.results) & {"0", "none", "no rows"} for t in tasks)
    for task in tasks:
        assert not set(task.answer.split()) & set(re.findall(r"[\w.-]+", task.question))
    best = max(sum(answer_f1(x.answer, t.answer) for t in tasks) for x in tasks)
    assert best / len(tasks) < 0.06  # of always giving the same answer


def test_splits_share_neither_templates_nor_questions_nor_rows():
    train, heldout = (make_tasks(split) for split in SPLITS)
    assert not {t.template.name for t in train} & {t.template.name for t in heldout}
    assert len({t.question for t in (*train, *heldout)}) == len(train) + len(heldout)
    assert len({t.id for t in (*train, *heldout)}) == len(train) + len(heldout)
    calls = [{json.dumps(c.to_json()) for t in tasks for c in t.gold} for tasks in (train, heldout)]
    assert not calls[0] & calls[1]
    land = load_land()
    names = [row["name"] for rows in land.tables.values() for row in rows]
    for name in [*names, *land.nicknames.values()]:
        used = [any(name in t.question for t in tasks) for tasks in (train, heldout)]
        assert used != [True, True], name


def test_a_result_is_needed_where_an_argument_holds_it():
    (density,) = (t for t in TEMPLATES if t.name == "density")
    assert [sorted(density.needs(i)) for i in range(4)] == [[], [0], [0], [1, 2]]


# ---------------------------------------------------------------------- sessions


def tag(call):
    return f"<tool_call>{json.dumps(call.to_json())}</tool_call>"


def play(world, task, replies):
    session = world.start(task, 0)
    return session, [world.step([session], [Reply(text)])[0] for text in replies]


def gold(task_id):
    return next(t for split in SPLITS for t in make_tasks(split) if t.id == task_id)


@pytest.mark.parametrize("task_id", ["freight-00", "caravan-03", "discount-05"])
def test_the_reference_trace_earns_everything(task_id):
    task = gold(task_id)
    world = ToolWorld()
    replies = [*map(tag, task.gold), f"<answer>{task.answer}</answer>"]
    session, steps = play(world, task_id, replies)
    assert [s.reward for s in steps] == [1.0] * len(replies)
    assert [s.end_reason for s in steps] == [None] * len(task.gold) + ["success"]
    assert steps[0].message == f"<tool_response>{task.results[0]}</tool_response>"
    assert steps[-1].message is None
    scores = world.score(session)
    assert (scores["score"], scores["rate"], scores["answer"]) == (1, 1, 1)
    assert scores["repeated"] == scores["wrong"] == scores["unreadable"] == 0


def test_several_calls_in_a_turn_bad_ones_and_repeats():
    task = gold("freight-00")
    first, second, _ = task.gold
    text = tag(first) + tag(ToolCall("calculator", {"expression": "1 +"})) + "<tool_call>{"
    world = ToolWorld()
    session, steps = play(world, task.id, [text, tag(first) + tag(second)])
    assert steps[0].message.count("<tool_response>") == 3
    assert "ends too early" in steps[0].message
    assert "does not end" in steps[0].message
    # The later call of the calculator is the better one: the first turn's reward falls with it.
    assert steps[0].reward == pytest.approx((1 + 2 / 3) / 2)
    assert steps[1].info["turn_rewards"] == [0.5, 0.5]
    scores = world.score(session)
    assert (scores["repeated"], scores["wrong"], scores["unreadable"]) == (1, 1, 1)
    assert scores["score"] == 2 * 2 / (4 + 3)


def test_a_world_of_outcomes_pays_the_answer_only():
    task = gold("freight-00")
    world = ToolWorld(ToolWorldConfig(reward="outcome"))
    replies = [*map(tag, task.gold), f"<answer>{task.answer}</answer>"]
    _, steps = play(world, task.id, replies)
    assert [s.reward for s in steps] == [0, 0, 0, 1]
    assert steps[-1].info["turn_rewards"] == [0, 0, 0, 1]


@pytest.mark.parametrize("method", ["hungarian", "greedy", "ot"])
def test_calls_without_end_are_ended(method):
    task = gold("freight-00")
    world = ToolWorld(ToolWorldConfig(max_turns=3, matching=MatchOptions(method)))
    session, steps = play(world, task.id, [tag(task.gold[0]) * 30] * 3)
    assert [s.end_reason for s in steps] == [None, None, "max_turns"]
    assert steps[0].message.count("<tool_response>") == 4 + 1
    assert steps[0].message.count("too many calls") == 1
    assert len(session.results) == len(session.calls) == 90
    assert sum(steps[-1].info["turn_rewards"]) <= 1 / 30 + 1e-9
    with pytest.raises(InputError, match="must not have ended"):
        world.step([session], [Reply("")])


@pytest.mark.parametrize(
    ("text", "reason", "reward"),
    [
        ("", "neither calls nor an answer", 0),
        ("I do not know.", "neither calls nor an answer", 0),
        ("<answer>about 5 or so</answer>", "answered", 0),
        ("<answer></answer>", "answered", 0),
    ],
)
def test_other_endings(text, reason, reward):
    _, (step,) = play(ToolWorld(), "freight-00", [text])
    assert (step.end_reason, step.reward, step.message) == (reason, reward, None)


def test_thoughts_neither_call_nor_answer():
    task = gold("freight-00")
    first, second, _ = map(tag, task.gold)
    thought = f"<think>First {second}, then <answer>7</answer>.</think>"
    session, steps = play(ToolWorld(), task.id, [thought + first, f"<think>{second}"])
    assert session.calls == [task.gold[0]]
    assert [s.end_reason for s in steps] == [None, "neither calls nor an answer"]


BODIES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=10),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=6,
)
REPLIES = st.lists(
    st.sampled_from(
        ["<tool_call>", "</tool_call>", "<think>", "</think>", "<answer>", "{", "\\ud800"]
    )
    | st.text(max_size=10)
    | BODIES.map(json.dumps)
    | st.builds(
        lambda name, x: tag(ToolCall(name, {"text": x})), st.sampled_from([*BOX.tools]), BODIES
    )
    | st.sampled_from([tag(call) for call in make_tasks("train")[0].gold]),
    max_size=6,
).map("".join)
WORLD = ToolWorld()


@settings(max_examples=100, deadline=None)
@given(st.lists(REPLIES, min_size=1, max_size=4))
def test_no_reply_raises_or_is_more_than_a_file_can_hold(texts):
    session = WORLD.start("freight-00", 0)
    for text in texts:
        (step,) = WORLD.step([session], [Reply(text)])
        assert 0 <= step.reward <= 1
        json.dumps([step.info, step.message], ensure_ascii=False).encode()
        if session.ended is not None:
            break
    assert all(math.isfinite(value) for value in WORLD.score(session).values())


def test_sessions_side_by_side_are_sessions_alone():
    world = ToolWorld()
    tasks = [gold("freight-00"), gold("gap-01"), gold("stock-02")]
    sessions = [world.start(t.id, 0) for t in tasks]
    texts = [tag(t.gold[0]) for t in tasks[:2]] + ["<answer>7</answer>"]
    together = world.step(sessions, [Reply(t) for t in texts])
    alone = [play(world, t.id, [text])[1][0] for t, text in zip(tasks, texts, strict=True)]
    assert together == alone
    assert world.step([], []) == []


def test_a_finished_dialogue_gets_its_final_rewards():
    task = gold("freight-00")
    close = ToolCall("lookup", {**task.gold[0].arguments, "name": "x"})
    _, steps = play(ToolWorld(), task.id, [tag(close), tag(task.gold[0]), "stop"])
    turns = [Turn("", "", [], [], False, s.reward, s.info) for s in steps]
    dialogue = Dialogue(task.id, 0, 0, 0, "", turns, [], "", {})
    # Three parameters, all named, two right.
    assert [t.reward for t in turns] == [pytest.approx(4 / 5), 1, 0]
    settle(dialogue)
    assert [t.reward for t in turns] == [0, 1, 0]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ToolWorldConfig(max_turns=0), "max_turns"),
        (lambda: ToolWorldConfig(max_calls=0), "max_calls"),
        (lambda: ToolWorldConfig(reward="x"), "reward must be"),
        (lambda: ToolWorld().start("x", 0), "no task 'x'"),
        (lambda: ToolWorld().tasks("x"), "split must be"),
        (lambda: ToolWorld().step([], [Reply("")]), "one for each session"),
    ],
)
def test_bad_input(make, message):
    with pytest.raises(InputError, match=message):
        make()
