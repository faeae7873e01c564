"""Advantage estimators in NumPy float64 with loops, over dialogues ``rewards[i][t]`` in groups.

Each takes ``(rewards, groups, **options)`` and returns one number per turn, dialogue by dialogue.
A reward that is not finite is unknown: it counts as the mean of its dialogue in sums over time,
stays out of statistics, and is credited nothing. Formulas: arXiv 2603.06194 (MAPO), 2402.03300
(GRPO), 2402.14740 (RLOO), 2501.03262 (REINFORCE++), 2505.10978 (GiGPO), 2601.10712
(MatchTIR), 1506.02438 (GAE).
"""

from __future__ import annotations

import numpy as np


def impute(rewards):
    out = []
    for row in rewards:
        finite = [r for r in row if np.isfinite(r)]
        mean = sum(finite) / len(finite) if finite else 0.0
        out.append([r if np.isfinite(r) else mean for r in row])
    return out


def returns(rewards, gamma):
    return gae(rewards, [[0.0] * len(row) for row in rewards], gamma, 1.0)


def gae(rewards, values, gamma, lam):
    out = []
    for row, value in zip(rewards, values, strict=True):
        running, following, back = 0.0, 0.0, []
        for r, v in zip(reversed(row), reversed(value), strict=True):
            running = r + gamma * following - v + gamma * lam * running
            following = v
            back.append(running)
        out.append(back[::-1])
    return out


def compare(values, keys, known, ddof=0, eps=1e-8, loo=False, scale=True):
    """Center and scale each value by those with its key."""
    out = np.zeros(len(values))
    for i, value in enumerate(values):
        mates = [j for j in range(len(values)) if keys[j] == keys[i] and known[j]]
        if not known[i] or len(mates) < 2:
            continue
        peers = np.array([values[j] for j in mates])
        rest = np.array([values[j] for j in mates if j != i])
        out[i] = value - (rest if loo else peers).mean()
        if scale:
            spread = np.sqrt(((peers - peers.mean()) ** 2).sum() / (len(peers) - ddof))
            out[i] /= spread + eps
    return out


class Rows:
    """Ragged dialogues as flat lists."""

    def __init__(self, rewards, groups):
        at = [(i, t) for i, row in enumerate(rewards) for t in range(len(row))]
        self.filled = impute(rewards)
        self.reward = [self.filled[i][t] for i, t in at]
        self.known = [bool(np.isfinite(rewards[i][t])) for i, t in at]
        self.dialogue = [i for i, _ in at]
        self.turn = [t for _, t in at]
        self.group = [groups[i] for i, _ in at]
        self.cell = [(groups[i], t) for i, t in at]
        self.batch = [0] * len(at)

    def returns(self, gamma):
        return [r for row in returns(self.filled, gamma) for r in row]

    def mask(self, values):
        return np.where(self.known, values, 0.0)


def turn(rewards, groups, gamma=0.85, baseline="mean", **how):
    rows = Rows(rewards, groups)
    return compare(rows.returns(gamma), rows.cell, rows.known, loo=baseline == "loo", **how)


def batch(rewards, groups, batch_scope="group", **how):
    rows = Rows(rewards, groups)
    return compare(rows.reward, getattr(rows, batch_scope), rows.known, **how)


def batch_returns(rewards, groups, gamma=0.85, batch_scope="group", **how):
    rows = Rows(rewards, groups)
    return compare(rows.returns(gamma), getattr(rows, batch_scope), rows.known, **how)


def mapo(
    rewards, groups, gamma=0.85, alpha=0.5, beta=None, batch_scope="group", baseline="mean", **how
):
    beta = 1 - alpha if beta is None else beta
    by_turn = turn(rewards, groups, gamma, baseline, **how)
    return alpha * by_turn + beta * batch(rewards, groups, batch_scope, **how)


def grpo(rewards, groups, ddof=1, eps=1e-6, scale=True, loo=False):
    totals = [sum(row) for row in impute(rewards)]
    known = [bool(np.isfinite(row).any()) for row in rewards]
    score = compare(totals, groups, known, ddof, eps, loo, scale)
    rows = Rows(rewards, groups)
    return rows.mask([score[i] for i in rows.dialogue])


def rloo(rewards, groups):
    return grpo(rewards, groups, loo=True, scale=False)


def reinforce(rewards, groups, gamma=1.0):
    rows = Rows(rewards, groups)
    return rows.mask(rows.returns(gamma))


def reinforce_plus_plus(rewards, groups, gamma=1.0, reset_at_user=False, **how):
    rows = Rows(rewards, groups)
    return compare(rows.returns(0.0 if reset_at_user else gamma), rows.batch, rows.known, **how)


def gigpo(rewards, groups, anchor=None, gamma=0.95, weight=1.0, ddof=1, eps=1e-6, scale=True):
    rows = Rows(rewards, groups)
    state = list(zip(rows.group, rows.turn if anchor is None else anchor, strict=True))
    step = compare(rows.returns(gamma), state, rows.known, ddof, eps, scale=scale)
    return grpo(rewards, groups, ddof, eps, scale) + weight * step


