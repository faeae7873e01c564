"""Returns and generalized advantages, over turns and over tokens, without a loop over time.

Shapes: N turns (flat rows); D dialogues, T turns of the longest; B rows, L tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor

from normkit.errors import InputError
from normkit.functional.moments import segment_moments


def discounted_cumsum(x: Tensor, factor: Tensor | float, dim: int = -1) -> Tensor:
    r"""Reverse discounted sum, ``y_t = x_t + factor_t y_{t+1}``.

    Computed by doubling in ``log2(T)`` vectorized steps.

    Args:
        x: values, any shape; the scan runs along ``dim`` of size T.
        factor: scalar, or a tensor broadcastable to ``x``; ``factor_t`` weighs what comes after t.
        dim: the dimension of time.

    Returns:
        Tensor shaped like ``x``.
    """
    y = x.movedim(dim, -1)
    weight = torch.as_tensor(factor, dtype=x.dtype, device=x.device).expand(x.shape)
    weight = weight.movedim(dim, -1)
    reach = 1
    while reach < y.shape[-1]:
        pad = (0, reach)
        later = torch.nn.functional.pad(y[..., reach:], pad)
        y = y + weight * later
        weight = weight * torch.nn.functional.pad(weight[..., reach:], pad)
        reach *= 2
    return y.movedim(-1, dim)


def impute_rewards(reward: Tensor, dialogue: Tensor, mask: Tensor | None = None) -> Tensor:
    """Replace unknown rewards by the mean of their dialogue's known ones (0 where there is none).

    Args:
        reward: ``[N]``; NaN and infinity count as unknown.
        dialogue: ``[N]``.
        mask: False where the reward is unknown ``[N]``.

    Returns:
        Finite rewards ``[N]``.
    """
    known = torch.isfinite(reward) if mask is None else torch.isfinite(reward) & mask
    size = int(dialogue.max()) + 1 if dialogue.numel() else 0
    mean = segment_moments(reward, dialogue, size, known, kind="std").center.to(reward.dtype)
    return torch.where(known, reward, mean[dialogue])


def monte_carlo_returns(
    reward: Tensor, dialogue: Tensor, turn: Tensor, gamma: float, mask: Tensor | None = None
) -> Tensor:
    r"""Discounted return of every turn, ``R_t = sum_{s >= t} gamma^(s-t) r_s``.

    MAPO (arXiv 2603.06194), step 2: no bootstrap, no critic. Credit crosses the user's turns.

    Args:
        reward: reward of each turn ``[N]``; unknown ones are imputed (:func:`impute_rewards`) so
            that later credit passes through them.
        dialogue: dialogue of each turn ``[N]``.
        turn: index of the turn in its dialogue ``[N]``; rows may stand in any order.
        gamma: discount per turn.
        mask: False where the reward is unknown ``[N]``.

    Returns:
        Returns ``[N]``.
    """
    grid, at = _grid(impute_rewards(reward, dialogue, mask), dialogue, turn)
    return discounted_cumsum(grid, gamma).flatten()[at]


def turn_gae(
    reward: Tensor,
    value: Tensor,
    dialogue: Tensor,
    turn: Tensor,
    gamma: float = 1.0,
    lam: float = 0.95,
    mask: Tensor | None = None,
) -> Tensor:
    r"""Generalized advantage estimation over turns (arXiv 1506.02438, eq. 16).

    ``delta_t = r_t + gamma V_{t+1} - V_t``, ``A_t = sum_l (gamma lam)^l delta_{t+l}``; the value
    after the last turn is zero.

    Args:
        reward: ``[N]``; unknown ones are imputed.
        value: value of the state before each turn ``[N]``.
        dialogue: ``[N]``.
        turn: ``[N]``.
        gamma: discount per turn.
        lam: weight of longer returns, 0..1.
        mask: False where the reward is unknown ``[N]``.

    Returns:
        Advantages ``[N]``.
    """
    rewards, at = _grid(impute_rewards(reward, dialogue, mask), dialogue, turn)
    values, _ = _grid(value.to(reward.dtype), dialogue, turn)
    following = torch.nn.functional.pad(values[:, 1:], (0, 1))
    return discounted_cumsum(rewards + gamma * following - values, gamma * lam).flatten()[at]


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
        gamma: discount per response token.
        lam: weight of longer returns, 0..1.
        reset_at_user: cut credit at every user turn. This reproduces the defect of older
            implementations whose running sum is multiplied by the response mask.

    Returns:
        Advantages ``[B, L]``, zero outside the responses.
    """
    mask = response_mask.bool()
    zero = torch.zeros((), dtype=reward.dtype, device=reward.device)
    reward, value = torch.where(mask, reward, zero), torch.where(mask, value, zero)
    if reset_at_user:
        follows = torch.nn.functional.pad(mask[:, 1:], (0, 1))
        following = torch.nn.functional.pad(value[:, 1:], (0, 1)) * follows
        delta = torch.where(mask, reward + gamma * following - value, zero)
        return torch.where(mask, discounted_cumsum(delta, gamma * lam * follows), zero)
    # Between replies the scan carries its sum on undiscounted, and the value looked ahead to is
    # that of the next response token.
    carry = torch.where(mask, zero, 1 + zero)
    ahead = discounted_cumsum(value, carry)
    following = torch.nn.functional.pad(ahead[:, 1:], (0, 1))
    delta = torch.where(mask, reward + gamma * following - value, zero)
    factor = torch.where(mask, gamma * lam + zero, 1 + zero)
    return torch.where(mask, discounted_cumsum(delta, factor), zero)


def _grid(x: Tensor, dialogue: Tensor, turn: Tensor) -> tuple[Tensor, Tensor]:
    """Scatter flat rows to ``[D, T]``; return the grid and each row's place in it."""
    if x.numel() == 0:
        return x.reshape(0, 1), torch.zeros(0, dtype=torch.int64, device=x.device)
    if x.shape != dialogue.shape or x.shape != turn.shape:
        raise InputError(
            "reward, dialogue and turn must have the same shape (N,); got "
            f"{tuple(x.shape)}, {tuple(dialogue.shape)} and {tuple(turn.shape)}"
        )
    height, width = int(dialogue.max()) + 1, int(turn.max()) + 1
    at = dialogue * width + turn
    grid = x.new_zeros(height * width).scatter(0, at, x)
    return grid.reshape(height, width), at
