"""Advantage estimators: the card's tables, the laws that all of them share, bad input."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from normkit.errors import InputError
from normkit.rl.advantage import ESTIMATORS, diagnose, estimate, get_estimator, to_tokens
from tests.reference import mapo as oracle
from tests.rl.rows import flat

NAN = float("nan")
CARD = [[1.0, 0, 2], [3, -1, 1]]
RAGGED = [[1.0, 0, 2], [3, -1], [0, 2, 1]]
ragged = st.lists(
    st.tuples(st.lists(st.integers(-5, 5), min_size=1, max_size=6), st.integers(0, 2)),
    min_size=1,
    max_size=9,
)


def run(name, rewards, groups=None, **options):
    reward, dialogue, turn, group = flat(rewards, groups)
    if "value" in get_estimator(name).needs:
        options["value"] = 0.3 * turn.double() + reward.nan_to_num(0, 0, 0).sign()
    return estimate(name, reward, dialogue, turn, group, **options)


@pytest.mark.parametrize(
    ("rewards", "gamma", "expected"),
    [
        (CARD, 1.0, [0, 0.112702, 0.887298, 0.774597, -1.274597, -0.5]),
        (CARD, 0.9, [-0.5, 0.112702, 0.887298, 1.274597, -1.274597, -0.5]),
        (
            RAGGED,
            1.0,
            [0.353553, -0.212132, 0.908248, 0.10939, -1.502903, -0.054695, 0.898539, -0.5],
        ),
    ],
)
def test_the_tables_of_the_card(rewards, gamma, expected):
    for name in ("mapo", "mica"):
        assert run(name, rewards, gamma=gamma).tolist() == pytest.approx(expected, abs=1e-6)


@settings(deadline=None)
@given(ragged, st.floats(0, 1), st.floats(0, 1), st.sampled_from(["group", "batch"]))
def test_mapo_is_the_reference(data, gamma, alpha, scope):
    rewards, groups = [[float(r) for r in row] for row, _ in data], [g for _, g in data]
    got = run("mapo", rewards, groups, gamma=gamma, alpha=alpha, batch_scope=scope)
    expected = oracle.mapo(rewards, groups, gamma, alpha, scope)
    np.testing.assert_allclose(got.numpy(), np.concatenate(expected), atol=1e-6)


def test_the_weights_select_the_halves():
    torch.testing.assert_close(run("mapo", RAGGED, alpha=1.0), run("turn", RAGGED))
    torch.testing.assert_close(run("mapo", RAGGED, alpha=0.0), run("batch", RAGGED))


@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
def test_one_turn_is_grpo_for_any_weight(alpha):
    rewards, groups = [[1.0], [2], [5], [0], [3]], [0, 0, 0, 1, 1]
    got = run("mapo", rewards, groups, alpha=alpha, ddof=1, eps=1e-6)
    torch.testing.assert_close(got, run("grpo", rewards, groups))


def test_a_constant_per_turn_leaves_the_turn_term_alone():
    shifted = [[r + c for r, c in zip(row, (5, -3, 11), strict=True)] for row in CARD]
    torch.testing.assert_close(run("turn", shifted), run("turn", CARD))


def test_means_are_zero():
    reward, dialogue, turn, group = flat(RAGGED)
    for t in range(3):
        assert abs(estimate("turn", reward, dialogue, turn, group)[turn == t].mean()) < 1e-12
    assert abs(run("batch", RAGGED).mean()) < 1e-12


def test_a_late_reward_credits_the_first_turn():
    late = [[0.0, 0, 1], [0, 0, 0], [0, 0, 0.5]]
    assert run("turn", late)[0] > 0
    assert run("batch", late)[0] < 0


def test_quasi_hyperbolic_discounting():
    """Before scaling, centered MAPO is the gradient of r_t + alpha sum gamma^(s-t) r_s."""
    gamma, alpha = 0.85, 0.37
    rewards = torch.randn(1, 7, dtype=torch.float64)[0].tolist()
    r = np.array(rewards)
    mixed = alpha * np.array(oracle.returns([rewards], gamma)[0]) + (1 - alpha) * r
    direct = [
        r[t] + alpha * sum(gamma ** (s - t) * r[s] for s in range(t + 1, 7)) for t in range(7)
    ]
    np.testing.assert_allclose(mixed, direct, atol=1e-12)


def _stop_go(group_size, estimator):
    """Expected gradient of the card's stop/go chain, by enumerating every group of episodes."""
    p, reward_go = 0.6, (1, -1, 0.5, 0.2)
    episodes = []
    for length in range(5):  # go `length` times, then stop (or reach the end)
        stopped = length < 4
        actions = [1] * length + ([0] if stopped else [])
        rewards = [*reward_go[:length], *([0.0] if stopped else [])]
        episodes.append((p**length * ((1 - p) if stopped else 1), actions, rewards))
    total = np.zeros(4)
    for combo in np.ndindex(*(len(episodes),) * group_size):
        chosen = [episodes[i] for i in combo]
        probability = np.prod([e[0] for e in chosen])
        advantage = estimator([e[2] for e in chosen])
        for (_, actions, _), line in zip(chosen, advantage, strict=True):
            for t, action in enumerate(actions):
                total[t] += probability * (action - p) * line[t] / group_size
    return total


def _centered(values):
    out = [list(row) for row in values]
    for t in range(max(len(row) for row in values)):
        peers = [row[t] for row in values if t < len(row)]
        for row in out:
            if t < len(row):
                row[t] -= sum(peers) / len(peers)
    return out


