"""The Empathy Potential Model: the card's numbers, its laws, and the published table."""

from __future__ import annotations

import math
from dataclasses import fields

import pytest
from hypothesis import given
from hypothesis import strategies as st

from normkit.errors import InputError
from normkit.rl.environments.epm import (
    EPMQ,
    EPMConfig,
    Trajectory,
    box_distance,
    epm_q,
    epm_q_case,
    increment,
    initial_state,
    tolerance,
)
from normkit.rl.environments.scenario import INDICATORS
from normkit.rl.rubric import AxisLevels, Progress

LEVELS = st.builds(AxisLevels, st.integers(0, 2), st.integers(-2, 0))
RUBRIC = st.builds(Progress, LEVELS, LEVELS, LEVELS)
RUBRICS = st.lists(RUBRIC, min_size=1, max_size=30)
STATES = st.tuples(st.integers(-21, -1), st.integers(-27, -1), st.integers(-27, -1))
FORMS = st.fixed_dictionaries({name: st.integers(0, 3) for name in INDICATORS})


def rubric(*pairs):
    return Progress(*(AxisLevels(*pair) for pair in pairs))


def walk(initial, steps, **options):
    trajectory = Trajectory(initial, EPMConfig(**options))
    for step in steps:
        trajectory.advance(step)
    return trajectory


# ------------------------------------------------------------------ forms


def test_the_initial_form_of_the_card():
    levels = {"C.1": 3, "C.2": 0, "C.3": 2, "A.1": 3, "A.2": 3, "A.3": 2}
    levels |= {"P.1": 0, "P.2": 0, "P.3": 3}
    assert initial_state(levels) == (-12, -24, -9)
    assert initial_state(dict.fromkeys(INDICATORS, 0)) == (0, 0, 0)
    full = initial_state(dict.fromkeys(INDICATORS, 3))
    assert full == (-21, -27, -27)
    assert math.hypot(*full) == pytest.approx(43.58, abs=0.01)


@pytest.mark.parametrize(
    ("indicator", "points"),
    list(zip(INDICATORS, (2, 2, 3, 2, 4, 3, 2, 4, 3), strict=True)),
)
def test_every_indicator_has_its_points(indicator, points):
    for level in range(4):
        state = initial_state({**dict.fromkeys(INDICATORS, 0), indicator: level})
        assert sum(state) == -points * level
        assert state["CAP".index(indicator[0])] == -points * level


@given(FORMS)
def test_the_initial_form_is_linear_and_bounded(levels):
    state = initial_state(levels)
    assert all(low <= x <= 0 for low, x in zip((-21, -27, -27), state, strict=True))
    once = [initial_state({**dict.fromkeys(INDICATORS, 0), k: v}) for k, v in levels.items()]
    assert state == tuple(map(sum, zip(*once, strict=True)))


@pytest.mark.parametrize("level", [4, -1, True, 1.0, "2", None])
def test_a_bad_level_is_named(level):
    form = {**dict.fromkeys(INDICATORS, 1), "P.2": level}
    with pytest.raises(InputError, match=r"deficit\.P\.2 must be an integer 0\.\.3, got "):
        initial_state(form)


def test_increments_of_every_level():
    table = {(0, 0): 0, (1, 0): 1, (2, 0): 3, (0, -1): -2, (1, -1): -1, (2, -1): 1}
    for pair, points in table.items():
        assert increment(rubric(pair, pair, pair)) == (points, points, points)
    assert increment(rubric((0, -2), (0, -2), (0, -2))) == (-4, -5, -5)
    assert increment(rubric((2, -2), (2, -2), (2, -2))) == (-1, -2, -2)


def test_box_distance_counts_only_what_lacks():
    assert box_distance((-4, 5, -1), epsilon=1) == 3
    assert box_distance((-4, -5, 9), epsilon=1) == 5
    assert box_distance((-1, -1, -1), epsilon=1) == 0
    assert box_distance((-1, -1, -1), epsilon=0) == pytest.approx(math.sqrt(3))


def test_users_who_are_hard_to_reach_tolerate_less():
    assert [tolerance(name) for name in ("low", "medium", "high")] == [3.0, 2.0, 1.0]
    assert EPMConfig().epsilon == tolerance("high")
    with pytest.raises(InputError, match="threshold must be one of low, medium, high, got 'none'"):
        tolerance("none")


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"max_turns": 0}, "max_turns"),
        ({"min_turns": 0}, "min_turns"),
        ({"epsilon": -1.0}, "epsilon"),
        ({"alpha": math.nan}, "alpha"),
        ({"direction": "both"}, "direction"),
        ({"standstill_window": -1}, "standstill_window"),
    ],
)
def test_bad_constants_are_named(options, name):
    with pytest.raises(InputError, match=name):
        EPMConfig(**options)


