r"""The rows that advantage estimators work on, and the two normalizations they are made of.

Shapes: N turns (flat rows, any order); E episodes; S segments.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from normkit.errors import InputError
from normkit.functional.moments import segment_moments
from normkit.rl.returns import (
    Segments,
    impute_rewards,
    increasing,
    joint_segments,
    monte_carlo_returns,
)

Scope = Literal["group", "batch"]
Baseline = Literal["mean", "loo"]


class Episodes(NamedTuple):
    """Dialogues as wholes.

    Attributes:
        row: episode of each turn ``[N]``.
        total: sum of the episode's rewards ``[E]``.
        known: whether any of its rewards is known ``[E]``.
        pool: the episodes' groups.
    """

    row: Tensor
    total: Tensor
    known: Tensor
    pool: Segments


@dataclass(frozen=True)
class Turns:
    """Flat rows of a batch, one per turn that happened; :meth:`from_rows` checks and builds them.

    Attributes:
        reward: finite rewards ``[N]``, unknown ones imputed.
        dialogue: dialogue of the row ``[N]``.
        turn: index of the turn in its dialogue ``[N]``.
        group: group of the dialogue ``[N]``.
        batch: batch of the group ``[N]``; None where all are one batch.
        known: False where the reward was unknown ``[N]``; None where all are known.
    """

    reward: Tensor
    dialogue: Tensor
    turn: Tensor
    group: Tensor
    batch: Tensor | None
    known: Tensor | None

    @classmethod
    def from_rows(
        cls,
        reward: Tensor,
        dialogue: Tensor,
        turn: Tensor,
        group: Tensor,
        agent: Tensor | None = None,
        batch: Tensor | None = None,
    ) -> Turns:
        """Check the rows and fill in unknown rewards.

        Agents share nothing: each of them has dialogues, groups and batches of its own.

        Rewards are held in float64 (float32 on devices without it), so that the rounding of
        float32 sums is not mistaken for a difference between dialogues and scaled up.

        Args:
            reward: reward of each turn ``[N]``, floating point; NaN or infinite means unknown.
            dialogue: dialogue of each turn ``[N]``, int64.
            turn: index of the turn in its dialogue ``[N]``, int64.
            group: group of each turn's dialogue ``[N]``, int64.
            agent: who speaks ``[N]``, int64; one agent if None.
            batch: batch of each group ``[N]``, int64, where independent batches are stacked; one
                batch if None.

        Raises:
            InputError: for wrong shapes or dtypes, negative indices, a turn given twice, a dialogue
                in two groups, a group in two batches.
        """
        if reward.dim() != 1 or not reward.is_floating_point():
            raise InputError(
                f"reward must be floating point of shape (N,), got {reward.dtype} "
                f"{tuple(reward.shape)}"
            )
        indices = {"dialogue": dialogue, "turn": turn, "group": group}
        for name, index in {**indices, "agent": agent, "batch": batch}.items():
            if index is not None:
                check_index(name, index, reward)
        _check_homes("dialogue", dialogue, "group", group)
        if batch is not None:
            _check_homes("group", group, "batch", batch)
        if agent is not None:
            dialogue, _ = joint_segments(dialogue, agent)
            group, _ = joint_segments(group, agent)
            batch = agent if batch is None else joint_segments(batch, agent).ids
        _check_places(indices["dialogue"], joint_segments(dialogue, turn), turn)
        exact = reward.to(torch.float32 if reward.device.type == "mps" else torch.float64)
        filled = impute_rewards(exact, dialogue)
        known = None if filled is exact else torch.isfinite(exact)
        return cls(filled, dialogue, turn, group, batch, known)

    def returns(self, gamma: float) -> Tensor:
        """Monte-Carlo returns ``[N]``."""
        return monte_carlo_returns(self.reward, self.dialogue, self.turn, gamma)

    @property
    def pool(self) -> Segments:
        """The groups."""
        return joint_segments(self.group)

    @property
    def cell(self) -> Segments:
        """The same turn of the dialogues of a group."""
        return joint_segments(self.group, self.turn)

    @property
    def whole(self) -> Segments:
        """The batches."""
        return joint_segments(torch.zeros_like(self.group) if self.batch is None else self.batch)

    def episodes(self) -> Episodes:
        """Sum up every dialogue."""
        row, size = joint_segments(self.dialogue)
        total = self.reward.new_zeros(size).scatter_add(0, row, self.reward)
        rows = row if self.known is None else row[self.known]
        known = torch.zeros(size, dtype=torch.bool, device=row.device).index_fill(0, rows, True)
        pool, groups = self.pool
        home = pool.new_zeros(size).scatter(0, row, pool)
        return Episodes(row, total, known, Segments(home, groups))


def turn_normalize(
    value: Tensor,
    turns: Turns,
    ddof: int = 0,
    eps: float = 1e-8,
    baseline: Baseline = "mean",
    scale: bool = True,
) -> Tensor:
    r"""Compare each turn with the same turn of the dialogues of its group.

    ``(x_{i,t} - mean_j x_{j,t}) / (std_j x_{j,t} + eps)``, j over the dialogues of the group that
    reached turn t. A turn that one dialogue alone reached gets 0.

    Centering by a mean that contains the row itself shrinks the expected gradient of turn t by
    ``1 - P(n_t >= 1) / E[n_t]``, n_t the number of survivors: late turns most. With
    ``baseline="loo"`` only ``1 - P(n_t = 1) / E[n_t]`` is lost.

    Args:
        value: ``[N]``, usually returns.
        turns: the rows.
        ddof: subtracted from the count in the variance.
        eps: added to the deviation.
        baseline: "mean", or "loo" for the mean of the others, which is ``n / (n - 1)`` times the
            difference.
        scale: False centers only.

    Returns:
        ``[N]``.
    """
    return normalize_rows(value, turns.cell, turns.known, ddof, eps, baseline, scale)


def batch_normalize(
    value: Tensor,
    turns: Turns,
    scope: Scope = "group",
    ddof: int = 0,
    eps: float = 1e-8,
    scale: bool = True,
) -> Tensor:
    """Compare each turn with all turns of its group (or of the whole batch), at any index.

    Args:
        value: ``[N]``, immediate rewards for MAPO.
        turns: the rows.
        scope: pool over the "group" or over the "batch".
        ddof: subtracted from the count in the variance.
        eps: added to the deviation.
        scale: False centers only.

    Returns:
        ``[N]``.

    Raises:
        InputError: where ``scope`` is neither.
    """
    if scope not in ("group", "batch"):
        raise InputError(f"batch_scope must be group or batch, got {scope!r}")
    pool = turns.pool if scope == "group" else turns.whole
    return normalize_rows(value, pool, turns.known, ddof, eps, "mean", scale)


def normalize_rows(
    value: Tensor,
    segments: Segments,
    known: Tensor | None = None,
    ddof: int = 0,
    eps: float = 1e-8,
    baseline: Baseline = "mean",
    scale: bool = True,
) -> Tensor:
    """Center and scale rows by their segment, as :func:`turn_normalize` does for its cells.

    Args:
        value: ``[N]``.
        segments: what is compared.
        known: False where a row must stay out of the statistics ``[N]``.
        ddof: subtracted from the count in the variance.
        eps: added to the deviation.
        baseline: "mean" or "loo".
        scale: False centers only.

    Returns:
        ``[N]``; 0 in constant segments and in segments of one, arbitrary where not known.

    Raises:
        InputError: where ``baseline`` is neither "mean" nor "loo".
    """
    if baseline not in ("mean", "loo"):
        raise InputError(f"baseline must be mean or loo, got {baseline!r}")
    center, spread, n = segment_moments(value, *segments, known, ddof=ddof)
    # A constant segment has deviation zero, and must not become 0 / 0 where eps is zero.
    factor = torch.where(spread > 0, 1 / (spread + eps), 0) if scale else torch.ones_like(spread)
    if baseline == "loo":
        factor = factor * torch.where(n > 1, n / (n - 1).clamp(min=1), 0)
    ids = segments.ids
    return (value - center.index_select(0, ids)) * factor.index_select(0, ids)


def check_index(name: str, index: Tensor, reward: Tensor) -> None:
    """Raise InputError unless ``index`` is int64, shaped as ``reward`` and not negative."""
    if index.shape != reward.shape or index.dtype != torch.int64:
        raise InputError(
            f"{name} must be int64 of shape {tuple(reward.shape)}, got {index.dtype} "
            f"{tuple(index.shape)}"
        )
    if index.numel() and int(index.min()) < 0:
        raise InputError(f"{name} must not be negative, got {int(index.min())}")


def _check_homes(inner: str, index: Tensor, outer: str, home: Tensor) -> None:
    ids, size = joint_segments(index)
    first = home.new_zeros(size).scatter(0, ids, home)
    astray = first.index_select(0, ids) != home
    if bool(astray.any()):
        row = int(astray.nonzero()[0])
        several = {"group": "groups", "batch": "batches"}[outer]
        raise InputError(f"{outer}: {inner} {int(index[row])} stands in two {several}")


def _check_places(dialogue: Tensor, places: Segments, turn: Tensor) -> None:
    if increasing(places.ids):
        return
    times = torch.bincount(places.ids, minlength=places.size).index_select(0, places.ids)
    if int(times.max()) > 1:
        row = int((times > 1).nonzero()[0])
        raise InputError(
            "each (dialogue, turn) must stand once; "
            f"({int(dialogue[row])}, {int(turn[row])}) is given twice"
        )
