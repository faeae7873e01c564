"""How well a judge agrees with labelled replies, beside chance and beside the nearest exemplar.

Of each axis and of progress and setback apart: the share of replies with the very level, the share
within one level, and Cohen's kappa with quadratic weights (Cohen 1968)::

    kappa = 1 - mean (a_i - b_i)^2 / mean_{i,j} (a_i - b_j)^2

for labels a and verdicts b: 1 where they agree, 0 where they agree as often as by chance. Of the
whole: Pearson's correlation of the turn rewards (the incremental distance from the scenario's first
state) that labels and verdicts lead to. Intervals resample scenarios, since replies to one person
are not independent.

``python -m normkit.rl.judges.agreement FILE`` prints the table for the embedding judge.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from normkit.errors import InputError
from normkit.rl.environments.epm import box_distance, increment, initial_state
from normkit.rl.judge import Failed, Judge, JudgeRequest
from normkit.rl.judges.cues import split_sentences
from normkit.rl.judges.encoder import SentenceEncoder
from normkit.rl.judges.features import load_exemplars
from normkit.rl.judges.labelled import Labelled, load_labelled
from normkit.rl.rubric import AXES, Axis, AxisLevels, Progress

Array = np.ndarray[Any, np.dtype[np.float64]]
Kind = Literal["progress", "setback"]
KINDS: tuple[Kind, ...] = ("progress", "setback")

_DRAWS = 2000


@dataclass(frozen=True)
class Agreement:
    """Agreement on one kind of level of one axis.

    Attributes:
        exact: share of replies with the very level.
        within_one: share of replies within one level.
        kappa: Cohen's kappa with quadratic weights.
        chance: share of exact agreement when verdicts are dealt out at random.
    """

    exact: float
    within_one: float
    kappa: float
    chance: float


def agreement(
    labelled: Sequence[Labelled], verdicts: Sequence[Progress], axis: Axis, kind: Kind
) -> Agreement:
    """Compare verdicts with labels on one axis.

    Args:
        labelled: replies with their labels.
        verdicts: a judge's verdict on each.
        axis: the axis.
        kind: progress or setback.
    """
    a, b = _levels([item.label for item in labelled], axis, kind), _levels(verdicts, axis, kind)
    return Agreement(
        exact=float((a == b).mean()),
        within_one=float((abs(a - b) <= 1).mean()),
        kappa=quadratic_kappa(a, b),
        chance=float((a[:, None] == b).mean()),
    )


def kappa_interval(
    labelled: Sequence[Labelled], verdicts: Sequence[Progress], axis: Axis, kind: Kind
) -> tuple[float, float]:
    """95% bootstrap interval of the weighted kappa over scenarios (:func:`agreement`)."""
    a, b = _levels([item.label for item in labelled], axis, kind), _levels(verdicts, axis, kind)
    return _interval(labelled, lambda rows: quadratic_kappa(a[rows], b[rows]))


def reward_correlation(
    labelled: Sequence[Labelled], verdicts: Sequence[Progress]
) -> tuple[float, tuple[float, float]]:
    """Correlation of the turn rewards of labels and verdicts, with its 95% interval."""
    a = np.array([_reward(item.request, item.label) for item in labelled])
    b = np.array(
        [_reward(i.request, verdict) for i, verdict in zip(labelled, verdicts, strict=True)]
    )

    def correlation(rows: Any) -> float:
        return float(np.corrcoef(a[rows], b[rows])[0, 1])

    return correlation(slice(None)), _interval(labelled, correlation)


def quadratic_kappa(a: Array, b: Array) -> float:
    """Cohen's kappa with quadratic weights; 1 where all levels of both raters are the same."""
    # The mean over all pairs, without forming them.
    by_chance = float((a**2).mean() + (b**2).mean() - 2 * a.mean() * b.mean())
    return 1.0 - float(((a - b) ** 2).mean()) / by_chance if by_chance else 1.0


