"""Agreement statistics, and what the embedding judge reaches on held-out labelled replies."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from normkit.errors import InputError
from normkit.rl.environments.scenario import builtin_scenarios
from normkit.rl.judge import JudgeRequest
from normkit.rl.judges.agreement import (
    KINDS,
    NearestExemplarJudge,
    agreement,
    main,
    quadratic_kappa,
    reward_correlation,
)
from normkit.rl.judges.embedding import EmbeddingJudge
from normkit.rl.judges.encoder import SentenceEncoder
from normkit.rl.judges.labelled import Labelled, load_labelled
from normkit.rl.rubric import AXES
from tests.rl.fakes import filled, scenario

HELD_OUT = Path(__file__).with_name("labelled_replies.yaml")

# Somewhat under what was measured (docs/guides/judges.md).
FLOORS = {
    ("cognitive", "progress"): 0.55,
    ("cognitive", "setback"): 0.45,
    ("affective", "progress"): 0.70,
    ("affective", "setback"): 0.60,
    ("proactive", "progress"): 0.65,
    ("proactive", "setback"): 0.50,
}


def test_weighted_kappa_by_hand():
    # Mean (a - b)^2 is 1/4; over all 16 pairs it is (6 + 6 + 2 + 6) / 16.
    a, b = np.array([0.0, 0, 1, 2]), np.array([0.0, 1, 1, 2])
    assert quadratic_kappa(a, b) == pytest.approx(1 - (1 / 4) / (20 / 16))
    assert quadratic_kappa(a, a) == 1.0
    assert quadratic_kappa(np.zeros(3), np.zeros(3)) == 1.0
    assert quadratic_kappa(np.array([0.0, 1]), np.array([1.0, 0])) == -1.0


def test_agreement_of_labels_with_themselves_and_with_none():
    labels = [filled(affective=(i % 3, 0)) for i in range(6)]
    request = JudgeRequest(scenario(), (), "m", "r")
    labelled = [Labelled(request, label) for label in labels]
    same = agreement(labelled, labels, "affective", "progress")
    assert (same.exact, same.within_one, same.kappa) == (1.0, 1.0, 1.0)
    none = agreement(labelled, [filled()] * 6, "affective", "progress")
    assert (none.exact, none.within_one, none.kappa) == (2 / 6, 4 / 6, 0.0)
    assert none.chance == pytest.approx(1 / 3)
    assert reward_correlation(labelled, labels)[0] == pytest.approx(1.0)


def test_held_out_replies_share_no_person_with_those_of_the_calibration():
    held_out, calibration = load_labelled(HELD_OUT), load_labelled()
    people = {item.request.scenario.id for item in held_out}
    assert people == {s.id for s in builtin_scenarios("heldout")}
    assert {item.request.scenario.id for item in calibration} <= {
        s.id for s in builtin_scenarios("train")
    }
    assert not {i.request.reply for i in held_out} & {i.request.reply for i in calibration} - {""}


def test_labelled_replies_are_varied():
    for labelled in (load_labelled(HELD_OUT), load_labelled()):
        keys = [(i.request.scenario.id, i.request.message, i.request.reply) for i in labelled]
        with_history = [(key, i.request.history) for key, i in zip(keys, labelled, strict=True)]
        assert len(set(with_history)) == len(with_history) >= 200
        for axis in AXES:
            assert {i.label[axis].progress for i in labelled} == {0, 1, 2}
            assert {i.label[axis].setback for i in labelled} == {0, -1, -2}


def test_an_unknown_scenario_is_named(tmp_path):
    path = tmp_path / "replies.yaml"
    path.write_text("- {scenario: nobody, reply: Hello}")
    with pytest.raises(InputError, match="nobody"):
        load_labelled(path)
    with pytest.raises(InputError, match="one file"):
        main([])


@pytest.mark.model
def test_the_embedding_judge_agrees_with_held_out_labels():
    labelled = load_labelled(HELD_OUT)
    requests = [item.request for item in labelled]
    encoder = SentenceEncoder()
    verdicts = EmbeddingJudge(encoder).judge(requests)
    baseline = NearestExemplarJudge(encoder).judge(requests)
    for axis in AXES:
        for kind in KINDS:
            found = agreement(labelled, verdicts, axis, kind)
            other = agreement(labelled, baseline, axis, kind)
            assert found.kappa > FLOORS[axis, kind] > other.kappa, (axis, kind)
            assert found.exact > max(other.exact, found.chance), (axis, kind)
            assert found.within_one > 0.9, (axis, kind)
    r, (low, _) = reward_correlation(labelled, verdicts)
    assert r > 0.7
    assert low > reward_correlation(labelled, baseline)[0]
