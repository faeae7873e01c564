"""The value head, its loss, and how good it says it is."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from normkit.errors import InputError
from normkit.rl.critic import (
    CriticConfig,
    ValueHead,
    explained_variance,
    value_loss,
    variance_sums,
)
from tests.reference import st_ppo


def head(detach=False):
    torch.manual_seed(0)
    critic = ValueHead(4, detach)
    torch.nn.init.normal_(critic.linear.weight)
    torch.nn.init.constant_(critic.linear.bias, 0.5)
    return critic


def test_a_new_head_knows_nothing():
    assert not ValueHead(4)(torch.randn(3, 4)).any()


def test_values_depend_on_the_direction_of_states_alone():
    critic, states = head(), torch.randn(5, 4)
    expected = states / states.norm(dim=1, keepdim=True) @ critic.linear.weight[0] + 0.5
    torch.testing.assert_close(critic(states), expected)
    torch.testing.assert_close(critic(70 * states), expected)
    assert critic(states.bfloat16()).dtype == torch.float32
    assert critic(torch.zeros(1, 4)).tolist() == [0.5]


@pytest.mark.parametrize("detach", [False, True])
def test_a_detached_head_passes_no_gradient_on(detach):
    states = torch.randn(5, 4, requires_grad=True)
    critic = head(detach)
    critic(states).square().sum().backward()
    assert critic.linear.weight.grad.any()
    assert (states.grad is None) == detach


@pytest.mark.parametrize("clip", [0.0, 0.2])
def test_the_loss_is_its_reference(clip):
    draw = np.random.default_rng(0)
    value, old, target, weight = draw.normal(size=(4, 50)) * [[1], [1], [1], [0.1]]
    found = value_loss(*map(torch.tensor, (value, old, target, weight)), clip)
    expected = st_ppo.value_loss(value, old, target, weight, clip)
    assert found.item() == pytest.approx(expected, rel=1e-12)


def test_a_value_that_moved_far_enough_towards_its_return_stays():
    # Old value 0, clip 0.2: by hand, 1/2 max(error^2, clipped error^2).
    value = torch.tensor([0.1, 0.5, 0.5, -0.5], requires_grad=True)
    target = torch.tensor([1.0, 1.0, -1.0, 1.0])
    loss = value_loss(value, torch.zeros(4), target, torch.ones(4), 0.2)
    assert loss.item() == pytest.approx((0.9**2 + 0.8**2 + 1.5**2 + 1.5**2) / 2)
    loss.backward()
    assert value.grad.tolist() == pytest.approx([-0.9, 0, 1.5, -1.5])


def test_explained_variance_of_parts_is_that_of_the_whole():
    draw = torch.Generator().manual_seed(0)
    target, noise = torch.randn(2, 40, generator=draw, dtype=torch.float64)
    value = target + 0.3 * noise + 2  # a constant offset is not held against it
    sums = variance_sums(target[:7], value[:7]) + variance_sums(target[7:], value[7:])
    expected = 1 - float((target - value).var() / target.var())
    assert explained_variance(sums) == pytest.approx(expected)
    assert explained_variance(variance_sums(target, target)) == 1
    assert explained_variance(variance_sums(target, torch.zeros_like(target))) == 0


@pytest.mark.parametrize("size", [0, 1, 5])
def test_where_all_returns_are_equal_nothing_is_explained(size):
    same = torch.full((size,), 0.7)
    assert explained_variance(variance_sums(same, same)) == 0


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"level": "word"}, "level must be turn or token"),
        ({"weight": -1.0}, "weight must be at least 0"),
        ({"clip": -1.0}, "clip must be at least 0"),
        ({"learning_rate": -1.0}, "learning_rate must be at least 0"),
        ({"learning_rate": float("nan")}, "learning_rate must be at least 0"),
    ],
)
def test_bad_options_are_named(options, words):
    with pytest.raises(InputError, match=words):
        CriticConfig(**options)
