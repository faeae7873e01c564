"""Returns: scans against loops, and credit that crosses the user's turns."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from normkit.rl.returns import discounted_cumsum, monte_carlo_returns, token_gae, turn_gae
from tests.rl.rows import flat


@given(st.integers(0, 40), st.floats(0, 1))
def test_the_scan_is_the_recursion(length, factor):
    x = torch.randn(3, length, dtype=torch.float64)
    expected, running = torch.zeros_like(x), torch.zeros(3, dtype=torch.float64)
    for t in reversed(range(length)):
        running = x[:, t] + factor * running
        expected[:, t] = running
    torch.testing.assert_close(discounted_cumsum(x, factor), expected)
    torch.testing.assert_close(discounted_cumsum(x.T, factor, dim=0), expected.T)


def test_returns_of_the_card():
    rewards = [[1.0, 0, 2], [3, -1, 1]]
    assert monte_carlo_returns(*flat(rewards)[:3], 1.0).tolist() == [3, 2, 2, 3, 0, 1]
    expected = [2.62, 1.8, 2, 2.91, -0.1, 1]
    assert monte_carlo_returns(*flat(rewards)[:3], 0.9).tolist() == pytest.approx(expected)


def test_rows_may_stand_in_any_order():
    reward, dialogue, turn, _ = flat([[1.0, 0, 2], [3, -1], [4]])
    order = torch.randperm(6)
    whole = monte_carlo_returns(reward, dialogue, turn, 0.7)
    mixed = monte_carlo_returns(reward[order], dialogue[order], turn[order], 0.7)
    torch.testing.assert_close(mixed, whole[order])


def test_an_unknown_reward_takes_its_dialogues_mean():
    nan = float("nan")
    got = monte_carlo_returns(*flat([[1.0, nan, 3], [nan]])[:3], 1.0)
    assert got.tolist() == [6, 5, 3, 0]


def test_turn_gae_with_full_trace_is_return_minus_value():
    reward, dialogue, turn, _ = flat([[1.0, 0, 2], [3, -1]])
    value = torch.randn(5, dtype=torch.float64)
    expected = monte_carlo_returns(reward, dialogue, turn, 0.9) - value
    torch.testing.assert_close(turn_gae(reward, value, dialogue, turn, 0.9, 1.0), expected)


def test_token_credit_crosses_user_turns_unless_reset():
    mask = torch.tensor([[1, 1, 0, 0, 1, 1, 0]], dtype=torch.bool)
    reward = torch.tensor([[0, 0, 0, 0, 0, 1.0, 0]])
    zero = torch.zeros_like(reward)
    assert token_gae(reward, zero, mask).tolist() == [[1, 1, 0, 0, 1, 1, 0]]
    assert token_gae(reward, zero, mask, reset_at_user=True).tolist() == [[0, 0, 0, 0, 1, 1, 0]]


@given(st.lists(st.booleans(), min_size=1, max_size=24), st.floats(0, 1), st.floats(0, 1))
def test_token_gae_is_the_recursion_over_response_tokens(mask, gamma, lam):
    n = len(mask)
    reward, value = torch.randn(n, dtype=torch.float64), torch.randn(n, dtype=torch.float64)
    at = [t for t in range(n) if mask[t]]
    expected, running = torch.zeros(n, dtype=torch.float64), 0.0
    for k in reversed(range(len(at))):
        following = value[at[k + 1]] if k + 1 < len(at) else 0.0
        delta = reward[at[k]] + gamma * following - value[at[k]]
        running = delta + gamma * lam * running
        expected[at[k]] = running
    got = token_gae(reward[None], value[None], torch.tensor([mask]), gamma, lam)[0]
    torch.testing.assert_close(got, expected)
