"""MARS (arXiv 2510.15414) in NumPy float64 with loops, over trajectories ``rewards[i][k]``.

A trajectory is one seat's side of one game. Besides the published estimator: the other order of sum
and mean, a running baseline (arXiv 2506.24119), the official pipeline on tokens, and Kuhn
poker with its gradient, played out by hand.
"""

from __future__ import annotations

import itertools

import numpy as np

from tests.reference.mapo import Rows, compare


def mars(rewards, groups, gamma=1.0, batch_scope="group", ddof=1, eps=1e-6, scale=False, tokens=()):
    """Of one seat; ``groups`` are the games (and seats) of the trajectories."""
    rows = Rows(rewards, groups)
    keys = getattr(rows, batch_scope)
    out = compare(rows.returns(gamma), keys, rows.known, ddof, eps, scale=scale)
    return whiten(out, tokens, rows.known) if len(tokens) else out


def whiten(values, tokens, known):
    """Every token carries its turn's value; mean and sample variance are those of all tokens."""
    parts = [[v] * n for v, n, k in zip(values, tokens, known, strict=True) if k]
    spread_out = np.array([x for part in parts for x in part])
    if not spread_out.size:
        return np.zeros(len(values))
    variance = ((spread_out - spread_out.mean()) ** 2).sum() / max(spread_out.size - 1, 1)
    return np.where(known, (values - spread_out.mean()) / np.sqrt(variance + 1e-8), 0)


def normalize_then_sum(rewards, groups):
    """Rewards less the mean of their group, then summed from each turn on."""
    rows = Rows(rewards, groups)
    centered = iter(compare(rows.reward, rows.group, rows.known, scale=False))
    lines = [[next(centered) for _ in row] for row in rewards]
    return [sum(line[k:]) for line in lines for k in range(len(line))]


def running_baseline(totals, keep=0.95):
    """Each total less the running mean of those before it, which begins at zero."""
    baseline, out = 0.0, []
    for total in totals:
        out.append(total - baseline)
        baseline = keep * baseline + (1 - keep) * total
    return out


def official_tokens(rewards, tokens, games, seats, eps=1e-8):
    """The authors' code, in exact arithmetic; dialogue i has turns of ``tokens[i][k]`` tokens.

    Turn rewards are centered by game and seat, whitened over all tokens, summed from each token on,
    centered by seat over the distinct sums (equal but for rounding counts as equal), and whitened.
    """
    pools = [(g, p) for g, p in zip(games, seats, strict=True)]
    lines = []
    for row, lengths, pool in zip(rewards, tokens, pools, strict=True):
        mates = [r for other, q in zip(rewards, pools, strict=True) if q == pool for r in other]
        line = []
        for r, n in zip(row, lengths, strict=True):
            line += [0.0] * (n - 1) + [r - np.mean(mates)]
        lines.append(line)
    lines = white(lines, eps)
    lines = [[sum(line[t:]) for t in range(len(line))] for line in lines]
    sums = {(p, round(v, 9)) for line, p in zip(lines, seats, strict=True) for v in line}
    means = {p: np.mean([v for q, v in sums if q == p]) for p in set(seats)}
    lines = [[v - means[p] for v in line] for line, p in zip(lines, seats, strict=True)]
    return white(lines, eps)


def white(lines, eps):
    values = np.array([v for line in lines for v in line])
    scale = np.sqrt(values.var(ddof=1) + eps)
    return [[(v - values.mean()) / scale for v in line] for line in lines]


# Kuhn poker -----------------------------------------------------------------------------------
# Cards 0, 1, 2; "p" passes, "b" bets. The first seat acts at "" and "pb", the second at "p", "b".


def kuhn_returns(cards, play):
    """Chips of the first seat at the end of a line of play."""
    wins = 1 if cards[0] > cards[1] else -1
    return {"pp": wins, "bb": 2 * wins, "pbb": 2 * wins, "bp": 1, "pbp": -1}[play]


def kuhn_histories(policy, deals=None):
    """Every line of play: probability, decisions ``(seat, information set, action)``, chips.

    ``policy[(card, history)]`` is the probability of a bet.
    """
    deals = deals or dict.fromkeys(itertools.permutations(range(3), 2), 1 / 6)
    out = []
    for cards, chance in deals.items():
        for play in ("pp", "pbp", "pbb", "bp", "bb"):
            probability, decisions = chance, []
            for k, action in enumerate(play):
                seat = k % 2
                key = (cards[seat], play[:k])
                bets = policy[key]
                probability *= bets if action == "b" else 1 - bets
                decisions.append((seat, key, action))
            out.append((probability, decisions, kuhn_returns(cards, play)))
    return out


def kuhn_equilibrium(alpha):
    """An equilibrium for every ``alpha`` in 0..1/3 (Kuhn, 1950)."""
    return {
        **{(0, ""): alpha, (1, ""): 0.0, (2, ""): 3 * alpha},
        **{(0, "pb"): 0.0, (1, "pb"): alpha + 1 / 3, (2, "pb"): 1.0},
        **{(0, "p"): 1 / 3, (1, "p"): 0.0, (2, "p"): 1.0},
        **{(0, "b"): 0.0, (1, "b"): 1 / 3, (2, "b"): 1.0},
    }


def kuhn_gradient(policy, deals=None, estimate=None):
    """Mean over both seats of ``sum_k A_k grad log pi``, by the logit of a bet.

    ``estimate(seat, chips, left)`` is the advantage of a turn with ``left`` turns of that seat from
    it on; the return itself if None.
    """
    out = dict.fromkeys(policy, 0.0)
    for probability, decisions, chips in kuhn_histories(policy, deals):
        for k, (seat, key, action) in enumerate(decisions):
            earned = chips if seat == 0 else -chips
            left = sum(s == seat for s, _, _ in decisions[k:])
            credit = earned if estimate is None else estimate(seat, earned, left)
            score = (action == "b") - policy[key]
            out[key] += probability * credit * score / 2
    return out


def kuhn_means(policy, deals=None):
    """Of each seat: mean return over its turns, and mean reward over its turns."""
    returns, turns, earned = np.zeros(2), np.zeros(2), np.zeros(2)
    for probability, decisions, chips in kuhn_histories(policy, deals):
        for seat, sign in ((0, 1), (1, -1)):
            k = sum(s == seat for s, _, _ in decisions)
            returns[seat] += probability * k * sign * chips
            earned[seat] += probability * sign * chips
            turns[seat] += probability * k
    return returns / turns, earned / turns