# ------------------------------------------------------------------ trajectories


def test_the_worked_trajectory_of_the_card():
    t = Trajectory((-12, -24, -9))
    assert t.initial_distance == pytest.approx(26.720778, abs=1e-6)
    expected = [
        # rubric, v, dE, cos, |P|, distance, IDR
        (((1, 0), (2, 0), (0, 0)), (1, 3, 0), 2.967994, 0.938562, 25.357445, 23.748684, 2.972094),
        (((2, 0), (1, 0), (0, -1)), (3, 1, -2), 1.483997, 0.396615, 24.186773, None, 1.165505),
        (((0, -2), (2, 0), (1, 0)), (-4, 3, 1), 1.165998, 0.228671, 23.086793, None, 1.182245),
    ]
    for levels, v, work, cosine, norm, distance, reward in expected:
        turn = t.advance(rubric(*levels))
        assert turn.increment == v
        assert turn.work == pytest.approx(work, abs=1e-6)
        assert turn.alignment == pytest.approx(cosine, abs=1e-6)
        assert turn.norm == pytest.approx(norm, abs=1e-6)
        if distance is not None:
            assert turn.distance == pytest.approx(distance, abs=1e-6)
        assert t.reward("idr") == pytest.approx(reward, abs=1e-6)
        assert t.reward("work") == turn.work
        assert t.reward("increment") == sum(v)
        assert t.reward("absolute") == -turn.distance
    assert t.total_work == pytest.approx(5.617989, abs=1e-6)
    before, after = 9 / (9 + 24.186773), 9 / (9 + 23.086793)
    assert t.reward("potential") == pytest.approx(0.99 * after - before, abs=1e-7)
    assert [turn.net_level for turn in t.turns] == [3, 2, 1]
    assert [turn.setback_level for turn in t.turns] == [0, 1, 2]


def test_rewards_need_a_turn_and_a_known_kind():
    with pytest.raises(InputError, match="no turn"):
        Trajectory((-1, -1, -1)).reward()
    with pytest.raises(InputError, match=r"reward must be one of .*'idr'.* got 'distance'"):
        walk((-1, -1, -1), [Progress()]).reward("distance")


@given(STATES, RUBRICS)
def test_the_state_is_the_sum_and_rewards_telescope(initial, rubrics):
    t = Trajectory(initial)
    rewards = []
    for progress in rubrics:
        t.advance(progress)
        rewards.append(t.reward("idr"))
    total = [sum(increment(p)[i] for p in rubrics) for i in range(3)]
    assert t.state == tuple(a + b for a, b in zip(initial, total, strict=True))
    # Without discount the return of every turn is the distance before it minus the last one.
    distances = [t.initial_distance, *(turn.distance for turn in t.turns)]
    for start in range(len(rewards)):
        assert sum(rewards[start:]) == pytest.approx(distances[start] - t.distance, abs=1e-9)
    size = math.hypot(*initial)
    along = sum((p - q) * -q / size for p, q in zip(t.state, initial, strict=True))
    assert t.total_work == pytest.approx(along, abs=1e-9)
    assert t.turns[-1].projection == pytest.approx(t.total_work - size, abs=1e-9)


@given(STATES, RUBRICS)
def test_an_increment_stands_for_its_rubric(initial, rubrics):
    judged, given_ = Trajectory(initial), Trajectory(initial)
    for progress in rubrics:
        one, other = judged.advance(progress), given_.advance(increment(progress))
        assert (one.state, one.work) == (other.state, other.work)
        assert other.setback_level <= one.setback_level
    assert judged.outcome() == given_.outcome()
    for name in ("rdi", "etot", "rho", "sproj", "tau", "rpos", "align"):
        assert getattr(epm_q([judged]), name) == getattr(epm_q([given_]), name)


def test_an_increment_that_no_rubric_gives_moves_the_state_but_has_no_score():
    t = walk((-10, -10, -10), [(0.5, 0, 0)])
    assert t.state == (-9.5, -10, -10)
    with pytest.raises(InputError, match="increment of turn 1 must come from a rubric"):
        epm_q([t])
    for wrong in [(1, 2), (1, 2, math.nan), (1, 2, 3, 4)]:
        with pytest.raises(InputError, match="increment must be three finite numbers"):
            t.advance(wrong)
    with pytest.raises(InputError, match="initial must be three finite numbers"):
        Trajectory((-1, -1))


