"""Inverse-CDF sampling: exact frequencies, nuclei, probabilities, edge cases."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from normkit.errors import NormkitError
from normkit.rl.sampling import sample


def reference(logits, u, temperature=1.0, top_p=1.0):
    """One row, one uniform, in NumPy float64 with a plain loop."""
    z = np.asarray(logits, dtype=np.float64) / temperature
    p = np.exp(z - z.max())
    p /= p.sum()
    order = np.arange(len(p))
    if top_p < 1:
        order = np.argsort(-p, kind="stable")
        kept, mass = [], 0.0
        for i in order:
            if mass >= top_p:
                break
            kept.append(i)
            mass += p[i]
        order = np.array(kept)
    target, running = u * p[order].sum(), 0.0
    for i in order:
        running += p[i]
        if running > target:
            return int(i), float(np.log(p[i]))
    raise AssertionError


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    vocabulary=st.sampled_from([1, 2, 255, 256, 257, 1500]),
    temperature=st.sampled_from([0.5, 1.0, 3.0]),
    top_p=st.sampled_from([1.0, 0.9, 0.2]),
)
def test_agrees_with_a_plain_loop(seed, vocabulary, temperature, top_p):
    rng = np.random.default_rng(seed)
    logits = rng.normal(size=(5, vocabulary)).astype(np.float32) * 3
    u = rng.random(5)
    tokens, logprobs = sample(torch.from_numpy(logits), u, temperature, top_p)
    for row, uniform, token, logprob in zip(logits, u, tokens, logprobs, strict=True):
        # Float32 exponentials may move the edge between two tokens by a rounding.
        near = {reference(row, float(np.clip(uniform + d, 0, 1 - 1e-12)), temperature, top_p)[0]
                for d in (-1e-5, 0.0, 1e-5)}  # fmt: skip
        assert token in near
        z = row.astype(np.float64) / temperature
        expected = z[token] - z.max() - np.log(np.exp(z - z.max()).sum())
        assert logprob == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("top_p", [1.0, 0.75])
def test_an_even_grid_of_uniforms_gives_exact_frequencies(top_p):
    p = np.array([0.5, 0.25, 0.125, 0.125])
    u = (np.arange(4096) + 0.5) / 4096
    logits = torch.from_numpy(np.log(p)).float().expand(4096, 4)
    tokens, _ = sample(logits, u, top_p=top_p)
    found = np.bincount(tokens, minlength=4) / 4096
    expected = p if top_p == 1 else np.array([2 / 3, 1 / 3, 0, 0])
    assert np.abs(found - expected).max() <= 2 / 4096


def test_impossible_and_banned_tokens_are_never_drawn():
    logits = torch.zeros(2000, 700)
    logits[:, :300] = -torch.inf
    logits[:, 699] = -torch.inf
    banned = torch.tensor([300, 698])
    u = np.concatenate([np.linspace(0, 1, 1998, endpoint=False), [0.0, np.nextafter(1, 0)]])
    for options in ({}, {"top_p": 0.99}, {"greedy": True}):
        tokens, logprobs = sample(logits, u, banned=banned, **options)
        assert min(tokens) >= 301
        assert max(tokens) <= 697
        # The ban is no part of the probability.
        assert logprobs == pytest.approx([-np.log(399)] * 2000, abs=1e-5)
    assert sample(logits, u)[0][-2:] == [300, 698]


@pytest.mark.parametrize("options", [{}, {"top_p": 0.9}, {"greedy": True}])
def test_a_ban_holds_where_the_banned_token_has_all_the_mass(options):
    logits = torch.tensor([[200.0, 0.0, 1.0], [0.0, 0.0, 200.0]])
    tokens, logprobs = sample(logits, np.array([0.5, 0.5]), banned=torch.tensor([0]), **options)
    assert tokens == [2, 2]
    assert logprobs == [-199, 0]


def test_greedy_ignores_the_uniform():
    logits = torch.tensor([[0.0, 3.0, 1.0]]).expand(3, 3)
    tokens, _ = sample(logits, np.array([0.0, 0.5, 0.999]), greedy=True, top_p=0.1)
    assert tokens == [1, 1, 1]


def test_half_precision_logits_are_scored_in_float32():
    logits = torch.randn(4, 999).bfloat16()
    tokens, logprobs = sample(logits, np.full(4, 0.3))
    table = torch.log_softmax(logits.double(), -1)
    assert logprobs == pytest.approx(table[range(4), tokens].tolist(), abs=1e-5)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_logits_that_are_not_finite_are_an_error(value):
    logits = torch.zeros(2, 5)
    logits[1, 3] = value
    with pytest.raises(NormkitError, match="not finite"):
        sample(logits, np.array([0.5, 0.5]))


def test_wide_nuclei_are_found_beyond_the_first_candidates():
    logits = torch.zeros(3, 5000)
    tokens, _ = sample(logits, np.array([0.01, 0.5, 0.999]), top_p=0.9)
    assert len(set(tokens)) == 3