def test_bias_of_turn_centering_on_the_stop_go_chain():
    true = np.array([0.149568, -0.090432, 0.053568, 0.010368])
    myopic = np.array([0.24, -0.144, 0.0432, 0.010368])
    alive = 0.6 ** np.arange(4)  # probability that an episode reaches turn t
    shrink = 1 - (1 - (1 - alive) ** 4) / (4 * alive)
    np.testing.assert_allclose(shrink[:3], [0.75, 0.594, 0.422], atol=6e-4)

    def returns(rewards):
        return oracle.returns(rewards, 1.0)

    np.testing.assert_allclose(_stop_go(1, returns), true, atol=1e-6)
    got = _stop_go(4, lambda r: _centered(returns(r)))
    np.testing.assert_allclose(got / true, shrink, atol=1e-4)
    accumulated = _stop_go(4, lambda r: returns(_centered(r)))
    np.testing.assert_allclose(accumulated / myopic, shrink, atol=1e-4)
    np.testing.assert_allclose(_stop_go(1, lambda r: r), myopic, atol=1e-6)


@pytest.mark.parametrize("name", ESTIMATORS)
class TestEveryEstimator:
    @pytest.mark.parametrize(
        "rewards",
        [
            [[2.0]],
            [[1.0, 1, 1], [1, 1, 1]],
            [[NAN, 1.0], [2.0, NAN], [3.0, 4.0]],
            [[NAN], [NAN]],
            [[1.0], [float(t) for t in range(12)]],
            [[float("inf"), 1.0], [0.0, 2.0]],
        ],
    )
    def test_hard_batches_are_finite(self, name, rewards):
        got = run(name, rewards)
        assert torch.isfinite(got).all()
        unknown = ~torch.isfinite(flat(rewards)[0])
        assert (got[unknown] == 0).all()

    def test_permuting_rows_permutes_advantages(self, name):
        reward, dialogue, turn, group = flat([*RAGGED, [4.0, 1]], [0, 1, 0, 1])
        options = {"value": reward.sin()} if name == "ppo" else {}
        whole = estimate(name, reward, dialogue, turn, group, **options)
        order = torch.randperm(len(reward), generator=torch.Generator().manual_seed(3))
        if options:
            options = {"value": options["value"][order]}
        mixed = estimate(name, *(x[order] for x in (reward, dialogue, turn, group)), **options)
        torch.testing.assert_close(mixed, whole[order])

    def test_masked_rows_influence_nothing(self, name):
        rewards = [[1.0, 2], [3.0, 5], [0.0, 1]]
        reward, dialogue, turn, group = flat(rewards)
        mask = torch.tensor([True, True, True, False, True, True])
        options = {"value": torch.zeros(6, dtype=torch.float64)} if name == "ppo" else {}
        first = estimate(name, reward, dialogue, turn, group, mask, **options)
        reward = reward.masked_fill(~mask, 1e6)
        second = estimate(name, reward, dialogue, turn, group, mask, **options)
        torch.testing.assert_close(first, second)
        assert first[3] == 0

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
    def test_keeps_dtype_and_input(self, name, dtype):
        reward, dialogue, turn, group = flat(RAGGED, dtype=dtype)
        before = reward.clone()
        options = {"value": reward.float()} if name == "ppo" else {}
        got = estimate(name, reward, dialogue, turn, group, **options)
        assert got.dtype == dtype
        assert torch.equal(reward, before)


@pytest.mark.parametrize("name", ["mapo", "turn", "batch", "grpo", "batch-returns", "gigpo"])
def test_scaling_all_rewards_changes_nothing(name):
    scaled = [[1000 * r for r in row] for row in RAGGED]
    torch.testing.assert_close(run(name, scaled), run(name, RAGGED), atol=1e-5, rtol=1e-5)


def test_rloo_by_hand():
    assert run("rloo", [[1.0, 1], [4], [0, 0]]).tolist() == [0, 0, 3, -3, -3]


def test_tokens_take_the_advantage_of_their_turn():
    rows = torch.tensor([[-1, 0, 0, -1, 1], [2, -1, -1, -1, -1]])
    got = to_tokens(torch.tensor([1.0, 2, 3]), rows)
    assert got.tolist() == [[0, 1, 1, 0, 2], [3, 0, 0, 0, 0]]


def test_diagnosis():
    found = diagnose(*flat([[1.0, 0, 2], [3, -1], [0]]))
    assert found.survivors == [3, 2, 1]
    assert found.zero_variance == pytest.approx(1 / 3)
    assert -1 <= found.correlation <= 1


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"name": "nope"}, "estimator must be one of mapo"),
        ({"reward": torch.ones(2, dtype=torch.int64)}, "reward must be floating"),
        ({"turn": torch.tensor([0])}, "turn must be int64 of shape"),
        ({"group": torch.tensor([0, -1])}, "group must not be negative"),
        ({"dialogue": torch.tensor([0, 0]), "turn": torch.tensor([1, 1])}, "stand once"),
        ({"dialogue": torch.tensor([0, 0]), "group": torch.tensor([0, 1])}, "two groups"),
        ({"mask": torch.ones(2)}, "mask must be bool"),
        ({"name": "ppo"}, "ppo needs value"),
        ({"no_such_option": 1}, "no_such_option"),
        ({"batch_scope": "world"}, "batch_scope"),
        ({"baseline": "median"}, "baseline"),
    ],
)
def test_bad_input_is_named(change, words):
    arguments = {
        "name": "mapo",
        "reward": torch.ones(2),
        "dialogue": torch.tensor([0, 1]),
        "turn": torch.tensor([0, 1]),
        "group": torch.tensor([0, 0]),
    }
    with pytest.raises(InputError, match=words):
        estimate(**{**arguments, **change})