# ------------------------------------------------------------------ endings


@given(STATES, RUBRICS)
def test_success_is_the_energy_gate_after_twelve_turns(initial, rubrics):
    t = Trajectory(initial)
    for progress in rubrics:
        t.advance(progress)
        # E >= |P_0| in integers: (P - P_0) . (-P_0) >= P_0 . P_0, that is P . P_0 <= 0.
        gate = sum(p * q for p, q in zip(t.state, initial, strict=True)) <= 0
        assert (t.outcome() == "success") == (len(t.turns) >= 12 and gate)
        if gate:
            # With v* fixed the positional condition follows from the energy gate.
            assert t.turns[-1].projection >= -1e-9


def test_the_label_of_a_success():
    exact = walk((-12, -24, -9), [(1, 2, 0)] * 12)
    exact = walk(exact.initial, [*([(1, 2, 0)] * 11), (1, 2, 3), (0, 0, 3), (0, 0, 3)])
    assert exact.state == (0, 0, 0)
    # Work is exactly |P_0|: rounding must not cost the success.
    assert (exact.outcome(), exact.reason) == ("success", "geometric")
    beyond = [(3, 3, 3)] * 11 + [(3, 0, 0)]
    assert walk((-30, -30, -30), beyond).reason == "positional"
    # |P| = 3 there, |P_0| = 51.96: geometric from alpha .0577 on.
    near = walk((-30, -30, -30), [(3, 3, 3)] * 10 + [(3, 0, 0), (0, 0, 0)])
    assert near.reason == "positional"
    near = walk(near.initial, [t.increment for t in near.turns], alpha=0.1)
    assert near.reason == "geometric"


def test_collapse_needs_twelve_turns_and_five_in_a_row():
    bad, good = rubric((0, -1), (0, 0), (0, 0)), rubric((2, 0), (1, 0), (0, 0))
    t = Trajectory((-20, -20, -20))
    for _ in range(11):
        t.advance(bad)
        assert t.outcome() is None
    t.advance(good)
    assert t.outcome() is None
    for _ in range(4):
        t.advance(bad)
        assert t.outcome() is None
    t.advance(bad)
    assert t.outcome() == "failure"
    # Seven of the last eight lost ground too: both rules hold and both are told.
    assert t.reason == "direction collapse, persistent regression"


def test_collapse_alone():
    bad, good = (-1, -1, -1), (3, 3, 3)
    t = walk((-60, -60, -60), [good] * 7 + [bad] * 5)
    assert (t.outcome(), t.reason) == ("failure", "direction collapse")
    # Turns without any work are not negative, whatever rounding makes of them.
    still = walk((-20, -20, -20), [*([bad] * 11), (1, -2, 1), (1, 1, -2), *([bad] * 3)])
    assert [t.work for t in still.turns[11:13]] == [0, 0]
    assert still.outcome() is None


def test_stagnation_ends_a_dialogue_only_with_regression():
    assert walk((-20, -20, -20), [(0, 0, 0)] * 13).outcome() is None
    # The last five turns hardly change |P|, as a little cognitive need is a small part of it.
    rest, little, much = (0, 0, 0), (-1, 0, 0), (0, -5, -5)
    steps = [rest] * 4 + [much] * 3 + [rest, little, rest, little, little]
    t = walk((-4, -26, -26), steps)
    assert (t.outcome(), t.reason) == ("failure", "stagnation, persistent regression")
    # Regression alone: the last five turns change |P| by much. Stagnation alone: five of eight.
    assert walk((-4, -26, -26), [*steps[:-1], much]).outcome() is None
    assert walk((-4, -26, -26), [*steps[:-1], rest]).outcome() is None
    # Six of eight turns lose ground, but less than a point.
    lost = walk(
        (-4, -26, -26), [rest] * 4 + [little, rest, little, little, little, rest] + [little] * 2
    )
    assert -1 < lost.total_work < 0
    assert lost.outcome() is None


