"""Turns on a grid of tokens, the way TRL and verl hold a batch: to flat rows and back.

Engines hold dialogues as rows of tokens, with a mask that is true on what the policy sampled.
Estimators take one row per turn. A turn is a run of the mask, or what explicit turn numbers say.

Shapes: B dialogues, L tokens (padded), N turns (flat rows).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from normkit.errors import InputError
from normkit.rl.returns import joint_segments


@dataclass(frozen=True)
class GridTurns:
    """The turns of a grid as flat rows, in order of dialogue and turn.

    Attributes:
        reward: reward of each turn ``[N]``, float64 (float32 on devices without it).
        dialogue: row of the grid that each turn is in ``[N]``.
        turn: index of the turn in its dialogue ``[N]``.
        turn_row: row of each token's turn ``[B, L]``; -1 for tokens the policy did not sample.
    """

    reward: Tensor
    dialogue: Tensor
    turn: Tensor
    turn_row: Tensor


def turns_of_mask(mask: Tensor) -> Tensor:
    """Number the runs of a mask: replies with something of the user's or the world's in between.

    Args:
        mask: True (or not 0) on the policy's tokens ``[B, L]``.

    Returns:
        Turn of each token ``[B, L]``, int64, from 0 in every dialogue; -1 outside the mask.

    Raises:
        InputError: for a mask that is not a grid.
    """
    if mask.dim() != 2:
        raise InputError(f"mask must have shape (B, L), got {tuple(mask.shape)}")
    ours = mask.bool()
    begins = ours.clone()
    begins[:, 1:] &= ~ours[:, :-1]
    return (begins.cumsum(1) - 1).masked_fill(~ours, -1)


def grid_turns(reward: Tensor, mask: Tensor, turn: Tensor | None = None) -> GridTurns:
    """Lay out the turns of a grid as flat rows.

    A turn's reward is the sum over its tokens and over the tokens after it up to the next turn
    (engines put a reward on the last token of the text, which may be the user's); what stands
    before the first turn counts to the first. So rows and grid have the same sum, dialogues without
    any turn aside. A reward that is not finite makes that of its turn unknown.

    Args:
        reward: reward at each token ``[B, L]``, floating point.
        mask: True (or not 0) on the policy's tokens ``[B, L]``.
        turn: turn of each token ``[B, L]``, integer, never falling along a dialogue; what it says
            outside the mask is not looked at. Runs of the mask if None; needed where two turns
            stand side by side, or where something inside a reply is masked out.

    Raises:
        InputError: for shapes that differ, or turns that fall or are negative.
    """
    if turn is None:
        turn = turns_of_mask(mask)
    if reward.dim() != 2 or not reward.shape == mask.shape == turn.shape:
        raise InputError(
            "reward, mask and turn must have the same shape (B, L), got "
            f"{tuple(reward.shape)}, {tuple(mask.shape)} and {tuple(turn.shape)}"
        )
    ours = mask.bool()
    turn = turn.long().masked_fill(~ours, -1)
    latest = turn.cummax(1).values if turn.numel() else turn
    if bool((turn[ours] < 0).any()) or bool((turn < latest)[ours].any()):
        raise InputError("turn must be at least 0 and never fall along a dialogue")
    first = torch.where(ours, turn, turn.max() + 1 if turn.numel() else 0)
    first = first.amin(1, keepdim=True) if turn.shape[1] else first
    owner = torch.where(latest < 0, first, latest)
    home = torch.arange(len(turn), device=turn.device)[:, None].expand_as(turn)
    key, size = joint_segments(home.reshape(-1), owner.reshape(-1))
    key = key.view_as(turn)
    present, row = torch.unique(key[ours], return_inverse=True)
    turn_row = torch.full_like(turn, -1).masked_scatter(ours, row)
    place = torch.full((size,), -1, dtype=torch.int64, device=turn.device)
    place[present] = torch.arange(len(present), device=turn.device)
    target = place[key]
    exact = reward.to(torch.float32 if reward.device.type == "mps" else torch.float64)
    kept = target >= 0
    total = exact.new_zeros(len(present)).index_add(0, target[kept], exact[kept])
    dialogue, index = (torch.empty_like(present).scatter(0, row, x[ours]) for x in (home, turn))
    return GridTurns(total, dialogue, index, turn_row)
