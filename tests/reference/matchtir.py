"""MatchTIR (arXiv 2601.10712) in NumPy float64 with loops: similarity, matchings, turn rewards.

A call is ``(name, {parameter: value})``; scores are lists of rows.
"""

from __future__ import annotations

import itertools
from collections import Counter

import numpy as np


def jaccard(a, b):
    if list(a) == list(b):
        return 1.0
    if not a or not b:
        return 0.0
    common = sum((Counter(a) & Counter(b)).values())
    return common / (len(a) + len(b) - common)


def similarity(predicted, gold):
    (name, given), (wanted, parameters) = predicted, gold
    if name.lower() != wanted.lower():
        return 0.0
    right = sum(key in given and given[key] == value for key, value in parameters.items())
    return (1 + jaccard(list(parameters), list(given)) + right) / (2 + len(parameters))


def best_sum(scores):
    """Largest sum of a one-to-one matching, by trying all."""
    matrix = np.asarray(scores, dtype=float)
    if matrix.shape[0] > matrix.shape[1]:
        matrix = matrix.T
    m, n = matrix.shape
    return max(
        sum(matrix[i, j] for i, j in enumerate(columns))
        for columns in itertools.permutations(range(n), m)
    )


def greedy(scores):
    """Column of each row: pairs in order of falling score, the first pair first among equals."""
    m, n = len(scores), len(scores[0]) if scores else 0
    pairs = [(scores[i][j], i, j) for i in range(m) for j in range(n)]
    pairs.sort(key=lambda pair: -pair[0])
    out, taken = [-1] * m, set()
    for score, i, j in pairs:
        if score > 0 and out[i] < 0 and j not in taken:
            out[i] = j
            taken.add(j)
    return out


def transport(scores, reg, iterations=20_000):
    """Plan of entropic transport between uniform marginals, by plain scaling of the kernel."""
    kernel = np.exp(np.asarray(scores, dtype=float) / reg)
    m, n = kernel.shape
    u, v = np.ones(m), np.ones(n)
    for _ in range(iterations):
        v = 1 / n / (kernel.T @ u)
        u = 1 / m / (kernel @ v)
    return u[:, None] * kernel * v


def turn_rewards(turns, gold):
    """Greedy matching over the whole dialogue, averaged over the calls of each turn."""
    calls = [call for turn in turns for call in turn]
    scores = [[similarity(p, g) for g in gold] for p in calls]
    columns = iter(greedy(scores))
    rows = iter(scores)
    out = []
    for turn in turns:
        paid = [row[j] if j >= 0 else 0.0 for _, row, j in zip(turn, rows, columns, strict=False)]
        out.append(sum(paid) / len(paid) if paid else 0.0)
    return out


def answer_f1(answer, reference):
    def tokens(text):
        return set("".join(c if c.isalnum() or c.isspace() else " " for c in text.lower()).split())

    a, b = tokens(answer), tokens(reference)
    return 2 * len(a & b) / (len(a) + len(b)) if a & b else 0.0