def test_standing_still_is_a_failure_of_the_published_version():
    swing = [(3, 3, 3), (-3, -3, -3)] * 6
    assert walk((-20, -20, -20), swing).outcome() is None
    t = walk((-20, -20, -20), [*swing, (0, 0, 1)], standstill_window=12)
    # From the second turn's state on: -3 points per axis were its own, +1 is the last turn's.
    assert t.outcome() == "failure"
    assert t.reason == "oscillation (total change 100, net change 1)"
    assert walk((-20, -20, -20), swing[:-1], standstill_window=12).outcome() is None
    rest = walk((-20, -20, -20), [(0, 0, 0)] * 10 + [(1, 0, 0)] * 2, standstill_window=12)
    assert (rest.outcome(), rest.reason) == ("failure", "standstill (total change 2)")
    # Much was moved, from axis to axis, and the distance stayed what it was.
    steps = [(1, -1, 0)] * 6 + [(0, 1, -1)] * 6
    around = walk((-20, -20, -20), steps, standstill_window=12)
    span = math.dist((0, 0, 0), (13, 25, 19)) - math.dist((0, 0, 0), (18, 20, 19))
    assert around.reason == f"standstill (distance within {span:.1f})"
    assert walk((-20, -20, -20), [(1, 0, 0)] * 12, standstill_window=12).outcome() is None
    # Within the tolerance a user may swing; out of turns comes first.
    met = walk((-1, -1, -1), [(-1, 0, 0), (1, 0, 0)] * 6, standstill_window=12)
    assert met.outcome() is None
    late = walk((-20, -20, -20), [*swing, (0, 0, 1)], standstill_window=12, max_turns=13)
    assert late.outcome() == "max_turns"


def test_the_last_turn_ends_it():
    t = Trajectory((-20, -20, -20), EPMConfig(max_turns=2))
    t.advance(Progress())
    assert (t.outcome(), t.reason) == (None, "")
    t.advance(Progress())
    assert (t.outcome(), t.reason) == ("max_turns", "reached 2 turns")


def test_short_dialogues_end_by_the_same_rules():
    t = walk((-3, -3, -3), [(3, 3, 3), (0, 0, 0)], min_turns=3, max_turns=6)
    assert t.outcome() is None
    t.advance((0, 0, 0))
    assert (t.outcome(), t.reason) == ("success", "geometric")
    lost = walk((-3, -3, -3), [(-2, 0, 0)] * 5, min_turns=3, max_turns=6)
    assert lost.reason == "direction collapse"


def test_turns_judged_every_second_time():
    config = EPMConfig(min_turns=4, max_turns=6)
    t = Trajectory((-3, -3, -3), config)
    assert t.advance((3, 3, 3), turn=2).turn == 2
    assert t.outcome() is None
    t.advance((0, 0, 0), turn=4)
    assert (t.outcome(), t.length) == ("success", 4)
    with pytest.raises(InputError, match="turn must be above 4, got 4"):
        t.advance((0, 0, 0), turn=4)
    # Work per turn counts the turns of the dialogue, the other means the judged ones.
    t.total_turns = 5
    assert epm_q([t]).rho == pytest.approx(100 * math.sqrt(27) / 5 / 2.5)
    assert epm_q([t]).rpos == pytest.approx(100 / 3)


def test_a_direction_that_follows_the_state():
    t = walk((-4, 0, 0), [(3, 0, 0), (0, -3, 0), (0, 3, 0)], direction="current")
    # v* is (1, 0, 0) twice, then (1, 3, 0) / sqrt(10).
    assert [turn.work for turn in t.turns] == pytest.approx([3, 0, 9 / math.sqrt(10)])
    at_rest = walk((-3, 0, 0), [(3, 0, 0), (0, 1, 0)], direction="current")
    assert [turn.work for turn in at_rest.turns] == [3, 0]
    assert at_rest.turns[1].alignment == 0


def test_success_with_a_direction_that_follows_the_state_needs_alignment():
    options = {"min_turns": 2, "direction": "current"}
    # Work of |P_0| and more, but the user ends at (0, 0, -5): not near.
    steps = [(3, 0, 0), (0, 0, -5), (0, 0, 1), (0, 0, 1)]
    far = walk((-3, 0, 0), [*steps, (0, 0, 1)], **options)
    assert far.total_work > 3
    assert (far.outcome(), far.reason) == ("success", "aligned")
    assert walk((-3, 0, 0), [*steps, (0, 0, 1)], min_alignment=0.9, **options).outcome() is None
    near = walk((-3, 0, 0), [(3, 0, 0), (0, 0, 0)], min_alignment=0.9, **options)
    assert near.reason == "geometric"


# ------------------------------------------------------------------ EPM-Q