def grpo_turn(rewards, groups, ddof=1, eps=1e-6):
    rows = Rows(rewards, groups)
    return compare(rows.reward, rows.cell, rows.known, ddof, eps)


def turn_baseline(rewards, groups, gamma=0.85, eps=1e-8):
    rows = Rows(rewards, groups)
    centered = turn(rewards, groups, gamma, scale=False)
    return compare(centered, rows.batch, rows.known, eps=eps)


def matchtir(
    rewards, groups, gamma=0.9, weight=0.5, ddof=1, eps=1e-6, scale=True, singleton="zero"
):
    rows = Rows(rewards, groups)
    gain = rows.returns(gamma)
    by_turn = compare(gain, rows.cell, rows.known, ddof, eps, scale=scale)
    if singleton == "raw":
        reached = [c for c, known in zip(rows.cell, rows.known, strict=True) if known]
        by_turn = rows.mask(
            [
                r if reached.count(c) == 1 else a
                for r, c, a in zip(gain, rows.cell, by_turn, strict=True)
            ]
        )
    return (1 - weight) * grpo(rewards, groups, ddof, eps, scale) + weight * by_turn


def ppo(rewards, groups, value, gamma=0.99, lam=0.95, whiten=True):
    rows, value = Rows(rewards, groups), list(value)
    lines = [[value.pop(0) for _ in row] for row in rewards]
    raw = [a for row in gae(rows.filled, lines, gamma, lam) for a in row]
    return compare(raw, rows.batch, rows.known) if whiten else rows.mask(raw)


ESTIMATORS = {
    "mapo": mapo,
    "grpo": grpo,
    "turn": turn,
    "batch": batch,
    "batch-returns": batch_returns,
    "reinforce": reinforce,
    "reinforce++": reinforce_plus_plus,
    "rloo": rloo,
    "gigpo": gigpo,
    "grpo-turn": grpo_turn,
    "turn-baseline": turn_baseline,
    "matchtir": matchtir,
    "ppo": ppo,
}


def policy_loss(log_ratio, advantage, unit, weight, low, high, dual):
    """Clipped surrogate by tokens; those of a unit share the geometric mean of their ratios."""
    total, clipped_weight = 0.0, 0.0
    for k, a in enumerate(advantage):
        mates = [x for x, u in zip(log_ratio, unit, strict=True) if u == unit[k]]
        ratio = np.exp(sum(mates) / len(mates))
        gain = min(ratio * a, min(max(ratio, 1 - low), 1 + high) * a)
        if a < 0 and dual:
            gain = max(gain, dual * a)
        total -= weight[k] * gain
        clipped_weight += weight[k] * (gain != ratio * a)
    return total, clipped_weight


# Credit on the stop/go chain ------------------------------------------------------------------
# Four turns; at each the policy goes on with probability 0.6 for the reward (1, -1, .5, .2) or
# stops for 0, which ends the dialogue. One logit per turn; gamma 1.

GO = 0.6
GO_REWARD = (1.0, -1.0, 0.5, 0.2)


def stop_go_episodes():
    """Every dialogue of the chain: its probability, actions and rewards."""
    out = []
    for length in range(5):  # goes on `length` times, then stops or has reached the end
        stops = length < 4
        actions = [1] * length + [0] * stops
        rewards = [*GO_REWARD[:length], *[0.0] * stops]
        out.append((GO**length * ((1 - GO) if stops else 1), actions, rewards))
    return out


def stop_go_groups(size):
    """Every group that can happen: its probability, each dialogue's actions and rewards."""
    episodes = stop_go_episodes()
    out = []
    for combination in np.ndindex(*(len(episodes),) * size):
        chosen = [episodes[i] for i in combination]
        out.append((np.prod([p for p, _, _ in chosen]), [(a, r) for _, a, r in chosen]))
    return out


def stop_go_gradient(groups, advantages):
    """Expected policy gradient per turn, from the advantages of all turns in order."""
    total, advantages = np.zeros(4), iter(advantages)
    for probability, dialogues in groups:
        for actions, _ in dialogues:
            for t, action in enumerate(actions):
                total[t] += probability * (action - GO) * next(advantages) / len(dialogues)
    return total


def myopic_gradient():
    """Gradient of each turn's own reward only: alive * p (1 - p) * reward, in closed form."""
    return np.array([GO**t * GO * (1 - GO) * GO_REWARD[t] for t in range(4)])


def true_gradient():
    """Gradient of the expected sum of rewards, by backward induction."""
    out, following = np.zeros(4), 0.0
    for t in reversed(range(4)):
        gain = GO_REWARD[t] + following  # of going on over stopping, which earns nothing
        out[t] = GO**t * GO * (1 - GO) * gain
        following = GO * gain
    return out
