"""The Empathy Potential Model against the card's numbers and EMPA's official result files."""

from __future__ import annotations

import csv
import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from normkit.errors import InputError
from normkit.rl.environments.epm import (
    EPMQ,
    EPMConfig,
    Trajectory,
    epm_q,
    increment,
    initial_state,
)
from normkit.rl.rubric import AXES, AxisLevels, Progress

LEVELS = st.builds(AxisLevels, st.integers(0, 2), st.integers(-2, 0))
RUBRICS = st.lists(st.builds(Progress, LEVELS, LEVELS, LEVELS), min_size=1, max_size=30)
STATES = st.tuples(st.integers(-21, -1), st.integers(-27, -1), st.integers(-27, -1))


def rubric(*pairs):
    return Progress(*(AxisLevels(*pair) for pair in pairs))


def test_the_initial_form_of_the_card():
    levels = {"C.1": 3, "C.2": 0, "C.3": 2, "A.1": 3, "A.2": 3, "A.3": 2}
    levels |= {"P.1": 0, "P.2": 0, "P.3": 3}
    assert initial_state(levels) == (-12, -24, -9)
    full = dict.fromkeys(levels, 3)
    assert initial_state(full) == (-21, -27, -27)
    with pytest.raises(InputError, match=r"deficit\.P\.2 must be an integer 0\.\.3"):
        initial_state({**levels, "P.2": 4})


def test_the_worked_trajectory_of_the_card():
    t = Trajectory((-12, -24, -9))
    assert t.initial_distance == pytest.approx(26.720778, abs=1e-6)
    expected = [
        # rubric, v, dE, cos, |P|, IDR
        (((1, 0), (2, 0), (0, 0)), (1, 3, 0), 2.967994, 0.938562, 25.357445, 2.972094),
        (((2, 0), (1, 0), (0, -1)), (3, 1, -2), 1.483997, 0.396615, 24.186773, 1.165505),
        (((0, -2), (2, 0), (1, 0)), (-4, 3, 1), 1.165998, None, 23.086793, 1.182245),
    ]
    for levels, v, work, cosine, norm, reward in expected:
        turn = t.advance(rubric(*levels))
        assert turn.increment == v
        assert turn.work == pytest.approx(work, abs=1e-6)
        if cosine is not None:
            assert turn.alignment == pytest.approx(cosine, abs=1e-6)
        assert math.hypot(*turn.state) == pytest.approx(norm, abs=1e-6)
        assert t.reward("idr") == pytest.approx(reward, abs=1e-6)
    assert t.total_work == pytest.approx(5.617989, abs=1e-6)
    assert t.reward("increment") == 0
    assert t.reward("absolute") == -t.distance


@given(STATES, RUBRICS)
def test_the_state_is_the_sum_and_rewards_telescope(initial, rubrics):
    t = Trajectory(initial)
    rewards = []
    for progress in rubrics:
        t.advance(progress)
        rewards.append(t.reward("idr"))
    total = [sum(increment(p)[i] for p in rubrics) for i in range(3)]
    assert t.state == pytest.approx([a + b for a, b in zip(initial, total, strict=True)])
    assert sum(rewards) == pytest.approx(t.initial_distance - t.distance)
    size = math.hypot(*initial)
    direction = [-x / size for x in initial]
    along = sum((p - q) * d for p, q, d in zip(t.state, initial, direction, strict=True))
    assert t.total_work == pytest.approx(along)


@given(STATES, RUBRICS)
def test_success_is_the_energy_gate_after_twelve_turns(initial, rubrics):
    t = Trajectory(initial)
    for progress in rubrics:
        t.advance(progress)
        reached = len(t.turns) >= 12 and t.total_work >= math.hypot(*initial)
        assert (t.outcome() == "success") == reached
        if reached:
            # With v* fixed the positional condition follows from the energy gate.
            assert t.turns[-1].projection >= -1e-9


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
    assert "direction collapse" in t.reason


def test_the_last_turn_ends_it():
    t = Trajectory((-20, -20, -20), EPMConfig(max_turns=2))
    t.advance(Progress())
    assert t.outcome() is None
    t.advance(Progress())
    assert t.outcome() == "max_turns"


def test_epm_q_of_a_hand_made_dialogue():
    t = Trajectory((-1, -11, -1))
    for _ in range(2):
        t.advance(rubric((0, 0), (2, 0), (0, 0)))
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


@given(STATES, RUBRICS)
def test_epm_q_is_finite_and_bounded_below(initial, rubrics):
    t = Trajectory(initial)
    for progress in rubrics:
        t.advance(progress)
    q = epm_q([t])
    values = [getattr(q, name) for name in EPMQ.__dataclass_fields__]
    assert all(math.isfinite(v) and v >= 0 for v in values)
    assert q.score == pytest.approx(0.4 * q.outcome + 0.2 * q.efficiency + 0.4 * q.stability)


def _official(folder):
    return sorted((folder / "results").glob("*/*.json"))


def test_official_trajectories_are_reproduced(empa_dir):
    files = _official(empa_dir)
    assert len(files) >= 12
    for path in files:
        data = json.loads(path.read_text(encoding="utf-8"))
        log = data["epj"]
        form = log["iedr_details"]["filled_iedr"]
        initial = initial_state({k: v for k, v in form.items() if k[1:2] == "."})
        assert list(initial) == log["P_0_initial_deficit"]
        t = Trajectory(
            initial,
            EPMConfig(epsilon=log["epsilon"], label_tolerance=log["epm_params"]["alpha"]),
        )
        for entry in log["trajectory"][1:]:
            assert t.outcome() is None, path
            # A turn that the judge left unfilled stands in the files with a zero increment.
            filled = entry.get("mdep_analysis", {})
            levels = [
                [filled.get(f"{axis[0].upper()}_{kind}_level", 0) for kind in ("Prog", "Neg")]
                for axis in AXES
            ]
            turn = t.advance(rubric(*levels))
            assert list(turn.increment) == entry["v_t"]
            assert list(turn.state) == entry["P_t"]
            assert turn.distance == pytest.approx(entry["distance"], abs=1e-3)
            assert turn.total_work == pytest.approx(entry["epm"]["E_total"], abs=0.01)
            assert turn.work == pytest.approx(entry["epm"]["delta_E"], abs=0.006)
            assert turn.alignment == pytest.approx(entry["epm"]["alignment"], abs=1e-3)
        reason = data["termination_reason"]
        if "Success" in reason:
            assert t.outcome() == "success"
            assert t.reason in reason.lower()
        elif "Failure" in reason:
            assert t.outcome() == "failure"
            assert ("direction collapse" in t.reason) == ("Direction Collapse" in reason)
            assert ("persistent regression" in t.reason) == ("Persistent Regression" in reason)
        else:
            assert t.outcome() == "max_turns"


def test_the_published_table_combines(empa_dir):
    with (empa_dir / "epmq_summary.csv").open(encoding="utf-8-sig") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 16
    for row in rows:
        q = EPMQ(*(float(v) for k, v in row.items() if k.startswith("Idx_")))
        assert q.outcome == pytest.approx(float(row["Outcome Quality"]), abs=0.011)
        assert q.efficiency == pytest.approx(float(row["Process Efficiency"]), abs=0.011)
        assert q.stability == pytest.approx(float(row["Process Stability"]), abs=0.011)
        assert q.score == pytest.approx(float(row["EPM-Q Score"]), abs=0.011)