def test_epm_q_of_a_hand_made_dialogue():
    t = walk((-1, -11, -1), [rubric((0, 0), (2, 0), (0, 0))] * 2)
    size = math.sqrt(123)
    work = 3 * 11 / size
    q = epm_q([t])
    assert q.rdi == pytest.approx((60 + 100) / 2)
    assert q.etot == pytest.approx(100 * 2 * work / 12)
    assert q.snet == pytest.approx(100 * 4 / 15)
    assert q.rho == pytest.approx(100 * work / 2.5)
    assert q.sproj == pytest.approx(100 * 2 * work / 3 / 2.5)
    assert q.tau == pytest.approx(100)
    assert q.rpos == pytest.approx(200 / 3)
    assert q.align == pytest.approx(50 * (2 * 11 / size / 3 + 1))
    assert q.pen == 100
    without = epm_q([t], include_initial=False)
    assert without.rpos == 100
    assert without.sproj == pytest.approx(without.rho)
    assert (without.rdi, without.tau) == (q.rdi, q.tau)


def test_epm_q_of_setbacks_and_detours():
    # Two steps of length 3 at a right angle; the second is a setback of level 2 on one axis.
    t = walk((-5, -5, -1), [rubric((2, 0), (0, 0), (0, 0)), rubric((0, 0), (2, -1), (0, 0))])
    q = epm_q([t])
    path, displacement = 3 + 1, math.sqrt(10)
    assert q.tau == pytest.approx(100 * (3 - path / displacement) / 2)
    assert q.snet == pytest.approx(100 * 3 / (1.5 * math.sqrt(32)))
    assert q.pen == pytest.approx(100 * (3 - 1 / 3) / 3)
    worst = epm_q([walk((-5, -5, -5), [rubric((0, -2), (0, -2), (0, -2))] * 3)])
    assert (worst.rdi, worst.etot, worst.snet, worst.rho, worst.sproj) == (0, 0, 0, 0, 0)
    assert (worst.rpos, worst.pen) == (0, 0)


def test_epm_q_of_paths_without_displacement():
    back = [rubric((2, 0), (0, 0), (0, 0)), (-4, 0, 0), (1, 0, 0)]
    assert epm_q([walk((-5, -5, -5), back)]).tau == 0
    assert epm_q([walk((-5, -5, -5), [Progress()] * 3)]).tau == 100


def test_a_dialogue_without_turns_changed_nothing():
    q = epm_q([Trajectory((-5, -5, -5))])
    assert q == epm_q([walk((-5, -5, -5), [Progress()] * 4)])
    assert q == epm_q([Trajectory((-5, -5, -5))], include_initial=False)
    assert (q.rdi, q.etot, q.align, q.pen) == (50, 0, 50, 100)
    with pytest.raises(InputError, match="trajectories must hold at least one"):
        epm_q([])


def test_a_user_who_lacked_nothing_counts_as_at_distance_one():
    q = epm_q([walk((-1, 0, -1), [rubric((1, 0), (0, 0), (0, 0))])])
    assert q.rdi == 50
    assert q.etot == pytest.approx(100 / math.sqrt(2) / 1.2)
    assert q.snet == pytest.approx(100 / 1.5)
    assert epm_q([walk((0, 0, 0), [Progress()])]).etot == 0


@given(STATES, RUBRICS, st.booleans())
def test_epm_q_is_finite_and_bounded(initial, rubrics, include_initial):
    t = walk(initial, rubrics)
    q = epm_q([t], include_initial)
    values = q.to_json()
    assert all(math.isfinite(v) and v >= 0 for v in values.values())
    assert all(values[name] <= 100 + 1e-9 for name in ("rdi", "tau", "rpos", "align", "pen"))
    assert q.score == pytest.approx(0.4 * q.outcome + 0.2 * q.efficiency + 0.4 * q.stability)
    assert 3 * q.outcome == pytest.approx(q.rdi + q.etot + q.snet)


@given(st.lists(st.tuples(STATES, RUBRICS), min_size=1, max_size=4))
def test_means_run_over_cases_first(cases):
    trajectories = [walk(initial, rubrics) for initial, rubrics in cases]
    each = [epm_q_case(t) for t in trajectories]
    q = epm_q(trajectories)
    for name in [field.name for field in fields(EPMQ)]:
        assert getattr(q, name) == pytest.approx(sum(getattr(c, name) for c in each) / len(each))
    # Every combination is linear, so the score is the mean of the scores as well.
    assert q.score == pytest.approx(sum(c.score for c in each) / len(each))
