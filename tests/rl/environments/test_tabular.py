"""The tabular world: dynamic programming against enumeration of every dialogue, and its tables."""

from __future__ import annotations

import pytest
import torch

from normkit.errors import InputError
from normkit.rl.environments.tabular import PERSONAS, REPLIES, TabularWorld, points


@pytest.fixture(scope="module")
def world():
    return TabularWorld(3)


@pytest.fixture(scope="module")
def policy(world):
    generator = torch.Generator().manual_seed(5)
    logits = torch.randn(world.situations, world.replies, dtype=torch.float64, generator=generator)
    return logits.softmax(-1)


def dialogues(world, policy, state, turns, past=()):
    """Yield (probability, rewards, final state) of every dialogue from a state, by recursion."""
    if turns == 0 or world.met[state]:
        yield 1.0, past, state
        return
    for reply in range(world.replies):
        chosen = float(policy[world.situation[state], reply])
        lands = float(world.landing[state, reply])
        for after, chance in zip(
            world.next[state, reply].tolist(), (lands, 1 - lands), strict=True
        ):
            gain = float(world.distance[state] - world.distance[after])
            for p, rewards, last in dialogues(world, policy, after, turns - 1, (*past, gain)):
                yield chosen * chance * p, rewards, last


def best(world, state, turns):
    if turns == 0 or world.met[state]:
        return 0.0
    values = []
    for reply in range(world.replies):
        lands = float(world.landing[state, reply])
        values.append(0.0)
        for after, chance in zip(
            world.next[state, reply].tolist(), (lands, 1 - lands), strict=True
        ):
            gain = float(world.distance[state] - world.distance[after])
            values[-1] += chance * (gain + best(world, after, turns - 1))
    return max(values)


def starts(world):
    """Three likely starts of different users."""
    return [int((world.start * (world.persona == user)).argmax()) for user in range(len(PERSONAS))]


def only(world, state):
    """The same world, where every dialogue starts in one state."""
    alone = TabularWorld(world.horizon)
    alone.start = torch.zeros_like(world.start)
    alone.start[state] = 1
    return alone


def test_the_optimum_is_that_of_enumeration(world):
    planned = world.plan()
    for state in starts(world):
        assert float(planned[state]) == pytest.approx(best(world, state, 3), abs=1e-12)


def test_outcome_is_that_of_enumeration(world, policy):
    for state in starts(world):
        every = list(dialogues(world, policy, state, 3))
        assert sum(p for p, *_ in every) == pytest.approx(1, abs=1e-12)
        gain, success = only(world, state).outcome(policy[None])
        assert float(gain) == pytest.approx(sum(p * sum(r) for p, r, _ in every), abs=1e-12)
        met = sum(p for p, _, last in every if world.met[last])
        assert float(success) == pytest.approx(met, abs=1e-12)


@pytest.mark.parametrize(("gamma", "alpha"), [(1.0, 1.0), (0.85, 0.5), (0.85, 0.0)])
def test_quasi_hyperbolic_values_are_those_of_enumeration(world, policy, gamma, alpha):
    state = starts(world)[0]
    expected = 0.0
    for p, rewards, _ in dialogues(world, policy, state, 3):
        later = sum(gamma**s * r for s, r in enumerate(rewards[1:], 1))
        expected += p * (rewards[0] + alpha * later)
    found = only(world, state).exact(policy, gamma, alpha)
    assert found.value == pytest.approx(expected, abs=1e-12)


def test_advantages_average_to_nothing(world, policy):
    found = world.exact(policy)
    mean = (found.advantage * policy[world.situation]).sum(-1)
    assert float(mean.abs().max()) < 1e-12


def test_the_gradient_is_autograd_of_the_value():
    """Advantages found backwards in time against the derivative of a sum that runs forwards."""
    world = TabularWorld(5)
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(
        world.situations, world.replies, dtype=torch.float64, generator=generator
    ).requires_grad_()
    gain, _ = world.outcome(logits.softmax(-1)[None])
    (expected,) = torch.autograd.grad(gain.sum(), logits)
    found = world.exact(logits.detach().softmax(-1))
    assert found.value == pytest.approx(float(gain.detach()), abs=1e-10)
    torch.testing.assert_close(found.gradient, expected, atol=1e-12, rtol=0)


