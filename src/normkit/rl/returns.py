r"""Returns and generalized advantages, over turns and over tokens, without a loop over time.

Turns come as flat rows in any order. Time is the turn index, not the position among the rows: a
turn that is missing still discounts once. A turn whose reward is not finite happened, but its
judgement failed: it counts as the mean of its dialogue's known rewards (MAPO, arXiv 2603.06194,
official reward manager), so that later credit passes through it.

Shapes: N turns (flat rows); B rows of a token grid, L tokens; T steps of a scan.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from normkit.errors import InputError
from normkit.functional.moments import segment_moments


class Segments(NamedTuple):
    """A partition of rows: the segment of each row ``[N]``, and how many segments there are."""

    ids: Tensor
    size: int


def discounted_cumsum(x: Tensor, factor: Tensor | float, dim: int = -1) -> Tensor:
    r"""Reverse discounted sum, ``y_t = x_t + factor_t y_{t+1}``.

    Computed by doubling: after k steps every element holds the discounted sum of the ``2^k``
    elements from itself on, so ``log2(T)`` vectorized steps suffice.

    Args:
        x: values, floating point, any shape; the scan runs along ``dim`` of size T.
        factor: scalar, or a tensor broadcastable to ``x``; ``factor_t`` weighs what comes after t.
        dim: the dimension of time.

    Returns:
        Tensor shaped and typed like ``x``; half precision is accumulated in float32.

    Raises:
        InputError: for integer ``x`` or a factor that does not broadcast to it.
    """
    if not x.is_floating_point():
        raise InputError(f"x must be floating point, got {x.dtype}")
    y = _accumulable(x).movedim(dim, -1)
    try:
        weight = torch.as_tensor(factor, dtype=y.dtype, device=x.device).expand(x.shape)
    except RuntimeError:
        shape = tuple(torch.as_tensor(factor).shape)
        raise InputError(f"factor {shape} does not broadcast to x {tuple(x.shape)}") from None
    weight = weight.movedim(dim, -1)[..., :-1]
    return _scan(y, weight, y.shape[-1]).movedim(-1, dim).to(x.dtype)


def joint_segments(*indices: Tensor) -> Segments:
    """Number the combinations of several indices, so that rows which agree in all share a segment.

    Numbers are in lexicographic order and stay below a small multiple of N however large or sparse
    the indices are.

    Args:
        indices: one or more int64 tensors ``[N]``, none negative.

    Returns:
        The segments; some may have no row.
    """
    limit = 4 * indices[0].numel() + 1024
    ids, size = _compact(indices[0], limit)
    for index in indices[1:]:
        other, width = _compact(index, limit)
        ids, size = ids * width + other, size * width
        if size > limit:
            ids, size = _compact(ids, limit)
    return Segments(ids, size)


def impute_rewards(reward: Tensor, dialogue: Tensor) -> Tensor:
    """Replace rewards that are not finite by the mean of their dialogue's known ones, or by 0.

    Args:
        reward: ``[N]``.
        dialogue: dialogue of each row ``[N]``, int64.

    Returns:
        Finite rewards ``[N]``.
    """
    if bool(torch.isfinite(reward.sum())):  # far cheaper than a look at every row
        return reward
    known = torch.isfinite(reward)
    ids, size = joint_segments(dialogue)
    mean = segment_moments(reward, ids, size, known).center.to(reward.dtype)
    return torch.where(known, reward, mean.index_select(0, ids))


def monte_carlo_returns(reward: Tensor, dialogue: Tensor, turn: Tensor, gamma: float) -> Tensor:
    r"""Discounted return of every turn, ``R_t = sum_{s >= t} gamma^(s-t) r_s``.

    MAPO (arXiv 2603.06194), step 2: no bootstrap, no critic. Credit crosses the user's turns.

    Args:
        reward: reward of each turn ``[N]``; unknown ones are imputed (:func:`impute_rewards`).
        dialogue: dialogue of each turn ``[N]``, int64.
        turn: index of the turn in its dialogue ``[N]``, int64; rows may stand in any order.
        gamma: discount per turn, 0..1.

    Returns:
        Returns ``[N]``, in the dtype of ``reward``.

    Raises:
        InputError: for integer rewards, shapes that differ, or a ``gamma`` out of range.
    """
    return turn_gae(reward, None, dialogue, turn, gamma, 1.0)


def turn_gae(
    reward: Tensor,
    value: Tensor | None,
    dialogue: Tensor,
    turn: Tensor,
    gamma: float = 1.0,
    lam: float = 0.95,
) -> Tensor:
    r"""Generalized advantage estimation over turns (arXiv 1506.02438, eq. 16).

    ``delta_t = r_t + gamma V_{t+1} - V_t``, ``A_t = sum_l (gamma lam)^l delta_{t+l}``; the value
    after the last turn is zero.

    Args:
        reward: ``[N]``; unknown ones are imputed (:func:`impute_rewards`).
        value: value of the state before each turn ``[N]``; None for zero everywhere, which with
            ``lam = 1`` gives Monte-Carlo returns.
        dialogue: ``[N]``, int64.
        turn: ``[N]``, int64.
        gamma: discount per turn, 0..1.
        lam: weight of longer returns, 0..1.

    Returns:
        Advantages ``[N]``, in the dtype of ``reward``.

    Raises:
        InputError: for integer rewards, shapes that differ, or a ``gamma`` or ``lam`` out of range.
    """
    if not reward.is_floating_point():
        raise InputError(f"reward must be floating point, got {reward.dtype}")
    for name, other in (("value", value), ("dialogue", dialogue), ("turn", turn)):
        if other is not None and (other.shape != reward.shape or reward.dim() != 1):
            raise InputError(
                f"reward and {name} must have the same shape (N,), got {tuple(reward.shape)} "
                f"and {tuple(other.shape)}"
            )
    _check_weights(gamma, lam)
    if reward.numel() == 0:
        return reward.clone()
    place, _ = joint_segments(dialogue, turn)
    if not increasing(place):
        order = torch.argsort(place, stable=True)
        sorted_value = None if value is None else value[order]
        out = turn_gae(reward[order], sorted_value, dialogue[order], turn[order], gamma, lam)
        return torch.empty_like(out).scatter(0, order, out)
    x = impute_rewards(_accumulable(reward), dialogue)
    # The scan runs over all dialogues at once: a factor of zero ends each of them.
    same = dialogue[1:] == dialogue[:-1]
    gap = torch.where(same, turn[1:] - turn[:-1], 1)
    regular = reward.numel() == 1 or int(gap.max()) == 1
    discount = same.to(x.dtype) * (gamma if regular else gamma ** gap.to(x.dtype))
    if value is not None:
        value = value.to(x.dtype)
        x = x + pad(discount * value[1:], (0, 1)) - value
    return _scan(x, discount * lam, int(turn.max()) - int(turn.min()) + 1).to(reward.dtype)


def increasing(ids: Tensor) -> bool:
    """Whether every element of ``[N]`` is above the one before it."""
    return bool((ids[1:] > ids[:-1]).all())


def token_gae(
    reward: Tensor,
    value: Tensor,
    response_mask: Tensor,
    gamma: float = 1.0,
    lam: float = 1.0,
    reset_at_user: bool = False,
) -> Tensor:
    r"""Generalized advantage estimation over the response tokens of packed dialogues.

    Tokens of the user, the system and padding are skipped over: the token that follows the last
    token of one reply is the first token of the next.

    Args:
        reward: reward at each token ``[B, L]``.
        value: value at each token ``[B, L]``.
        response_mask: True on the policy's tokens ``[B, L]``.
        gamma: discount per response token, 0..1.
        lam: weight of longer returns, 0..1.
        reset_at_user: cut credit at every user turn. This reproduces the defect of older
            implementations whose running sum is multiplied by the response mask.

    Returns:
        Advantages ``[B, L]``, zero outside the responses.

    Raises:
        InputError: for shapes that differ or a ``gamma`` or ``lam`` out of range.
    """
    if not reward.shape == value.shape == response_mask.shape:
        raise InputError(
            "reward, value and response_mask must have the same shape (B, L), got "
            f"{tuple(reward.shape)}, {tuple(value.shape)} and {tuple(response_mask.shape)}"
        )
    _check_weights(gamma, lam)
    mask = response_mask.bool()
    r, v = (_accumulable(x).masked_fill(~mask, 0) for x in (reward, value))
    # Between replies the scan carries its sum on undiscounted, and the value looked ahead to is
    # that of the next response token; or else both are zero there.
    carried = torch.full_like(v, 0.0 if reset_at_user else 1.0)
    ahead = v if reset_at_user else discounted_cumsum(v, carried.masked_fill(mask, 0))
    delta = (r + gamma * pad(ahead[..., 1:], (0, 1)) - v).masked_fill(~mask, 0)
    advantage = discounted_cumsum(delta, carried.masked_fill(mask, gamma * lam))
    return advantage.masked_fill(~mask, 0).to(reward.dtype)


def _scan(y: Tensor, weight: Tensor, longest: int) -> Tensor:
    """Reverse scan along the last dimension, ``y_t + weight_t y_{t+1}``.

    Args:
        y: ``[*, T]``.
        weight: ``[*, T - 1]``.
        longest: no sum reaches over more elements than this.
    """
    reach = 1
    while reach < min(longest, y.shape[-1]):
        ahead = torch.addcmul(y[..., :-reach], weight, y[..., reach:])
        y = torch.cat([ahead, y[..., -reach:]], -1)
        weight = weight[..., :-reach] * weight[..., reach:]
        reach *= 2
    return y


def _compact(index: Tensor, limit: int) -> tuple[Tensor, int]:
    size = int(index.max()) + 1 if index.numel() else 0
    if size <= limit:
        return index, size
    values, index = torch.unique(index, return_inverse=True)
    return index, values.numel()


def _accumulable(x: Tensor) -> Tensor:
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def _check_weights(gamma: float, lam: float) -> None:
    for name, number in (("gamma", gamma), ("lam", lam)):
        if not 0 <= number <= 1:
            raise InputError(f"{name} must be in 0..1, got {number}")