class NearestExemplarJudge:
    """The baseline: a sentence has the level of its nearest exemplar; the extremes count.

    Args:
        encoder: the sentence encoder.
    """

    name = "nearest exemplar"

    def __init__(self, encoder: SentenceEncoder) -> None:
        self.encoder = encoder
        exemplars = load_exemplars()
        self._levels = {
            axis: np.repeat(list(levels), [len(texts) for texts in levels.values()])
            for axis, levels in exemplars.items()
        }
        self._vectors = {
            axis: encoder([text for texts in levels.values() for text in texts])
            for axis, levels in exemplars.items()
        }

    def judge(self, requests: Sequence[JudgeRequest]) -> list[Progress | Failed]:
        """Return one filled rubric per request, in order."""
        return [self._judge(request.reply) for request in requests]

    def _judge(self, reply: str) -> Progress:
        sentences = self.encoder(split_sentences(reply))
        filled = []
        for axis in AXES:
            nearest = (sentences @ self._vectors[axis].T).argmax(1).numpy()
            levels = [int(level) for level in self._levels[axis][nearest]]
            filled.append(AxisLevels(max(0, *levels), min(0, *levels)))
        return Progress(*filled)


def table(labelled: Sequence[Labelled], judge: Judge, baseline: Judge) -> str:
    """Return the comparison of a judge with the labels, beside a baseline, as a Markdown table."""
    verdicts, others = (_verdicts(rater, labelled) for rater in (judge, baseline))
    lines = [
        "| level | exact | within one | weighted kappa [95%] | "
        "exact by chance | kappa of the nearest exemplar |",
        "|---|---|---|---|---|---|",
    ]
    for axis in AXES:
        for kind in KINDS:
            found = agreement(labelled, verdicts, axis, kind)
            low, high = kappa_interval(labelled, verdicts, axis, kind)
            other = agreement(labelled, others, axis, kind)
            lines.append(
                f"| {axis} {kind} | {found.exact:.2f} | {found.within_one:.2f} "
                f"| {found.kappa:.2f} [{low:.2f}, {high:.2f}] "
                f"| {found.chance:.2f} | {other.kappa:.2f} |"
            )
    for rater, given in ((judge, verdicts), (baseline, others)):
        r, (low, high) = reward_correlation(labelled, given)
        lines.append(f"\nturn reward, {rater.name}: r = {r:.2f} [{low:.2f}, {high:.2f}]")
    return "\n".join(lines)


def _verdicts(judge: Judge, labelled: Sequence[Labelled]) -> list[Progress]:
    found = judge.judge([item.request for item in labelled])
    return [verdict for verdict in found if isinstance(verdict, Progress)]


def _levels(rubrics: Sequence[Progress], axis: Axis, kind: Kind) -> Array:
    return np.array([getattr(rubric[axis], kind) for rubric in rubrics], dtype=np.float64)


def _reward(request: JudgeRequest, verdict: Progress) -> float:
    start = initial_state(request.scenario.deficit)
    end = [p + v for p, v in zip(start, increment(verdict), strict=True)]
    return box_distance(start) - box_distance(end)


def _interval(
    labelled: Sequence[Labelled], statistic: Callable[[Any], float]
) -> tuple[float, float]:
    """95% percentile bootstrap interval over scenarios."""
    names = [item.request.scenario.id for item in labelled]
    rows = [np.flatnonzero([name == one for name in names]) for one in sorted(set(names))]
    rng = np.random.default_rng(0)
    drawn = [
        statistic(np.concatenate([rows[i] for i in rng.integers(0, len(rows), len(rows))]))
        for _ in range(_DRAWS)
    ]
    low, high = np.quantile(drawn, [0.025, 0.975])
    return float(low), float(high)


def main(arguments: Sequence[str]) -> None:
    """Print the agreement of the embedding judge with the replies of a file."""
    from normkit.rl.judges.embedding import EmbeddingJudge

    if len(arguments) != 1:
        raise InputError("arguments must be one file of labelled replies")
    labelled = load_labelled(arguments[0])
    encoder = SentenceEncoder()
    people = len({item.request.scenario.id for item in labelled})
    print(f"{len(labelled)} replies to {people} people\n")
    print(table(labelled, EmbeddingJudge(encoder), NearestExemplarJudge(encoder)))


if __name__ == "__main__":
    main(sys.argv[1:])
