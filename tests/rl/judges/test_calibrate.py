"""The calibration that ships is the one that its data leads to, with the signs of the rubric."""

from __future__ import annotations

import numpy as np
import pytest

from normkit.rl.judges import calibrate
from normkit.rl.judges.embedding import load_calibration
from normkit.rl.judges.encoder import SentenceEncoder
from normkit.rl.judges.labelled import load_labelled
from normkit.rl.rubric import AXES


def test_no_weight_speaks_against_the_rubric():
    for axis in AXES:
        fitted = load_calibration()["levels"][axis]
        names = fitted["names"]
        for kind, sign in (("progress", 1), ("setback", -1)):
            weights = sign * np.array(fitted[kind])[:, :-1]
            helps = [i for i, name in enumerate(names) if name in calibrate._HELPS]
            harms = [i for i, name in enumerate(names) if name in calibrate._HARMS]
            assert len(helps) > 10
            assert len(harms) > 10
            assert (weights[:, helps] >= 0).all()
            assert (weights[:, harms] <= 0).all()


def test_every_sign_belongs_to_a_feature():
    names = set().union(*(load_calibration()["levels"][axis]["names"] for axis in AXES))
    assert names >= calibrate._HELPS | calibrate._HARMS
    assert not calibrate._HELPS & calibrate._HARMS


def test_signed_logistic_regression_recovers_a_line():
    rng = np.random.default_rng(0)
    X = rng.normal(size=(4000, 2))
    y = rng.random(4000) < 1 / (1 + np.exp(-(2 * X[:, 0] - X[:, 1])))
    free = calibrate._logistic(X, y, np.array([0, 0]))
    assert free[:2] == pytest.approx([2, -1], abs=0.2)
    held = calibrate._logistic(X, y, np.array([1, 1]))
    assert held[1] == 0
    assert held[0] > 1


@pytest.mark.slow
@pytest.mark.model
def test_the_calibration_is_reproduced():
    fitted, shipped = calibrate.fit(SentenceEncoder(), load_labelled()), load_calibration()
    assert fitted["replies"] == shipped["replies"]
    for axis in AXES:
        assert fitted["levels"][axis]["names"] == shipped["levels"][axis]["names"]
        for kind in ("mean", "scale", "progress", "setback"):
            found, expected = (np.array(f["levels"][axis][kind]) for f in (fitted, shipped))
            np.testing.assert_allclose(found, expected, atol=0.03)
