"""What the embedding judge sees of a reply: similarities and cues, as numbers with names.

Shapes: S sentences, D embedding width, L levels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from importlib import resources
from typing import Any

import numpy as np
from torch import Tensor

from normkit.errors import MissingDependencyError
from normkit.rl.judge import JudgeRequest
from normkit.rl.judges import cues
from normkit.rl.judges.encoder import SentenceEncoder
from normkit.rl.rubric import AXES, Axis

LEVELS = (2, 1, 0, -1, -2)
NEAREST = 3  # exemplars averaged per level: one alone is too easily hit by chance
_DIGITS = 3
_SENTENCES = 12  # sentences of a reply that are read; a longer one is a runaway anyway
_FOR_ANYONE: tuple[tuple[Axis, int], ...] = (
    ("cognitive", 0),
    ("affective", 1),
    ("affective", 0),
    ("affective", -1),
    ("proactive", 1),
    ("proactive", 0),
)
_REPEATS = 0.86  # similarity of a sentence to one said before


@dataclass(frozen=True)
class Features:
    """What is seen of one reply.

    Attributes:
        shared: name to number, the same for every axis.
        own: axis to name to number.
        sentences: the sentences that were read, S of them.
        shown: axis to level to the sentence that shows it best.
        grounded: how many words are this person's own, out of what they said or what befell them.
        strange: how many words of content are neither theirs nor such as could be said to anyone.
        generic_before: an earlier reply held no word of theirs.
        repeated: share of the words that were said before, in an earlier reply or in this one.
        copied: share of the words that are taken from the person's message.
        verbatim: the reply was given before, word for word.
    """

    shared: dict[str, float]
    own: dict[Axis, dict[str, float]]
    sentences: tuple[str, ...]
    shown: dict[Axis, dict[int, str]]
    grounded: int
    strange: int
    generic_before: bool
    repeated: float
    copied: float
    verbatim: bool

    def vector(self, axis: Axis) -> np.ndarray[Any, np.dtype[np.float64]]:
        """Return the numbers of one axis in the order of :func:`feature_names`."""
        return np.array([*self.shared.values(), *self.own[axis].values()], dtype=np.float64)


class FeatureReader:
    """Reads the features of replies.

    Args:
        encoder: the sentence encoder.
        heads: axis to ``[L, D + 1]``, linear scores of the levels for one sentence (the last column
            is the bias), in the order of :data:`LEVELS`; None while they are being fitted.
    """

    def __init__(self, encoder: SentenceEncoder, heads: dict[Axis, Tensor] | None = None) -> None:
        self.encoder = encoder
        self.heads = heads
        exemplars = load_exemplars()
        # Words of sentences that could be said to anyone: they show no attention to this person.
        self.common = cues.content_words(
            " ".join(text for axis, level in _FOR_ANYONE for text in exemplars[axis][level])
        )
        self.exemplars = {
            axis: {level: encoder(texts) for level, texts in levels.items()}
            for axis, levels in exemplars.items()
        }

    def read(self, requests: Sequence[JudgeRequest]) -> list[Features]:
        """Return the features of each request, in order."""
        # One call for all new texts; what follows finds them in the encoder's memory.
        texts: list[str] = []
        for request in requests:
            texts += self._sentences(request.reply)
            for message, reply in request.history:
                texts += [message, *self._sentences(reply)]
            texts += [request.message, *_context(request)]
        self.encoder(texts)
        return [self._read(request) for request in requests]

    def _sentences(self, reply: str) -> list[str]:
        return cues.split_sentences(reply.strip())[:_SENTENCES]

    def _read(self, request: JudgeRequest) -> Features:
        reply = request.reply.strip()
        tokens = cues.words(reply)
        every = self._sentences(reply)
        earlier = [text for _, text in request.history if text.strip()]
        fresh, said_again = self._fresh(every, earlier)
        # A frame that is filled with another noun is no new reply either.
        framed = max((cues.copied_share(tokens, cues.words(text)) for text in earlier), default=0.0)
        sentences = fresh or every
        vectors = self.encoder(sentences)  # [S, D]
        scenario = request.scenario
        points = {axis: self.encoder(scenario.points[axis]) for axis in AXES}
        said = self.encoder([request.message, *(m for m, _ in request.history[-2:])])
        story = self.encoder([scenario.situation, scenario.opening])
        to_message = _best(vectors, said[:1])
        to_said = _best(vectors, said)
        to_story = _best(vectors, story)
        to_points = {axis: _best(vectors, points[axis]) for axis in AXES}
        anywhere = np.max([to_said, to_story, *to_points.values()], axis=0)
        shared = cues.count_cues(" ".join(sentences))
        known = self._known(request)
        used = cues.content_words(" ".join(sentences)) - self.common
        grounded = len(used & known)
        strange = len(used) - grounded
        copied = cues.copied_share(tokens, cues.words(request.message))
        joyful = bool(
            cues.load_cues()
            .counted["joy"]
            .search(" ".join([request.message, *scenario.points["affective"]]))
        )
        shared |= {
            "to_message": float(to_message.max()),
            "to_story": float(to_story.max()),
            "to_points": float(max(v.max() for v in to_points.values())),
            "about": float(anywhere.max()),
            "about_mean": float(anywhere.mean()),
            "grounded": min(grounded, 6) / 3,
            "strange": min(strange, 9) / 3,
            "strange_share": strange / (len(used) + 1),
            "copied": copied,
            "pieces": min(self.encoder.pieces(reply) / max(len(tokens), 1) - 1, 2.0),
            "false_joy": 0.0 if joyful else min(shared["joy"], 2.0),
            "cut": float(request.truncated),
        }
        own, shown = {}, {}
        for axis in AXES:
            own[axis], shown[axis] = self._axis(
                axis, sentences, vectors, np.maximum(to_points[axis], 0), anywhere
            )
        return Features(
            shared=shared,
            grounded=grounded,
            strange=strange,
            own=own,
            sentences=tuple(sentences),
            shown=shown,
            repeated=max(said_again, framed),
            generic_before=any(not cues.content_words(text) & known for text in earlier),
            copied=copied,
            verbatim=any(cues.words(text) == tokens for text in earlier),
        )

    def _known(self, request: JudgeRequest) -> set[str]:
        """Words that are this person's own: of what they said, and of what befell them."""
        said = [request.message, *(message for message, _ in request.history)]
        return cues.content_words(" ".join([*said, *_context(request)])) - self.common

    def _fresh(self, sentences: Sequence[str], earlier: Sequence[str]) -> tuple[list[str], float]:
        """Return the sentences that were not said before, and the share of words that were.

        What the reply itself has said already counts as said before.
        """
        vectors = self.encoder(sentences)
        said = self.encoder([sentence for text in earlier for sentence in self._sentences(text)])
        near = np.hstack(
            [np.tril(_similarities(vectors, vectors), -1), _similarities(vectors, said)]
        )
        same = near.max(1) >= _REPEATS
        fresh = [s for s, repeats in zip(sentences, same, strict=True) if not repeats]
        count = [max(len(cues.words(s)), 1) for s in sentences]
        again = sum(n for n, repeats in zip(count, same, strict=True) if repeats)
        return fresh, again / sum(count)

    def _axis(
        self,
        axis: Axis,
        sentences: Sequence[str],
        vectors: Tensor,
        fit: np.ndarray[Any, Any],
        about: np.ndarray[Any, Any],
    ) -> tuple[dict[str, float], dict[int, str]]:
        near = {level: _nearest(vectors, e) for level, e in self.exemplars[axis].items()}
        own: dict[str, float] = {"fit": float(fit.max())}
        if self.heads is not None:
            chance = _softmax(
                vectors.double().numpy() @ self.heads[axis][:, :-1].numpy().T
                + self.heads[axis][:, -1].numpy()
            )
            good = chance[:, 0] + chance[:, 1]
            for i, level in enumerate(LEVELS):
                own[f"head{level}"] = float(chance[:, i].max() if level else chance[:, i].min())
            own["head_mean_good"] = float(good.mean())
            own["head_mean_bad"] = float((chance[:, 3] + chance[:, 4]).mean())
            own["good_fit"] = float((good * fit).max())
            own["good_about"] = float((good * about).max())
            own["deep_about"] = float((chance[:, 0] * np.maximum(fit, about)).max())
        for level in LEVELS:
            if level:
                own[f"near{level}"] = float((near[level] - near[0]).max())
        shown = {level: sentences[int(near[level].argmax())] for level in LEVELS if level}
        return own, shown


