"""Slow, obvious oracles of the benchmark scores."""

from __future__ import annotations

import numpy as np


def eqbench_score(ratings, reference):
    """Percent of one EQ-Bench v2 answer, emotion by emotion."""
    total = np.float64(0)
    for rated, right in zip(ratings, reference, strict=True):
        d = abs(np.float64(rated) - np.float64(right))
        if d == 0:
            penalty = np.float64(0)
        elif d <= 5:
            penalty = np.float64(6.5) * (1 / (1 + np.exp(-1.2 * (d - 4))))
        else:
            penalty = d
        total = total + penalty
    return float((10 - 0.7477 * total) * 10)


def majority(answers):
    """The most frequent answer that is not None; among equals the one that came first."""
    best = None
    for answer in answers:
        if answer is None:
            continue
        if best is None or list(answers).count(answer) > list(answers).count(best):
            best = answer
    return best


def percent_right(rows):
    """Share of rows, each a list of (given, right), in which everything given is right."""
    right = 0
    for row in rows:
        right += all(given is not None and given == label for given, label in row)
    return 100.0 * right / len(rows)


def answer_logprob_per_byte(logits, prompt, answer, text):
    """Sum of log softmax at the answer's tokens over the bytes of its text; logits [L, V]."""
    total = np.float64(0)
    for k, token in enumerate(answer):
        row = np.asarray(logits[len(prompt) + k - 1], dtype=np.float64)
        total = total + row[token] - (row.max() + np.log(np.exp(row - row.max()).sum()))
    return float(total / len(text.encode()))
