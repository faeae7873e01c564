"""The scripted user: what is said next follows from the state, and nothing else."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from normkit.errors import InputError
from normkit.rl.rubric import AXES
from normkit.rl.user import UserRequest
from normkit.rl.users.scripted import ScriptedUser
from tests.rl.fakes import filled, scenario

INITIAL = (-12.0, -24.0, -9.0)
SCENARIO = scenario()
BANKS = {"hurt": SCENARIO.hurt, "relief": SCENARIO.relief, **SCENARIO.lines}
BANK_OF = {line: name for name, lines in BANKS.items() for line in lines}


def request(said=("My test broke.",), **changes):
    fields = {
        "scenario": SCENARIO,
        "history": tuple((message, "a reply") for message in said),
        "initial": INITIAL,
        "state": INITIAL,
        "progress": filled(),
        "seed": 1,
    }
    return UserRequest(**{**fields, **changes})


def answer(said=("My test broke.",), **changes):
    return ScriptedUser().respond([request(said, **changes)])[0]


def play(turns, **changes):
    """Messages of a dialogue in which nothing but the history changes."""
    said = ["My test broke."]
    for _ in range(turns):
        said.append(answer(said, **changes))
    return said[1:]


# ------------------------------------------------------------------ which bank


@pytest.mark.parametrize("progress", [filled(), None])
@pytest.mark.parametrize(
    ("state", "bank"),
    [
        ((-12.0, -12.0, -4.5), "cognitive"),
        ((-6.0, -24.0, -4.5), "affective"),
        ((-6.0, -12.0, -9.0), "proactive"),
        ((-12.0, -23.0, 0.0), "cognitive"),  # 24 points are less of 24 than 12 of 12
        ((3.0, -24.0, 5.0), "affective"),
        ((-1.0, -1.0, -1.0), "relief"),
        ((2.0, 4.0, 1.0), "relief"),
        ((9.0, 9.0, -8.4), "relief"),  # .297 of |P_0|: what is beyond zero does not count
        ((9.0, 9.0, -8.6), "proactive"),  # .304 of |P_0|
    ],
)
def test_the_bank_follows_from_the_state(state, bank, progress):
    assert BANK_OF[answer(state=state, progress=progress)] == bank


@pytest.mark.parametrize("axis", AXES)
@pytest.mark.parametrize("level", [-1, -2])
@pytest.mark.parametrize("state", [INITIAL, (0.0, 0.0, 0.0)])
def test_a_setback_on_any_axis_hurts_whatever_else_was_good(axis, level, state):
    levels = {a: (2, level if a == axis else 0) for a in AXES}
    assert BANK_OF[answer(state=state, progress=filled(**levels))] == "hurt"


def test_without_a_verdict_the_state_alone_decides():
    hurt = answer(progress=filled((0, -2)))
    assert BANK_OF[hurt] == "hurt"
    assert BANK_OF[answer((hurt,), progress=None)] == "cognitive"


def test_a_need_that_arose_later_counts_against_the_whole():
    state = (-2.0, -4.0, -20.0)
    assert BANK_OF[answer(initial=(-12.0, -24.0, 0.0), state=state)] == "proactive"
    state = (-12.0, -20.0, -2.0)
    assert BANK_OF[answer(initial=(-12.0, -24.0, 0.0), state=state)] == "cognitive"
    assert BANK_OF[answer(initial=(0.0, 0.0, 0.0), state=(0.0, -1.0, 0.0))] == "affective"
    assert BANK_OF[answer(initial=(0.0, 0.0, 0.0), state=(0.0, 0.0, 0.0))] == "relief"


@pytest.mark.parametrize(("share", "bank"), [(0.0, "affective"), (0.5, "relief"), (1.0, "relief")])
def test_the_share_at_which_relief_begins_can_be_chosen(share, bank):
    state = (0.0, -0.45 * math.hypot(*INITIAL), 0.0)
    assert BANK_OF[ScriptedUser(share).respond([request(state=state)])[0]] == bank


@pytest.mark.parametrize("share", [-0.1, 1.1, math.nan])
def test_the_share_is_a_share(share):
    with pytest.raises(InputError, match=r"relief must be in \[0, 1\]"):
        ScriptedUser(share)


# ------------------------------------------------------------------ which line


def test_a_bank_is_used_up_before_the_next_need_speaks():
    banks = [BANK_OF[line] for line in play(9, state=(-12.0, -12.0, -8.0))]
    assert banks == ["cognitive"] * 3 + ["proactive"] * 3 + ["affective"] * 3


def test_hurt_and_relief_give_way_to_needs_when_they_are_used_up():
    banks = [BANK_OF[line] for line in play(5, progress=filled((0, -1)))]
    assert banks == ["hurt"] * 2 + ["cognitive"] * 3
    banks = [BANK_OF[line] for line in play(5, state=(-1.0, -2.0, -3.0))]
    assert banks == ["relief"] * 2 + ["proactive"] * 3


@pytest.mark.parametrize(
    ("changes", "size"),
    [({}, 9), ({"progress": filled((0, -1))}, 11), ({"state": (0.0, 0.0, 0.0)}, 11)],
)
def test_when_all_is_said_the_line_said_longest_ago_returns(changes, size):
    said = play(4 * size, **changes)
    assert len(set(said[:size])) == size
    assert said == said[:size] * 4


def test_after_all_is_said_the_state_still_decides():
    said = ["My test broke.", *play(9), *SCENARIO.hurt, *SCENARIO.relief, *play(3)]
    first = answer(said)
    assert first == said[4]
    assert answer([*said, first], progress=filled((0, -1))) == said[5]
    assert answer([*said, *said[4:10]], progress=filled((0, -1))) == SCENARIO.hurt[0]
    assert answer([*said, *said[4:10]], state=(0.0, 0.0, 0.0)) == SCENARIO.relief[0]


def test_what_another_simulator_said_does_not_disturb():
    assert BANK_OF[answer(["My test broke.", "free words", "more of them"])] == "cognitive"


def test_the_seed_orders_the_lines():
    orders = {tuple(play(9, seed=seed)) for seed in range(40)}
    assert len(orders) > 20
    assert {order[0] for order in orders} == set(SCENARIO.lines["cognitive"])
    assert all({BANK_OF[line] for line in order[:3]} == {"cognitive"} for order in orders)
    other = [play(9, seed=seed, scenario=scenario("career-other")) for seed in range(10)]
    assert other != [play(9, seed=seed) for seed in range(10)]


def test_the_order_is_the_same_on_every_machine():
    assert [int(line[-1]) for line in play(3, seed=2026)] == [0, 2, 1]


STATES = st.tuples(*[st.floats(-27, 12) for _ in AXES])
LEVELS = st.tuples(st.integers(0, 2), st.integers(-2, 0))
LINES = st.lists(st.sampled_from([*BANK_OF, "My test broke.", "free words"]), max_size=15)


@given(LINES, STATES, st.none() | st.builds(filled, LEVELS, LEVELS, LEVELS), st.integers())
def test_the_answer_is_a_line_of_the_person_that_is_new_if_any_is(said, state, progress, seed):
    changes = {"state": state, "progress": progress, "seed": seed}
    line = answer(said, **changes)
    assert line == answer(said, **changes)
    assert line in BANK_OF
    if line in said:
        assert {x for axis in AXES for x in SCENARIO.lines[axis]} <= set(said)
        assert line != said[-1]


def test_a_batch_is_answered_in_order_and_each_on_its_own():
    requests = [request(seed=seed, state=(-s, -s, -s)) for seed in range(5) for s in (1.0, 9.0)]
    user = ScriptedUser()
    together = user.respond(requests)
    assert together == [ScriptedUser().respond([r])[0] for r in requests]
    assert user.respond(requests[::-1]) == together[::-1]
    assert user.respond([]) == []