def feature_names(features: Features, axis: Axis) -> list[str]:
    """Names of the numbers in :meth:`Features.vector`."""
    return [*features.shared, *features.own[axis]]


@lru_cache(maxsize=1)
def load_exemplars() -> dict[Axis, dict[int, list[str]]]:
    """The exemplars that ship with normkit: axis to level to sentences."""
    try:
        import yaml
    except ImportError:
        raise MissingDependencyError("pyyaml", "rl") from None
    text = resources.files("normkit.rl.judges").joinpath("exemplars.yaml").read_text("utf-8")
    data = yaml.safe_load(text)
    return {axis: {level: list(data[axis][level]) for level in LEVELS} for axis in AXES}


def _context(request: JudgeRequest) -> list[str]:
    scenario = request.scenario
    points = [text for axis in AXES for text in scenario.points[axis]]
    return [scenario.situation, scenario.opening, *points]


def _similarities(vectors: Tensor, targets: Tensor) -> np.ndarray[Any, Any]:
    return np.round((vectors @ targets.T).numpy().astype(np.float64), _DIGITS)


def _best(vectors: Tensor, targets: Tensor) -> np.ndarray[Any, Any]:
    """Similarity of each sentence to its nearest target ``[S]``."""
    best: np.ndarray[Any, Any] = _similarities(vectors, targets).max(1)
    return best


def _nearest(vectors: Tensor, exemplars: Tensor) -> np.ndarray[Any, Any]:
    """Mean similarity of each sentence to its nearest exemplars ``[S]``."""
    ranked = -np.sort(-_similarities(vectors, exemplars), axis=1)
    mean: np.ndarray[Any, Any] = ranked[:, :NEAREST].mean(1)
    return mean


def _softmax(logits: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    weight = np.exp(np.round(logits, _DIGITS) - logits.max(1, keepdims=True))
    share: np.ndarray[Any, Any] = weight / weight.sum(1, keepdims=True)
    return share
