"""normkit in verl: the layout by property tests without verl, and a run against the real one."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from normkit.errors import InputError, MissingDependencyError
from normkit.integrations.verl import (
    REGISTERED,
    register,
    turn_gae_advantage,
    verl_advantage,
    verl_name,
)
from normkit.integrations.verl_loss import grid_loss
from normkit.rl.advantage import ESTIMATORS, estimate
from normkit.rl.loss import PolicyLossConfig, policy_loss
from normkit.rl.token_grid import turns_of_mask
from tests.rl.grids import grids, looped_rows

ROOT = Path(__file__).parents[2]
WITHOUT_CRITIC = [verl_name(name) for name, e in ESTIMATORS.items() if not e.needs]


def directly(name, reward, mask, turn, index, **options):
    """Advantage of every token from the rows of a loop, set token by token."""
    rows = looped_rows(reward, mask, turn)
    dialogue, number, value = (list(column) for column in zip(*rows, strict=True))
    names = sorted(set(index))
    group = [names.index(index[d]) for d in dialogue]
    advantage = estimate(
        name,
        torch.tensor(value, dtype=torch.float64),
        torch.tensor(dialogue),
        torch.tensor(number),
        torch.tensor(group),
        **options,
    )
    place = {(d, t): float(a) for d, t, a in zip(dialogue, number, advantage, strict=True)}
    out = torch.zeros(mask.shape)
    for b, k in torch.nonzero(mask).tolist():
        out[b, k] = place[b, int(turn[b, k])]
    return out


@given(grids(), st.booleans(), st.sampled_from(WITHOUT_CRITIC), st.data())
@settings(max_examples=150, deadline=None)
def test_tokens_get_what_the_rows_of_a_loop_get(grid, explicit, name, data):
    reward, mask, turn = grid
    numbers = turn if explicit else turns_of_mask(mask)
    index = data.draw(st.lists(st.sampled_from("xyz"), min_size=len(mask), max_size=len(mask)))
    advantage, returns = REGISTERED[name](
        token_level_rewards=reward,
        response_mask=mask.long(),
        index=np.array(index, dtype=object),
        turn_ids=turn if explicit else None,
        config=None,
        reward_baselines=None,
    )
    assert torch.equal(advantage, returns)
    assert advantage.dtype == reward.dtype
    if not bool(mask.any()):
        assert not bool(advantage.any())
        return
    (ours,) = [n for n in ESTIMATORS if verl_name(n) == name]
    torch.testing.assert_close(
        advantage, directly(ours, reward, mask, numbers, index), atol=1e-5, rtol=1e-5
    )


@given(grids(), st.sampled_from(["mars", "mapo", "grpo"]), st.data())
@settings(max_examples=50, deadline=None)
def test_agents_are_credited_apart(grid, name, data):
    """Whether they are named beside the groups or within them."""
    reward, mask, _ = grid

    def drawn(labels):
        given = data.draw(st.lists(st.sampled_from(labels), min_size=len(mask), max_size=len(mask)))
        return np.array(given, dtype=object)

    index, agent = drawn("xy"), drawn("ab")
    found, _ = verl_advantage(name, reward, mask, index, non_tensor_batch={"agent": agent})
    within, _ = verl_advantage(name, reward, mask, index + agent)
    torch.testing.assert_close(found, within, atol=1e-5, rtol=1e-5)


@given(grids(), st.integers(0, 6))
@settings(max_examples=50, deadline=None)
def test_padding_and_the_place_of_a_reward_in_its_turn_change_nothing(grid, padding):
    reward, mask, _ = grid
    index = np.arange(len(mask)) // 2
    before, _ = verl_advantage("mapo", reward, mask, index)
    turn = turns_of_mask(mask)
    moved = torch.zeros_like(reward)
    for b, t, value in looped_rows(reward, mask, turn):
        moved[b, int(torch.nonzero(turn[b] == t)[-1])] = value
    wide = [torch.nn.functional.pad(x, (0, padding)) for x in (moved, mask.long())]
    after, _ = verl_advantage("mapo", *wide, index)
    torch.testing.assert_close(after[:, : mask.shape[1]], before, atol=1e-5, rtol=0)
    assert not bool(after[:, mask.shape[1] :].any())


def test_a_group_of_one_gets_nothing():
    reward, mask = torch.tensor([[0.0, 2.0], [0.0, 5.0]]), torch.ones(2, 2)
    advantage, _ = verl_advantage("grpo", reward, mask, np.array(["a", "b"], dtype=object))
    assert not bool(advantage.any())
    together, _ = verl_advantage("grpo", reward, mask, np.array(["a", "a"], dtype=object))
    assert bool(together.all())


def test_options_come_from_the_configuration_of_verl():
    reward = torch.tensor([[1.0, 0.0, 2.0], [3.0, 0.0, 1.0], [0.0, 0.0, 1.0]])
    mask = torch.tensor([[1, 0, 1]] * 3)
    index = np.zeros(3, dtype=int)
    turn = turns_of_mask(mask)
    for config, options in (
        ({"gamma": 0.5}, {"gamma": 0.5}),
        ({"gamma": 0.5, "normkit": {"alpha": 0.9}}, {"gamma": 0.5, "alpha": 0.9}),
        ({"gamma": 0.5, "normkit": {"gamma": 0.7}}, {"gamma": 0.7}),
    ):
        found, _ = verl_advantage("mapo", reward, mask, index, config)
        torch.testing.assert_close(
            found, directly("mapo", reward, mask, turn, [0, 0, 0], **options), atol=1e-6, rtol=0
        )
    verl_advantage("grpo", reward, mask, index, {"gamma": 0.5})  # which has no discount
    with pytest.raises(InputError, match="no option 'alfa'"):
        verl_advantage("mapo", reward, mask, index, {"normkit": {"alfa": 1.0}})


def test_bad_input_is_refused():
    reward = torch.zeros(2, 3)
    with pytest.raises(InputError, match="uid"):
        verl_advantage("mapo", reward, torch.ones(2, 3))
    with pytest.raises(InputError, match="one element per dialogue"):
        verl_advantage("mapo", reward, torch.ones(2, 3), np.zeros(3))
    with pytest.raises(InputError, match="same shape"):
        verl_advantage("mapo", reward, torch.ones(2, 4), np.zeros(2))
    seats = {"agent": np.zeros(3)}
    with pytest.raises(InputError, match="agent must have one element per dialogue"):
        verl_advantage("mars", reward, torch.ones(2, 3), np.zeros(2), non_tensor_batch=seats)
    values = torch.zeros(2, 4)
    with pytest.raises(InputError, match="values must have the shape of the mask"):
        verl_advantage("ppo", reward, torch.ones(2, 3), np.zeros(2), values=values)


def test_without_values_ppo_says_how_to_get_them():
    with pytest.raises(InputError, match=r"adv_estimator=gae and .*verl_turn_gae"):
        REGISTERED["normkit_ppo"](
            token_level_rewards=torch.zeros(2, 3),
            response_mask=torch.ones(2, 3),
            index=np.zeros(2),
            config={"gamma": 1.0},
        )


def looped_gae(rows, values, mask, turn, gamma, lam):
    """Raw advantage and value before each turn, turn by turn from the last."""
    first = {}
    for b, k in torch.nonzero(mask).tolist():
        first.setdefault((b, int(turn[b, k])), float(values[b, k]))
    place = {(b, t): i for i, (b, t, _) in enumerate(rows)}
    found = {}
    for b, t, reward in reversed(rows):
        value, ahead = first[b, t], first.get((b, t + 1), 0.0)
        delta = reward + gamma * ahead - value
        found[b, t] = (delta + gamma * lam * found.get((b, t + 1), (0.0,))[0], value)
    return place, found


@given(grids(), st.floats(0.5, 1), st.floats(0, 1))
@settings(max_examples=100, deadline=None)
def test_gae_by_turns_is_that_of_a_loop(grid, gamma, lam):
    reward, mask, _ = grid
    turn = turns_of_mask(mask)
    values = torch.randn(mask.shape, generator=torch.Generator().manual_seed(0))
    advantage, returns = turn_gae_advantage(reward, values, mask.long(), gamma, lam)
    assert not bool(advantage[~mask].any())
    if not bool(mask.any()):
        return
    rows = looped_rows(reward, mask, turn)
    place, found = looped_gae(rows, values, mask, turn, gamma, lam)
    raw = np.array([found[key][0] for key in place])
    spread = raw.std() if len(raw) > 1 else 1.0
    for b, k in torch.nonzero(mask).tolist():
        key = b, int(turn[b, k])
        assert float(returns[b, k]) == pytest.approx(sum(found[key]), abs=1e-4)
        if spread > 1e-3:
            expected = (raw[place[key]] - raw.mean()) / spread
            assert float(advantage[b, k]) == pytest.approx(expected, abs=1e-3)


def test_without_a_verdict_values_are_left_alone():
    mask = torch.tensor([[1, 1, 0, 1, 1], [1, 0, 1, 1, 0]])
    reward = torch.tensor([[0, 2, 0, 0, torch.nan], [1.0, 0, 0, 3, 0]])
    values = torch.arange(10.0).reshape(2, 5)
    advantage, returns = turn_gae_advantage(reward, values, mask, 1.0, 1.0)
    assert not bool(advantage[0, 3:].any())
    assert returns[0, 3:].tolist() == values[0, 3:].tolist()
    assert bool(torch.isfinite(advantage).all())
    # The turn without a verdict counts as the mean of its dialogue's: 2 + 2, and 1 + 3.
    assert returns[:, 0].tolist() == pytest.approx([4, 4])
    assert returns[1, 2:].tolist() == pytest.approx([3, 3, 0])


def test_every_estimator_has_a_plain_name():
    assert len(REGISTERED) == len(ESTIMATORS)
    assert "normkit_reinforce_plus_plus" in REGISTERED
    assert all(name.replace("_", "").isalnum() for name in REGISTERED)


@given(grids(), st.booleans(), st.integers(0, 4))
@settings(max_examples=100, deadline=None)
def test_the_loss_of_a_grid_is_that_of_its_turns_whatever_the_padding(grid, per_row, padding):
    old, mask, _ = grid
    draw = torch.Generator().manual_seed(0)
    new = old + 0.5 * torch.randn(old.shape, generator=draw)
    advantage = torch.randn(old.shape, generator=draw)
    wide = [torch.nn.functional.pad(x, (0, padding)) for x in (new, old, advantage, mask.long())]
    kept = wide[3].bool()
    share = kept / kept.sum(1, keepdim=True).clamp_min(1) if per_row else kept / 7
    options = PolicyLossConfig(ratio="turn", clip_high=0.2, dual_clip=3)
    loss, numbers = grid_loss(*wide, lambda losses: (losses * share).sum(), options)
    rows = torch.nonzero(mask)
    turn = turns_of_mask(mask)[mask] + 1000 * rows[:, 0]
    flat = (new[mask], old[mask], advantage[mask], turn, rows[:, 0], share[kept])
    expected, metrics = policy_loss(*flat, options)
    torch.testing.assert_close(loss, expected)
    assert numbers["actor/pg_clipfrac"] <= 1 + 1e-6
    total = float(share[kept].sum())
    clipped = numbers["actor/pg_clipfrac"] * total
    assert clipped == pytest.approx(float(metrics["clip_fraction"]), abs=1e-6)


@pytest.mark.skipif(
    importlib.util.find_spec("verl") is not None, reason="verl is installed beside the tests"
)
def test_without_verl_registering_says_what_to_install():
    with pytest.raises(MissingDependencyError, match=r"normkit\[verl\]"):
        register()


def test_importing_the_adapter_does_not_import_verl():
    script = "import sys, normkit.integrations.verl; print([m for m in sys.modules if m == 'verl'])"
    found = subprocess.run(
        [sys.executable, "-c", script], check=False, capture_output=True, text=True
    )
    assert found.stdout.strip() == "[]", found.stderr


@pytest.mark.slow
@pytest.mark.skipif(
    "NORMKIT_VERL_PYTHON" not in os.environ,
    reason="verl pins an older transformers: NORMKIT_VERL_PYTHON must name a Python that has it",
)
def test_against_verl_itself():
    environment = {
        **os.environ,
        "PYTHONPATH": f"{ROOT / 'src'}{os.pathsep}{ROOT}",
        "VERL_USE_EXTERNAL_MODULES": "normkit.integrations.verl_plugin",
        "OMP_NUM_THREADS": "1",
    }
    run = [os.environ["NORMKIT_VERL_PYTHON"], str(Path(__file__).with_name("verl_check.py"))]
    found = subprocess.run(
        run, check=False, env=environment, capture_output=True, text=True, timeout=280
    )
    assert found.returncode == 0, found.stderr[-3000:]
    assert f"{len(REGISTERED)} estimators" in found.stdout