def test_occupancy_counts_the_dialogues_that_go_on(world, policy):
    found = world.exact(policy)
    alive = found.occupancy.sum(1)
    assert float(alive[0]) == pytest.approx(1)
    assert (alive.diff() < 0).all()
    shorter = TabularWorld(3)
    shorter.horizon = 2
    _, success = shorter.outcome(policy[None])
    assert float(alive[2]) == pytest.approx(1 - float(success), abs=1e-12)


@pytest.mark.parametrize("horizon", [2, 5, 10, 20])
def test_no_policy_beats_the_optimum(horizon):
    world = TabularWorld(horizon)
    uniform = torch.full((1, world.situations, world.replies), 1 / world.replies)
    optimum, myopic = (float(world.start @ world.plan(m)) for m in (False, True))
    assert float(world.outcome(uniform)[0]) < myopic < optimum < float(world.start @ world.distance)


def test_points_are_those_of_the_rubric():
    """Levels of progress 0, 1, 2 give 0, 1, 3; setbacks 0, -2, -4 (cognitive) or 0, -2, -5."""
    assert points((1, 2, 0)) == (1, 3, 0)
    assert points((-1, -1, -1)) == (-2, -2, -2)
    assert points((-2, -2, -2)) == (-4, -5, -5)


def test_a_reply_moves_the_needs_and_stops_at_the_walls():
    world = TabularWorld(20)

    def find(user, *needs):
        same = (world.deficits == torch.tensor(needs)).all(1) & (world.persona == user)
        return int(same.nonzero())

    deep = [r.name for r in REPLIES].index("names the feeling and its reason")
    state = find(1, 5, 8, 2)
    assert world.deficits[world.next[state, deep]].tolist() == [[5, 5, 2], [5, 10, 2]]
    near = find(1, 0, 2, world.top)
    assert world.deficits[world.next[near, deep]].tolist() == [[0, 0, 12], [0, 4, 12]]
    assert world.reward[near, deep] == pytest.approx(
        0.8 * (148**0.5 - 12) + 0.2 * (148**0.5 - 160**0.5)
    )
    done = find(2, 0, 0, 0)
    assert world.met[done]
    assert (world.next[done] == done).all()
    assert (world.reward[done] == 0).all()


def test_deep_replies_land_when_earlier_needs_are_small():
    world = TabularWorld(20)
    step = [r.name for r in REPLIES].index("finds a step of their own")
    first = world.persona == 0
    ready = (world.deficits[:, :2] <= 2).all(1)
    assert (world.landing[first & ready, step] == 0.8).all()
    assert (world.landing[first & ~ready, step] == 0.2).all()
    assert (world.landing[world.persona == 2, step] == 0.8).all()
    for user, persona in enumerate(PERSONAS):
        assert (world.landing[world.persona == user, persona.dislikes] == 0.2).all()


def test_starts_follow_the_published_statistics():
    """Means 17.17, 19.11, 19.02 at 50 turns, so two fifths of that at 20 (card of EMPA)."""
    world = TabularWorld(20)
    assert float(world.start.sum()) == pytest.approx(1)
    assert float(world.start[world.met].sum()) == 0
    mean = world.start @ world.deficits.double()
    assert mean.tolist() == pytest.approx([17.17 * 0.4, 19.11 * 0.4, 19.02 * 0.4], abs=0.25)
    users = torch.zeros(3, dtype=torch.float64).index_add(0, world.persona, world.start)
    assert users.tolist() == pytest.approx([1 / 3] * 3)


@pytest.mark.parametrize("horizon", [0, 51])
def test_a_horizon_out_of_range_is_named(horizon):
    with pytest.raises(InputError, match="horizon must be in"):
        TabularWorld(horizon)
