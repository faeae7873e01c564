"""Ragged lists as flat rows."""

from __future__ import annotations

import torch


def flat(rewards, groups=None, dtype=torch.float64):
    groups = groups or [0] * len(rewards)
    rows = [(r, i, t, groups[i]) for i, row in enumerate(rewards) for t, r in enumerate(row)]
    reward = torch.tensor([row[0] for row in rows], dtype=dtype)
    index = torch.tensor([row[1:] for row in rows], dtype=torch.int64).reshape(len(rows), 3)
    return reward, index[:, 0], index[:, 1], index[:, 2]
