"""Ragged lists as flat rows, and a strategy that draws them."""

from __future__ import annotations

import torch
from hypothesis import strategies as st


def flat(rewards, groups=None, dtype=torch.float64):
    groups = groups or [0] * len(rewards)
    rows = [(r, i, t, groups[i]) for i, row in enumerate(rewards) for t, r in enumerate(row)]
    reward = torch.tensor([row[0] for row in rows], dtype=dtype)
    index = torch.tensor([row[1:] for row in rows], dtype=torch.int64).reshape(len(rows), 3)
    return reward, index[:, 0], index[:, 1], index[:, 2]


def ragged(unknown=False):
    """Rewards of dialogues of 1 to 6 turns, and the group of each dialogue."""
    reward = st.integers(-5, 5).map(float)
    if unknown:
        reward |= st.sampled_from([float("nan"), float("inf"), -float("inf")])
    dialogue = st.tuples(st.lists(reward, min_size=1, max_size=6), st.integers(0, 2))
    return st.lists(dialogue, min_size=1, max_size=9).map(
        lambda dialogues: ([row for row, _ in dialogues], [group for _, group in dialogues])
    )
