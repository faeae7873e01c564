"""MAPO in NumPy float64 with loops, over lists of dialogues ``rewards[i][t]`` in ``groups[i]``."""

from __future__ import annotations

import numpy as np


def returns(rewards, gamma):
    out = []
    for row in rewards:
        running, back = 0.0, []
        for r in reversed(row):
            running = r + gamma * running
            back.append(running)
        out.append(back[::-1])
    return out


def _z(values, value, eps):
    values = np.asarray(values, dtype=np.float64)
    spread = values.std()
    return 0.0 if spread < 1e-12 else (value - values.mean()) / (spread + eps)


def mapo(rewards, groups, gamma=0.85, alpha=0.5, scope="group", eps=1e-8):
    ret = returns(rewards, gamma)
    out = []
    for i, row in enumerate(rewards):
        mates = [j for j in range(len(rewards)) if groups[j] == groups[i]]
        pool = mates if scope == "group" else range(len(rewards))
        line = []
        for t in range(len(row)):
            peers = [ret[j][t] for j in mates if t < len(rewards[j])]
            every = [r for j in pool for r in rewards[j]]
            line.append(alpha * _z(peers, ret[i][t], eps) + (1 - alpha) * _z(every, row[t], eps))
        out.append(line)
    return out
