r"""Advantage estimators as functions of :class:`~normkit.rl.turns.Turns`, a paper each.

:mod:`normkit.rl.advantage` registers them, and says what all of them keep to.

Shapes: N turns (flat rows).
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from normkit.errors import InputError
from normkit.functional.moments import segment_moments
from normkit.rl.returns import joint_segments, turn_gae
from normkit.rl.turns import (
    Baseline,
    Scope,
    Turns,
    batch_normalize,
    check_index,
    normalize_rows,
    turn_normalize,
)

__all__ = [
    "batch",
    "batch_returns",
    "gigpo",
    "grpo",
    "grpo_turn",
    "mapo",
    "mars",
    "matchtir",
    "ppo",
    "reinforce",
    "reinforce_plus_plus",
    "rloo",
    "turn",
    "turn_baseline",
]


def mapo(
    turns: Turns,
    *,
    gamma: float = 0.85,
    alpha: float = 0.5,
    beta: float | None = None,
    batch_scope: Scope = "group",
    baseline: Baseline = "mean",
    ddof: int = 0,
    eps: float = 1e-8,
    scale: bool = True,
) -> Tensor:
    r"""Mixed advantage of MAPO (arXiv 2603.06194; later named MICA).

    ``A = alpha A_turn + beta A_batch``: A_turn is the z-score of the *returns* over the dialogues
    of the group at the same turn index, A_batch the z-score of the *immediate rewards* over all
    turns of the pool.

    Before scaling, with ``beta = 1 - alpha``, this is the return
    ``r_t + alpha sum_{s>t} gamma^(s-t) r_s``: quasi-hyperbolic discounting, alpha being a dial
    between the myopic and the long-horizon gradient.

    Args:
        turns: the rows.
        gamma: discount per turn; the published launch scripts use 0.85.
        alpha: weight of A_turn.
        beta: weight of A_batch; ``1 - alpha`` if None.
        batch_scope: pool of A_batch: the rollout "group" (v3 of the paper) or the "batch" (v1).
        baseline: of A_turn, see :func:`turn_normalize`.
        ddof: subtracted from the count in both variances.
        eps: added to both deviations.
        scale: False centers only.

    Returns:
        Advantages ``[N]``.

    Raises:
        InputError: for a ``baseline`` or a ``batch_scope`` that does not exist.
    """
    by_turn = turn_normalize(turns.returns(gamma), turns, ddof, eps, baseline, scale)
    by_batch = batch_normalize(turns.reward, turns, batch_scope, ddof, eps, scale)
    return alpha * by_turn + (1 - alpha if beta is None else beta) * by_batch


def turn(
    turns: Turns,
    *,
    gamma: float = 0.85,
    baseline: Baseline = "mean",
    ddof: int = 0,
    eps: float = 1e-8,
    scale: bool = True,
) -> Tensor:
    """Turn-level normalization alone: MAPO with ``alpha = 1`` (MAPO's notes: v4).

    ``A = z(R_t)`` over the dialogues of the group at the same turn index.

    Args:
        turns: the rows.
        gamma: discount per turn.
        baseline: see :func:`turn_normalize`.
        ddof: subtracted from the count in the variance.
        eps: added to the deviation.
        scale: False centers only.

    Returns:
        Advantages ``[N]``.

    Raises:
        InputError: for a ``baseline`` that does not exist.
    """
    return turn_normalize(turns.returns(gamma), turns, ddof, eps, baseline, scale)


def batch(
    turns: Turns,
    *,
    batch_scope: Scope = "group",
    ddof: int = 0,
    eps: float = 1e-8,
    scale: bool = True,
) -> Tensor:
    """Batch-level normalization of the immediate rewards alone: MAPO with ``alpha = 0``.

    ``A = z(r_t)`` over all turns of the pool.

    Args:
        turns: the rows.
        batch_scope: pool over the "group" or over the "batch".
        ddof: subtracted from the count in the variance.
        eps: added to the deviation.
        scale: False centers only.

    Returns:
        Advantages ``[N]``.

    Raises:
        InputError: where ``batch_scope`` is neither.
    """
    return batch_normalize(turns.reward, turns, batch_scope, ddof, eps, scale)


def batch_returns(
    turns: Turns,
    *,
    gamma: float = 0.85,
    batch_scope: Scope = "group",
    ddof: int = 0,
    eps: float = 1e-8,
    scale: bool = True,
) -> Tensor:
    """Batch-level normalization of the returns: what MAPO reports as unstable (its notes: v2).

    ``A = z(R_t)`` over all turns of the pool.

    Args:
        turns: the rows.
        gamma: discount per turn.
        batch_scope: pool over the "group" or over the "batch".
        ddof: subtracted from the count in the variance.
        eps: added to the deviation.
        scale: False centers only.

    Returns:
        Advantages ``[N]``.

    Raises:
        InputError: where ``batch_scope`` is neither.
    """
    return batch_normalize(turns.returns(gamma), turns, batch_scope, ddof, eps, scale)


def grpo(turns: Turns, *, ddof: int = 1, eps: float = 1e-6, scale: bool = True) -> Tensor:
    """Outcome-only GRPO (arXiv 2402.03300): the z-score of a dialogue's total over its group.

    Every turn of a dialogue gets the same advantage.

    Args:
        turns: the rows.
        ddof: subtracted from the count in the variance; 1 is in common use.
        eps: added to the deviation; 1e-6 is in common use.
        scale: False centers only, as Dr. GRPO does (arXiv 2503.20783).

    Returns:
        Advantages ``[N]``.
    """
    row, total, known, pool = turns.episodes()
    return normalize_rows(total, pool, known, ddof, eps, scale=scale).index_select(0, row)


def rloo(turns: Turns) -> Tensor:
    """REINFORCE leave-one-out (arXiv 2402.14740): total minus the mean of the group's others."""
    row, total, known, pool = turns.episodes()
    return normalize_rows(total, pool, known, baseline="loo", scale=False).index_select(0, row)


def reinforce(turns: Turns, *, gamma: float = 1.0) -> Tensor:
    """REINFORCE without a baseline: the return itself (MAPO's notes: v3).

    ``A = sum_{s>=t} gamma^(s-t) r_s``.

    Args:
        turns: the rows.
        gamma: discount per turn.

    Returns:
        Advantages ``[N]``.
    """
    return turns.returns(gamma)


def reinforce_plus_plus(
    turns: Turns,
    *,
    gamma: float = 1.0,
    reset_at_user: bool = False,
    ddof: int = 0,
    eps: float = 1e-8,
) -> Tensor:
    """REINFORCE++ (arXiv 2501.03262): discounted returns, whitened over the whole batch.

    Args:
        turns: the rows.
        gamma: discount per turn.
        reset_at_user: cut credit at every user turn, so that a turn's return is its own reward.
            This reproduces implementations whose running sum is multiplied by the response mask;
            a comparison should say which was used.
        ddof: subtracted from the count in the variance.
        eps: added to the deviation.

    Returns:
        Advantages ``[N]``.
    """
    value = turns.reward if reset_at_user else turns.returns(gamma)
    return batch_normalize(value, turns, "batch", ddof, eps)


def gigpo(
    turns: Turns,
    *,
    anchor: Tensor | None = None,
    gamma: float = 0.95,
    weight: float = 1.0,
    ddof: int = 1,
    eps: float = 1e-6,
    scale: bool = True,
) -> Tensor:
    """Group-in-group policy optimization (arXiv 2505.10978): episode plus anchor-state advantage.

    ``A = A_episode + weight A_step``: the step term compares returns of turns that started from the
    same anchor state within the group, at any turn index.

    Args:
        turns: the rows.
        anchor: state that each turn started from ``[N]``, int64, not negative; the turn index if
            None, since free text hardly ever repeats.
        gamma: discount per turn of the step returns.
        weight: weight of the step term.
        ddof: subtracted from the count in the variances.
        eps: added to the deviations.
        scale: False centers only.

    Returns:
        Advantages ``[N]``.

    Raises:
        InputError: where ``anchor`` is not int64 ``[N]``, or negative.
    """
    cell = turns.cell
    if anchor is not None:
        check_index("anchor", anchor, turns.reward)
        cell = joint_segments(turns.group, anchor)
    step = normalize_rows(turns.returns(gamma), cell, turns.known, ddof, eps, scale=scale)
    return grpo(turns, ddof=ddof, eps=eps, scale=scale) + weight * step


def ppo(
    turns: Turns,
    *,
    value: Tensor,
    gamma: float = 0.99,
    lam: float = 0.95,
    whiten: bool = True,
) -> Tensor:
    """Turn-level GAE with a critic (arXiv 1506.02438), whitened over the batch.

    Args:
        turns: the rows.
        value: the critic's value before each turn ``[N]``.
        gamma: discount per turn.
        lam: weight of longer returns.
        whiten: center and scale over the batch.

    Returns:
        Advantages ``[N]``.

    Raises:
        InputError: where ``value`` is not finite.
    """
    if not bool(torch.isfinite(value).all()):
        raise InputError("value must be finite for every turn that happened")
    advantage = turn_gae(turns.reward, value, turns.dialogue, turns.turn, gamma, lam)
    return batch_normalize(advantage, turns, "batch") if whiten else advantage


def grpo_turn(turns: Turns, *, ddof: int = 1, eps: float = 1e-6) -> Tensor:
    """Z-score of the turn's own reward over its group and turn (MAPO's notes: grpo_multiturn).

    Args:
        turns: the rows.
        ddof: subtracted from the count in the variance.
        eps: added to the deviation.

    Returns:
        Advantages ``[N]``.
    """
    return turn_normalize(turns.reward, turns, ddof, eps)


def turn_baseline(turns: Turns, *, gamma: float = 0.85, eps: float = 1e-8) -> Tensor:
    """Return minus its turn's mean, whitened over the batch (MAPO's notes: multiturn_baseline).

    Args:
        turns: the rows.
        gamma: discount per turn.
        eps: added to the deviation over the batch.

    Returns:
        Advantages ``[N]``.
    """
    centered = turn_normalize(turns.returns(gamma), turns, scale=False)
    return batch_normalize(centered, turns, "batch", 0, eps)


def mars(
    turns: Turns,
    *,
    gamma: float = 1.0,
    batch_scope: Scope = "group",
    ddof: int = 1,
    eps: float = 1e-6,
    scale: bool = False,
    tokens: Tensor | None = None,
) -> Tensor:
    r"""Turn-level returns, centered by game and seat: MARS (arXiv 2510.15414; later MARSHAL).

    ``A_k = R_k - mean R`` with ``R_k = sum_{j>=k} gamma^(j-k) r_j``: the sum comes first, then the
    mean over all turns of the same game (``group``) and seat (``agent``). The other order, rewards
    centered before they are summed, takes off a mean for each turn that is left and so biases the
    gradient wherever a policy decides how long the game lasts.

    What is pooled: turns of a game and seat, if ``agent`` is given (or the seat is part of
    ``group``); turns of a game, seats together, if it is not; turns of a seat, games together, with
    ``batch_scope="batch"``. Keep the game: rewards in chips and rewards of one do not mix.

    Args:
        turns: the rows.
        gamma: discount per turn.
        batch_scope: pool over the "group" or over the "batch".
        ddof: subtracted from the count in the variance, with ``scale``.
        eps: added to the deviation, with ``scale``.
        scale: divide by the deviation of the pool as well (the authors' ``mean_std``).
        tokens: length of each reply ``[N]``, int64; whitens at the end over the tokens of the batch
            as the authors' code does (sample variance, 1e-8 inside the root), each token carrying
            its turn's advantage. Agents are batches of their own: to whiten seats together, make
            the seat part of ``group``.

    Returns:
        Advantages ``[N]``.

    Raises:
        InputError: where ``batch_scope`` is neither, or ``tokens`` does not fit the rows.
    """
    advantage = batch_normalize(turns.returns(gamma), turns, batch_scope, ddof, eps, scale)
    return advantage if tokens is None else _whiten_tokens(advantage, turns, tokens)


def matchtir(
    turns: Turns,
    *,
    gamma: float = 0.9,
    weight: float = 0.5,
    ddof: int = 1,
    eps: float = 1e-6,
    scale: bool = True,
    singleton: Literal["zero", "raw"] = "zero",
) -> Tensor:
    """Dual-level advantage of MatchTIR (arXiv 2601.10712): trajectory and turn.

    ``A = (1 - weight) A_traj + weight A_turn``: A_traj is the z-score of a dialogue's *sum* of turn
    rewards over its group, A_turn the z-score of the *returns* over the group's dialogues at the
    same turn index. Where all dialogues of a group earned the same sum, the turn term still trains.

    Args:
        turns: the rows.
        gamma: discount per turn of the returns.
        weight: weight of A_turn; 1/2 is the authors' code, the paper adds both without weights.
        ddof: subtracted from the count in both variances.
        eps: added to both deviations.
        scale: False centers only.
        singleton: A_turn of a turn that one dialogue alone reached: "zero", or the return itself
            ("raw", the authors' code).

    Returns:
        Advantages ``[N]``.

    Raises:
        InputError: where ``singleton`` is neither.
    """
    if singleton not in ("zero", "raw"):
        raise InputError(f"singleton must be zero or raw, got {singleton!r}")
    returns, cell = turns.returns(gamma), turns.cell
    by_turn = normalize_rows(returns, cell, turns.known, ddof, eps, scale=scale)
    if singleton == "raw":
        n = segment_moments(returns, *cell, turns.known).n
        by_turn = torch.where(n.index_select(0, cell.ids) == 1, returns, by_turn)
    return torch.lerp(grpo(turns, ddof=ddof, eps=eps, scale=scale), by_turn, weight)


def _whiten_tokens(advantage: Tensor, turns: Turns, tokens: Tensor) -> Tensor:
    check_index("tokens", tokens, turns.reward)
    ids, size = turns.whole
    weight = tokens.to(advantage.dtype)
    if turns.known is not None:
        weight = weight * turns.known

    def total(x: Tensor) -> Tensor:
        return x.new_zeros(size).scatter_add(0, ids, weight * x)

    n = total(torch.ones_like(advantage))
    deviation = advantage - (total(advantage) / n.clamp(min=1)).index_select(0, ids)
    variance = total(deviation**2) / (n - 1).clamp(min=1)
    return deviation / (variance + 1e-8).sqrt().index_select(0, ids)
