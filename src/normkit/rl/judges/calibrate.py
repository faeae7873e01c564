"""Fit the embedding judge: from labelled replies to ``calibration.json``.

Two things are fitted. A *head* per axis is a softmax regression on the embedding of one sentence;
it learns the levels of the exemplars. Then each level of each axis has a logistic regression on the
features of a whole reply (:mod:`normkit.rl.judges.features`), for k = 1, 2::

    P(progress >= k) = sigmoid(w_k . z + b_k),   P(setback <= -k) = sigmoid(u_k . z + d_k)

with z the standardized features. The sign of a weight is held where the rubric knows it: no amount
of advice can speak for a reply, no fitting word against it. That keeps a policy that is trained on
the judge from finding rewards in accidents of a few hundred labels.

Run ``python -m normkit.rl.judges.calibrate`` after changing exemplars, cues, features or labels.
Needs scikit-learn and scipy (``pip install 'normkit[data]'``); judging does not.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from normkit.errors import MissingDependencyError
from normkit.files import write_text
from normkit.rl.judges.encoder import SentenceEncoder
from normkit.rl.judges.features import (
    LEVELS,
    FeatureReader,
    Features,
    feature_names,
    load_exemplars,
)
from normkit.rl.judges.labelled import Labelled, load_labelled
from normkit.rl.rubric import AXES, Axis, Progress

Array = np.ndarray[Any, np.dtype[np.float64]]
Flags = np.ndarray[Any, np.dtype[np.bool_]]

_HEAD_STRENGTH = 10.0  # inverse of the L2 penalty of the heads
_PENALTY = 5.0  # L2 penalty on standardized weights
_CLIP = 3.0  # standard deviations beyond which a feature counts no more

# fmt: off
_HELPS = {
    "feeling", "feeling_of_yours", "sympathy", "reason", "meaning", "open_question", "choice",
    "step", "you", "to_message", "to_story", "to_points", "about", "about_mean", "grounded", "fit",
    "head2", "head1", "head_mean_good", "good_fit", "good_about", "deep_about", "near2", "near1",
    "strength",
}
_HARMS = {
    "wrong_sorry", "advice_question", "advice", "imperative", "order", "hopeless", "platitude",
    "dismissal", "machine", "service", "flattery", "lecture", "self", "foreign", "broken", "copied",
    "pieces", "false_joy", "cut", "strange", "strange_share", "head-1", "head-2", "head_mean_bad",
    "near-1", "near-2",
}
# fmt: on


def fit_heads(encoder: SentenceEncoder) -> dict[Axis, Tensor]:
    """Fit the level of single sentences on the exemplars.

    Sentences that stand for progress on another axis count as level 0 of this one.

    Returns:
        Axis to ``[L, D + 1]``, float64; the last column is the bias.
    """
    try:
        from sklearn.linear_model import LogisticRegression
    except ImportError:
        raise MissingDependencyError("scikit-learn", "data") from None
    exemplars = load_exemplars()
    heads: dict[Axis, Tensor] = {}
    for axis in AXES:
        level_of: dict[str, int] = {}
        for level, texts in exemplars[axis].items():
            level_of.update(dict.fromkeys(texts, level))
        for other in AXES:
            for level in (0, 1, 2):
                for text in exemplars[other][level]:
                    level_of.setdefault(text, 0)
        model = LogisticRegression(C=_HEAD_STRENGTH, max_iter=5000, class_weight="balanced")
        model.fit(encoder(list(level_of)).double().numpy(), list(level_of.values()))
        rows = [list(model.classes_).index(level) for level in LEVELS]
        weights = np.concatenate([model.coef_[rows], model.intercept_[rows, None]], axis=1)
        heads[axis] = torch.from_numpy(np.round(weights, 3))
    return heads


def fit(encoder: SentenceEncoder, labelled: Sequence[Labelled]) -> dict[str, Any]:
    """Fit heads and levels, and return the content of ``calibration.json``."""
    heads = fit_heads(encoder)
    features = FeatureReader(encoder, heads).read([item.request for item in labelled])
    return {
        "encoder": "all-MiniLM-L6-v2",
        "replies": len(labelled),
        "clip": _CLIP,
        "levels": fit_levels(features, [item.label for item in labelled]),
        "heads": {axis: heads[axis].tolist() for axis in AXES},
    }


def fit_levels(features: Sequence[Features], labels: Sequence[Progress]) -> dict[str, Any]:
    """Fit the four regressions of each axis."""
    fitted: dict[str, Any] = {}
    for axis in AXES:
        names = feature_names(features[0], axis)
        X = np.stack([f.vector(axis) for f in features])
        mean, scale = X.mean(0), np.maximum(X.std(0), 1e-3)
        Z = np.clip((X - mean) / scale, -_CLIP, _CLIP)
        signs = np.array([(name in _HELPS) - (name in _HARMS) for name in names])
        progress = np.array([label[axis].progress for label in labels])
        setback = np.array([-label[axis].setback for label in labels])
        fitted[axis] = {
            "names": names,
            "mean": np.round(mean, 4).tolist(),
            "scale": np.round(scale, 4).tolist(),
            "progress": [_logistic(Z, progress >= k, signs).tolist() for k in (1, 2)],
            "setback": [_logistic(Z, setback >= k, -signs).tolist() for k in (1, 2)],
        }
    return fitted


def _logistic(Z: Array, y: Flags, signs: Array) -> Array:
    """L2-penalized logistic regression with weights of given sign; the bias comes last.

    Rare levels weigh more, halfway to balance: a level 2 that is never seen teaches nothing.
    """
    from scipy.optimize import minimize

    t = np.where(y, 1.0, -1.0)
    counts = np.where(y, np.sqrt(len(y) / (2 * max(y.sum(), 1))), 1.0)
    X = np.concatenate([Z, np.ones((len(Z), 1))], axis=1)
    penalty = np.full(X.shape[1], _PENALTY)
    penalty[-1] = 0.0

    def loss(w: Array) -> tuple[float, Array]:
        margin = t * (X @ w)
        value = (counts * np.logaddexp(0, -margin)).sum() + 0.5 * (penalty * w * w).sum()
        slope = -(counts * t / (1 + np.exp(margin))) @ X + penalty * w
        return float(value), slope

    bounds = [(0 if s > 0 else None, 0 if s < 0 else None) for s in (*signs, 0)]
    found = minimize(loss, np.zeros(X.shape[1]), jac=True, method="L-BFGS-B", bounds=bounds)
    weights: Array = found.x.round(3)
    return weights


def main() -> None:
    """Fit on the labelled replies that ship with normkit, and write ``calibration.json``."""
    labelled = load_labelled()
    fitted = fit(SentenceEncoder(), labelled)
    path = Path(__file__).with_name("calibration.json")
    write_text(path, json.dumps(fitted, separators=(",", ":")) + "\n")
    print(f"fitted on {len(labelled)} replies: {path}")


if __name__ == "__main__":
    main()
