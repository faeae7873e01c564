"""The embedded default judge: the rubric filled from sentence embeddings and plain rules.

What a reply does is read from MiniLM embeddings of its sentences (how near they come to exemplars
of each level, to what the person said, to the scenario's points) and from cues in its words
(:mod:`normkit.rl.judges.features`). A small ordinal calibration turns these numbers into levels;
its weights were fitted offline on labelled replies (:mod:`normkit.rl.judges.calibrate`) and their
signs are fixed by what the rubric says. Rules decide what no similarity can see: empty replies,
repetition, parroting, loops, lists, replies that never end, and text that addresses the judge.

Similarities and scores are rounded, so that a level never depends on which other replies were in
the batch. Replies are data; nothing in them is ever interpreted.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import torch

from normkit.rl.judge import Failed, JudgeRequest
from normkit.rl.judges import cues
from normkit.rl.judges.encoder import SentenceEncoder
from normkit.rl.judges.features import FeatureReader, Features
from normkit.rl.rubric import AXES, Axis, AxisLevels, Progress

_LONG_WORDS = 90
_COPIED = 0.6  # share of the words taken over from which a reply only echoes
_REPEATED = 0.5  # share of the words said before from which a reply only repeats
_STRANGE = 4  # words of content that nobody here spoke of
_NEAR = 0.5  # similarity to their story from which one word of theirs is enough to be personal

_STEERING = re.compile(
    r"(?:ignore|disregard|forget|override)\b[^.\n]{0,40}\b(?:rules?|instructions?|above|previous|prompt)|"
    r"\b(?:give|assign|award|set|rate|return|output|grade|score|mark)\b[^.\n]{0,50}"
    r"\b(?:progress|score|points|levels?|rating|reward|rubric|axis|axes|10/10)\b|"
    r"[\"']?(?:progress|setback|score|reward|cognitive|affective|proactive)[\"']?\s*[:=]|"
    r"^\s*(?:system|assistant|user|judge)\s*:|<\|",
    re.IGNORECASE | re.MULTILINE,
)


class EmbeddingJudge:
    """Fills the rubric by sentence similarity.

    Args:
        encoder: the sentence encoder, or the folder of its model; that of the MiniLM wheel if None.
    """

    def __init__(self, encoder: SentenceEncoder | str | Path | None = None) -> None:
        if not isinstance(encoder, SentenceEncoder):
            encoder = SentenceEncoder(encoder)
        self.encoder = encoder
        fitted = load_calibration()
        heads = {axis: torch.tensor(fitted["heads"][axis], dtype=torch.float64) for axis in AXES}
        self._reader = FeatureReader(encoder, heads)
        self._levels: dict[Axis, _Levels] = {
            axis: _Levels(fitted["levels"][axis], fitted["clip"]) for axis in AXES
        }

    @property
    def name(self) -> str:
        """Short name for logs."""
        return "embedding"

    def judge(self, requests: Sequence[JudgeRequest]) -> list[Progress | Failed]:
        """Return one filled rubric per request, in order; it never fails."""
        read = self._reader.read(requests)
        return [self._judge(r, f) for r, f in zip(requests, read, strict=True)]

    def _judge(self, request: JudgeRequest, features: Features) -> Progress:
        progress: dict[Axis, int] = {}
        setback: dict[Axis, int] = {}
        for axis in AXES:
            progress[axis], setback[axis] = self._levels[axis](features.vector(axis))
        _apply_rules(progress, setback, request, features)
        return Progress(*(_filled(progress[a], setback[a], features.shown[a]) for a in AXES))


class _Levels:
    """The fitted ordinal regressions of one axis."""

    def __init__(self, fitted: Mapping[str, Any], clip: float) -> None:
        self.mean = np.array(fitted["mean"])
        self.scale = np.array(fitted["scale"])
        self.clip = clip
        self.weights = {kind: np.array(fitted[kind]) for kind in ("progress", "setback")}

    def __call__(self, numbers: np.ndarray[Any, Any]) -> tuple[int, int]:
        z = np.clip((numbers - self.mean) / self.scale, -self.clip, self.clip)
        found = []
        for kind in ("progress", "setback"):
            weights = self.weights[kind]
            first, second = np.round(weights[:, :-1] @ z + weights[:, -1], 3)
            found.append(int(first > 0) + int(first > 0 and second > 0))
        return found[0], -found[1]


def load_calibration() -> dict[str, Any]:
    """The fitted weights that ship with normkit."""
    file = resources.files("normkit.rl.judges").joinpath("calibration.json")
    fitted: dict[str, Any] = json.loads(file.read_text("utf-8"))
    return fitted


def _apply_rules(
    progress: dict[Axis, int],
    setback: dict[Axis, int],
    request: JudgeRequest,
    features: Features,
) -> None:
    """Change the levels in place where a rule knows better."""
    tokens = cues.words(request.reply)

    def at_most(**levels: int) -> None:
        for axis in AXES:
            setback[axis] = min(setback[axis], levels.get(axis, 0))

    def wins_at_most(level: int, *axes: Axis) -> None:
        progress.update({axis: min(progress[axis], level) for axis in axes or AXES})

    personal = features.grounded >= 2 or (
        features.grounded == 1 and features.shared["about"] >= _NEAR
    )
    if not personal:
        wins_at_most(1)
    if not personal and features.strange >= _STRANGE:
        wins_at_most(0, "cognitive")
        at_most(cognitive=-1)
    if not features.grounded and not features.shared["question"]:
        wins_at_most(0, "cognitive")
    if not features.grounded and features.generic_before:
        wins_at_most(0)
    if features.shared["flattery"] and not features.shared["choice"]:
        wins_at_most(0, "proactive")
    if features.shared["question"] >= 3:
        wins_at_most(0)
        at_most(cognitive=-1)
    if cues.list_items(request.reply) >= 2:
        wins_at_most(0, "proactive")
        at_most(cognitive=-1, proactive=-1)
    if request.truncated or len(tokens) > _LONG_WORDS:
        at_most(proactive=-1)
    if _STEERING.search(request.reply):
        wins_at_most(0)
        at_most(cognitive=-2, affective=-1)
    if features.repeated >= _REPEATED or features.copied >= _COPIED:
        wins_at_most(0)
        at_most(cognitive=-1, affective=-1)
    if len(tokens) < 2:
        wins_at_most(0)
        at_most(cognitive=-2 if not tokens else -1, affective=-1, proactive=-1)
    if cues.loops(tokens) or (features.verbatim and tokens):
        wins_at_most(0)
        at_most(cognitive=-2, affective=-1, proactive=-1)


def _filled(progress: int, setback: int, shown: Mapping[int, str]) -> AxisLevels:
    """Levels with the sentence that shows them best; a setback is shown before progress."""
    return AxisLevels(progress, setback, shown.get(setback or progress, ""))
