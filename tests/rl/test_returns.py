"""Returns: scans against loops, credit that crosses the user's turns, the numbering of rows."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from normkit.errors import InputError
from normkit.rl.returns import (
    discounted_cumsum,
    impute_rewards,
    joint_segments,
    monte_carlo_returns,
    token_gae,
    turn_gae,
)
from tests.reference import mapo as oracle
from tests.rl.rows import flat, ragged

NAN = float("nan")
discounts = st.sampled_from([0.0, 0.85, 1.0]) | st.floats(0, 1)


def rand(*shape, seed=0):
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


# ---------------------------------------------------------------------- scans


@settings(deadline=None)
@given(st.integers(0, 40), st.integers(0, 9), st.booleans())
def test_the_scan_is_the_recursion(length, seed, varies):
    x = rand(3, length, seed=seed)
    factor = rand(3, length, seed=seed + 10).sigmoid() if varies else torch.full_like(x, 0.9)
    expected, running = torch.zeros_like(x), torch.zeros(3, dtype=torch.float64)
    for t in reversed(range(length)):
        running = x[:, t] + factor[:, t] * running
        expected[:, t] = running
    given_ = factor if varies else 0.9
    torch.testing.assert_close(discounted_cumsum(x, given_), expected)
    torch.testing.assert_close(
        discounted_cumsum(x.T, factor.T if varies else 0.9, dim=0), expected.T
    )


def test_the_scan_is_differentiable():
    x, factor = rand(2, 7).requires_grad_(), rand(2, 7, seed=1).requires_grad_()
    assert torch.autograd.gradcheck(discounted_cumsum, (x, factor))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_accumulated_in_float32(dtype):
    x = torch.ones(3000, dtype=dtype)
    got = discounted_cumsum(x, 1.0)
    assert got.dtype == dtype
    assert got[0] == torch.tensor(3000.0, dtype=dtype)


@settings(deadline=None)
@given(ragged(), discounts, discounts, st.integers(0, 9))
def test_turn_gae_is_the_recursion_in_any_order_of_rows(data, gamma, lam, seed):
    reward, dialogue, turn, _ = flat(*data)
    value = rand(len(reward), seed=seed)
    numbers = iter(value.tolist())
    lines = [[next(numbers) for _ in row] for row in data[0]]
    expected = [a for row in oracle.gae(data[0], lines, gamma, lam) for a in row]
    order = torch.randperm(len(reward), generator=torch.Generator().manual_seed(seed))
    rows = (x[order] for x in (reward, value, dialogue, turn))
    got = torch.empty_like(reward).scatter(0, order, turn_gae(*rows, gamma, lam))
    np.testing.assert_allclose(got.numpy(), expected, atol=1e-9)


def test_returns_of_the_card():
    rewards = [[1.0, 0, 2], [3, -1, 1]]
    assert monte_carlo_returns(*flat(rewards)[:3], 1.0).tolist() == [3, 2, 2, 3, 0, 1]
    expected = [2.62, 1.8, 2, 2.91, -0.1, 1]
    assert monte_carlo_returns(*flat(rewards)[:3], 0.9).tolist() == pytest.approx(expected)


def test_distances_closed_add_up_to_the_distance_closed():
    """With the incremental distance reward and gamma 1, R_t = phi(P_{t-1}) - phi(P_T)."""
    distance = rand(9).abs()
    reward = distance[:-1] - distance[1:]
    zero, turn = torch.zeros(8, dtype=torch.int64), torch.arange(8)
    got = monte_carlo_returns(reward, zero, turn, 1.0)
    torch.testing.assert_close(got, distance[:-1] - distance[-1])


def test_a_reward_at_the_end_reaches_the_first_turn():
    reward, dialogue, turn, _ = flat([[0.0] * 11 + [1.0], [0.0]])
    got = monte_carlo_returns(reward, dialogue, turn, 0.9)
    assert got[0].item() == pytest.approx(0.9**11)
    assert got[12] == 0


def test_time_is_the_turn_index():
    """A turn that is not there still discounts, however far the indices lie apart."""
    reward = torch.tensor([1.0, 1.0, 1.0, 1.0])
    dialogue, turn = torch.tensor([0, 0, 0, 5]), torch.tensor([2, 3, 10**9, 10**9 + 1])
    got = monte_carlo_returns(reward, dialogue, turn, 0.5)
    assert got.tolist() == [1.5, 1, 1, 1]
    turn = torch.tensor([0, 2, 3, 0])
    assert monte_carlo_returns(reward, dialogue, turn, 0.5).tolist() == [1.375, 1.5, 1, 1]


def test_an_unknown_reward_takes_its_dialogues_mean():
    reward, dialogue, turn, _ = flat([[1.0, NAN, 3], [NAN], [float("inf"), 5]])
    assert impute_rewards(reward, dialogue).tolist() == [1, 2, 3, 0, 5, 5]
    assert monte_carlo_returns(reward, dialogue, turn, 1.0).tolist() == [6, 5, 3, 0, 10, 5]


def test_large_finite_rewards_are_known():
    """Their sum overflows, which is no sign that one of them is infinite."""
    reward = torch.tensor([1e308, 1e308], dtype=torch.float64)
    assert torch.equal(impute_rewards(reward, torch.tensor([0, 1])), reward)


def test_turn_gae_with_full_trace_is_return_minus_value():
    reward, dialogue, turn, _ = flat([[1.0, 0, 2], [3, -1]])
    value = rand(5)
    expected = monte_carlo_returns(reward, dialogue, turn, 0.9) - value
    torch.testing.assert_close(turn_gae(reward, value, dialogue, turn, 0.9, 1.0), expected)


# ---------------------------------------------------------------------- tokens


def test_token_credit_crosses_user_turns_unless_reset():
    """The row that verl 0.9.1 was run on: mask 1100110, reward 1 at the last reply token."""
    mask = torch.tensor([[1, 1, 0, 0, 1, 1, 0]], dtype=torch.bool)
    reward = torch.tensor([[0, 0, 0, 0, 0, 1.0, 0]])
    zero = torch.zeros_like(reward)
    assert token_gae(reward, zero, mask).tolist() == [[1, 1, 0, 0, 1, 1, 0]]
    assert token_gae(reward, zero, mask, reset_at_user=True).tolist() == [[0, 0, 0, 0, 1, 1, 0]]


@settings(deadline=None)
@given(st.lists(st.booleans(), min_size=1, max_size=24), discounts, discounts, st.integers(0, 9))
def test_token_gae_is_gae_over_the_response_tokens(mask, gamma, lam, seed):
    n = len(mask)
    reward, value = rand(n, seed=seed), rand(n, seed=seed + 10)
    at = [t for t in range(n) if mask[t]]
    expected = np.zeros(n)
    lines = ([reward[at].tolist()], [value[at].tolist()])
    expected[at] = oracle.gae(*lines, gamma, lam)[0]
    hidden = torch.tensor(mask)
    reward, value = (x.masked_fill(~hidden, NAN)[None] for x in (reward, value))
    got = token_gae(reward, value, hidden[None], gamma, lam)[0]
    np.testing.assert_allclose(got.numpy(), expected, atol=1e-9)


@settings(deadline=None)
@given(st.lists(st.booleans(), min_size=1, max_size=24), discounts, discounts, st.integers(0, 9))
def test_reset_at_user_is_gae_over_each_reply_alone(mask, gamma, lam, seed):
    n = len(mask)
    reward, value = rand(n, seed=seed), rand(n, seed=seed + 10)
    expected, start = np.zeros(n), 0
    while start < n:
        end = start
        while end < n and mask[end]:
            end += 1
        if end > start:
            lines = ([reward[start:end].tolist()], [value[start:end].tolist()])
            expected[start:end] = oracle.gae(*lines, gamma, lam)[0]
        start = end + 1
    hidden = torch.tensor([mask])
    got = token_gae(reward[None], value[None], hidden, gamma, lam, reset_at_user=True)[0]
    np.testing.assert_allclose(got.numpy(), expected, atol=1e-9)


# ---------------------------------------------------------------------- numbering


@settings(deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3), st.integers(0, 3)), max_size=20),
    st.sampled_from([1, 1000, 2**40]),
)
def test_joint_segments_number_combinations_in_order(rows, factor):
    index = torch.tensor(rows, dtype=torch.int64).reshape(len(rows), 3) * factor
    ids, size = joint_segments(*index.unbind(1))
    assert all(0 <= i < size for i in ids.tolist())
    assert size <= 64 + 64 * (len(rows) * 4 + 1024)
    for a, i in zip(rows, ids.tolist(), strict=True):
        for b, j in zip(rows, ids.tolist(), strict=True):
            assert (a < b) == (i < j)


# ---------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda x, i: discounted_cumsum(i, 1.0), "x must be floating point"),
        (lambda x, i: discounted_cumsum(x, torch.ones(3)), r"factor \(3,\) does not broadcast"),
        (lambda x, i: monte_carlo_returns(x, i, i[:1], 1.0), "reward and turn must have the same"),
        (lambda x, i: monte_carlo_returns(i, i, i, 0.5), "reward must be floating point"),
        (lambda x, i: monte_carlo_returns(x, i, i, -0.1), r"gamma must be in 0\.\.1"),
        (lambda x, i: turn_gae(x, x[:1], i, i), "reward and value must have the same"),
        (lambda x, i: turn_gae(x, x, i, i, 1.0, 1.5), r"lam must be in 0\.\.1"),
        (lambda x, i: token_gae(x[None], x[None], i), "same shape"),
        (lambda x, i: token_gae(x[None], x[None], i[None], gamma=2.0), "gamma"),
    ],
)
def test_bad_input_is_named(call, words):
    with pytest.raises(InputError, match=words):
        call(torch.ones(2), torch.arange(2))
