"""Training in the tabular world: rows, gradients and critics against slower ways to the same."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from normkit.errors import InputError
from normkit.rl.advantage import ESTIMATORS, estimate
from normkit.rl.environments.tabular import TabularWorld
from normkit.rl.tabular import Critic, ascend, credit, policy_gradient, probe, roll_out, train


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def world():
    return TabularWorld(5)


def policies(world, runs, seed=3):
    shape = (runs, world.situations, world.replies)
    return torch.randn(shape, dtype=torch.float64, generator=generator(seed)).softmax(-1)


def test_rows_are_dialogues_of_the_world(world):
    rows = roll_out(world, policies(world, 3), 4, 8, generator())
    first = rows.turn == 0
    assert first.sum() == 3 * 4 * 8
    starts = rows.state[first].view(12, 8)
    assert (starts == starts[:, :1]).all()
    assert (rows.group[first] == torch.arange(12).repeat_interleave(8)).all()
    assert (rows.run == rows.group // 4).all()
    assert not world.met[rows.state].any()
    again = rows.dialogue[1:] == rows.dialogue[:-1]
    assert (rows.turn[1:][again] == rows.turn[:-1][again] + 1).all()
    reached = world.next[rows.state, rows.reply][:-1][again]
    assert (reached == rows.state[1:, None][again]).any(1).all()
    gain = torch.zeros(3).index_add(0, rows.run, rows.reward) / 32
    torch.testing.assert_close(gain, rows.gain)
    # Whoever stopped before the horizon had all needs met.
    last = torch.zeros(96).scatter_reduce(0, rows.dialogue, rows.turn.float(), "amax")
    assert ((last < 4).view(3, 32).float().mean(1) <= rows.success).all()


def test_rolled_out_means_are_the_exact_ones(world):
    policy = policies(world, 2)
    rows = roll_out(world, policy, 20_000, 1, generator())
    gain, success = world.outcome(policy)
    torch.testing.assert_close(rows.gain.double(), gain, atol=0.05, rtol=0)
    torch.testing.assert_close(rows.success.double(), success, atol=0.01, rtol=0)


def test_every_policy_meets_the_same_starts(world):
    one, other = (roll_out(world, policies(world, 2, s), 4, 4, generator(7)) for s in (0, 1))
    assert torch.equal(one.state[one.turn == 0], other.state[other.turn == 0])


@pytest.mark.parametrize("name", ESTIMATORS)
def test_stacked_runs_are_credited_as_if_alone(world, name):
    rows = roll_out(world, policies(world, 3), 4, 4, generator())
    critic = Critic(world, 3)
    critic.fit(rows)
    together = credit(name, rows, critic)
    for run in range(3):
        own = rows.run == run
        options = {}
        if name == "gigpo":
            options["anchor"] = rows.state[own]
        if name == "ppo":
            options["value"] = critic.value(rows)[own]
        index = (x[own] for x in (rows.reward, rows.dialogue, rows.turn, rows.group))
        torch.testing.assert_close(together[own], estimate(name, *index, **options))


def test_a_critic_must_be_there():
    world = TabularWorld(2)
    rows = roll_out(world, policies(world, 1), 1, 4, generator())
    with pytest.raises(InputError, match="critic: ppo needs one"):
        credit("ppo", rows)


def test_the_gradient_is_autograd_of_the_mean(world):
    runs = 2
    logits = policies(world, runs).log().requires_grad_()
    rows = roll_out(world, logits.detach().softmax(-1), 4, 4, generator())
    advantage = torch.randn(len(rows.run), dtype=torch.float64, generator=generator(1))
    chosen = logits.log_softmax(-1)[rows.run, world.situation[rows.state], rows.reply]
    losses = [(advantage * chosen)[rows.run == r].mean() for r in range(runs)]
    (expected,) = torch.autograd.grad(sum(losses), logits)
    got = policy_gradient(world, rows, advantage, logits.detach().softmax(-1))
    torch.testing.assert_close(got, expected)


def summed_gradient(world, rows, advantage, policy, dialogues):
    """Per dialogue in place of per turn, which leaves no random divisor."""
    turns = torch.bincount(rows.run)[:, None, None]
    return policy_gradient(world, rows, advantage, policy) * turns / dialogues


@pytest.mark.parametrize("name", ["rloo", "reinforce"])
def test_unbiased_estimators_average_to_the_exact_gradient(world, name):
    """Squared distance to the truth against what the batches' scatter alone would give."""
    runs, dialogues = 64, 1024
    policy = policies(world, 1).expand(runs, -1, -1)
    rows = roll_out(world, policy, dialogues // 4, 4, generator())
    got = summed_gradient(world, rows, credit(name, rows).double(), policy, dialogues)
    exact = world.exact(policy[0]).gradient
    error = (got.mean(0) - exact).square().sum()
    assert error / (got.var(0).sum() / runs) < 1.5
    assert torch.cosine_similarity(got.mean(0).flatten(), exact.flatten(), dim=0) > 0.98


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
def test_unscaled_mapo_estimates_the_quasi_hyperbolic_gradient(world, alpha):
    runs, dialogues = 32, 2048
    policy = policies(world, 1).expand(runs, -1, -1)
    rows = roll_out(world, policy, dialogues // 128, 128, generator(2))
    advantage = credit("mapo", rows, alpha=alpha, baseline="loo", scale=False).double()
    got = summed_gradient(world, rows, advantage, policy, dialogues)
    predicted = world.exact(policy[0], 0.85, alpha).gradient
    truth = world.exact(policy[0]).gradient
    noise = got.var(0).sum() / runs
    assert (got.mean(0) - predicted).square().sum() / noise < 1.5
    assert (got.mean(0) - truth).square().sum() / noise > 2


def test_the_critic_is_ridge_regression(world):
    rows = roll_out(world, policies(world, 2), 16, 4, generator())
    critic = Critic(world, 2, memory=0.5)
    critic.fit(rows)
    critic.fit(rows)
    widths = [5, 3, *[world.top + 1] * 3]
    columns = [rows.turn, world.persona[rows.state], *world.deficits[rows.state].unbind(1)]
    design = np.concatenate(
        [np.eye(w)[c.numpy()] for w, c in zip(widths, columns, strict=True)], axis=1
    )
    returns = np.zeros(len(rows.run))
    running = 0.0
    for i in reversed(range(len(returns))):
        ends = i + 1 == len(returns) or rows.dialogue[i + 1] != rows.dialogue[i]
        running = float(rows.reward[i]) + (0.0 if ends else 0.99 * running)
        returns[i] = running
    got = critic.value(rows).numpy()
    for run in range(2):
        own = (rows.run == run).numpy()
        x, y = design[own], returns[own]
        weight = np.linalg.solve(1.5 * x.T @ x + np.eye(x.shape[1]), 1.5 * x.T @ y)
        np.testing.assert_allclose(got[own], x @ weight, atol=1e-9)


def test_exact_ascent_stops_on_its_way(world):
    best = float(world.start @ world.plan())
    uniform = torch.full((world.situations, world.replies), 0.1, dtype=torch.float64)
    begin = world.exact(uniform).value
    reached = world.exact(ascend(world, 0.5)).value
    assert 0.5 <= (reached - begin) / (best - begin) < 0.6


@pytest.mark.parametrize("name", ["mapo", "grpo", "ppo"])
def test_training_improves_and_repeats_bit_for_bit(world, name):
    rates = torch.tensor([0.2, 0.4])
    one, again = (train(world, name, rates, 10, 4, seed=1) for _ in range(2))
    for a, b in zip(vars(one).values(), vars(again).values(), strict=True):
        assert torch.equal(a, b)
    assert one.gain.shape == one.success.shape == one.grad_norm.shape == (10, 2)
    uniform = torch.full_like(one.policy, 1 / world.replies)
    assert (world.outcome(one.policy)[0] > world.outcome(uniform)[0] + 0.5).all()


def test_a_rate_of_zero_changes_nothing(world):
    found = train(world, "mapo", torch.tensor([0.0, 0.4]), 2, 4, seed=1)
    assert (found.policy[0] == 1 / world.replies).all()
    assert not (found.policy[1] == 1 / world.replies).all()


def test_groups_must_divide_the_episodes(world):
    with pytest.raises(InputError, match="group_size must divide 64 episodes, got 5"):
        train(world, "mapo", torch.tensor([0.1]), 1, 5, seed=0)


def test_the_probe_sees_that_dense_rewards_tell_more(world):
    policy = policies(world, 1)[0]
    found = probe(world, policy, ("mapo", "grpo"), runs=4, group_size=4, seed=0)
    for one in found.values():
        assert one.correlation.shape == one.cosine.shape == (4,)
        assert one.correlation.abs().max() <= 1
        assert one.survivors[0] == 4
        assert (one.survivors.diff() <= 0).all()
    assert found["mapo"].correlation.mean() > found["grpo"].correlation.mean()
