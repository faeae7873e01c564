"""Policy losses: gradients on-policy, clipping, units that sum exactly, KL estimators."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from normkit.errors import InputError
from normkit.rl.loss import PolicyLossConfig, aggregation_weights, kl_estimate, policy_loss
from tests.reference import mapo as oracle

TURN = torch.tensor([0, 0, 0, 1, 1])
DIALOGUE = torch.tensor([0, 0, 0, 0, 0])
LOG_RATIO = torch.tensor([0.1, -0.2, 0.3, 0.05, 0.0], dtype=torch.float64)
ADVANTAGE = torch.ones(5, dtype=torch.float64)
WEIGHT = torch.full((5,), 0.2, dtype=torch.float64)


def loss_of(log_ratio, advantage=ADVANTAGE, **options):
    old = torch.full_like(log_ratio, -2.0)
    config = PolicyLossConfig(**options)
    return policy_loss(old + log_ratio, old, advantage, TURN, DIALOGUE, WEIGHT, config)


def test_the_worked_ratios_of_the_st_ppo_card():
    token, metrics = loss_of(LOG_RATIO, clip_high=0.2)
    ratios = [1.105171, 0.818731, 1.2, 1.051271, 1]  # the third is clipped
    assert token.item() == pytest.approx(-sum(ratios) / 5, abs=1e-6)
    assert metrics["clip_fraction"].item() == pytest.approx(0.2)
    turn, metrics = loss_of(LOG_RATIO, clip_high=0.2, ratio="turn")
    assert turn.item() == pytest.approx(-(3 * 1.068939 + 2 * 1.025315) / 5, abs=1e-6)
    assert metrics["clip_fraction"] == 0


@settings(deadline=None)
@given(
    st.lists(
        st.tuples(
            st.floats(-4, 4),
            st.floats(-3, 3),
            st.floats(0, 1),
            st.integers(0, 3),
            st.integers(0, 1),
        ),
        max_size=12,
    ),
    st.sampled_from(["token", "turn", "sequence"]),
    st.sampled_from([0, 3, 10]),
)
def test_the_loss_is_its_reference(tokens, level, dual):
    columns = list(zip(*tokens, strict=True)) or [()] * 5
    log_ratio, advantage, weight = (torch.tensor(c, dtype=torch.float64) for c in columns[:3])
    turn, dialogue = (torch.tensor(c, dtype=torch.int64) for c in columns[3:])
    turn = turn + 4 * dialogue
    config = PolicyLossConfig(ratio=level, dual_clip=dual)
    loss, metrics = policy_loss(
        log_ratio, torch.zeros_like(log_ratio), advantage, turn, dialogue, weight, config
    )
    unit = {"token": range(len(tokens)), "turn": turn.tolist(), "sequence": columns[4]}[level]
    expected, clipped = oracle.policy_loss(*columns[:2], list(unit), columns[2], 0.2, 0.28, dual)
    np.testing.assert_allclose(loss.item(), expected, atol=1e-9)
    np.testing.assert_allclose(metrics["clip_fraction"].item(), clipped, atol=1e-9)


@pytest.mark.parametrize("level", ["token", "turn", "sequence"])
def test_a_policy_that_moved_too_far_has_a_finite_loss(level):
    log_ratio = torch.tensor([900.0, -900, 900, 900, 5], requires_grad=True)
    advantage = torch.tensor([0.0, 1, -1, 0, 1])
    loss, metrics = loss_of(log_ratio, advantage, ratio=level)
    loss.backward()
    assert loss.isfinite()
    assert log_ratio.grad.isfinite().all()
    assert metrics["ratio"].isfinite()


@pytest.mark.parametrize("level", ["token", "turn", "sequence"])
def test_parts_of_a_batch_add_up_to_the_batch(level):
    """What gradient accumulation and data parallelism rest on."""
    generator = torch.Generator().manual_seed(0)
    dialogue = torch.tensor([0, 0, 0, 0, 1, 1, 2])
    turn = torch.tensor([0, 0, 1, 1, 2, 2, 3])
    new, old, reference, entropy, advantage = torch.randn(5, 7, generator=generator).double()
    weight = aggregation_weights(turn, dialogue, level)
    assert weight.sum().item() == pytest.approx({"token": 7, "turn": 4, "sequence": 3}[level])
    config = PolicyLossConfig(ratio=level, aggregate=level, kl_weight=0.1, entropy_weight=0.01)

    def loss(chosen):
        rows = (new, old, advantage, turn, dialogue, weight / weight.sum())
        return policy_loss(*(x[chosen] for x in rows), config, reference[chosen], entropy[chosen])[
            0
        ]

    whole = loss(torch.ones(7, dtype=torch.bool))
    torch.testing.assert_close(loss(dialogue == 0) + loss(dialogue > 0), whole)


def test_divergence_and_entropy_enter_with_their_weights():
    old = torch.full((5,), -2.0, dtype=torch.float64)
    rows = (old, old, ADVANTAGE, TURN, DIALOGUE, WEIGHT)
    plain, _ = policy_loss(*rows, PolicyLossConfig())
    config = PolicyLossConfig(kl="k2", kl_weight=0.5, entropy_weight=0.25)
    loss, metrics = policy_loss(*rows, config, old + 2, torch.full_like(old, 3))
    assert (metrics["kl"].item(), metrics["entropy"].item()) == pytest.approx((2, 3))
    assert (loss - plain).item() == pytest.approx(0.5 * 2 - 0.25 * 3)


@pytest.mark.parametrize("level", ["token", "turn", "sequence"])
def test_on_policy_the_gradient_is_the_policy_gradient_of_the_unit(level):
    log_ratio = torch.zeros(5, dtype=torch.float64, requires_grad=True)
    advantage = torch.tensor([1.0, -2, 3, 0.5, 4], dtype=torch.float64)
    loss, _ = loss_of(log_ratio, advantage, ratio=level)
    (grad,) = torch.autograd.grad(loss, log_ratio)
    expected = advantage.clone()
    if level == "turn":
        expected[:3], expected[3:] = advantage[:3].mean(), advantage[3:].mean()
    elif level == "sequence":
        expected[:] = advantage.mean()
    torch.testing.assert_close(grad, -expected / 5)


def test_dual_clip_bounds_bad_moves():
    log_ratio = torch.full((5,), 4.0, dtype=torch.float64)
    loss, _ = loss_of(log_ratio, -ADVANTAGE)
    assert loss.item() == pytest.approx(10)
    loss, _ = loss_of(log_ratio, -ADVANTAGE, dual_clip=0)
    assert loss.item() == pytest.approx(float(torch.tensor(4.0).exp()), rel=1e-5)


def test_weights_count_units():
    dialogue = torch.tensor([0, 0, 0, 1, 1])
    assert aggregation_weights(TURN, dialogue, "token").sum() == 5
    assert aggregation_weights(TURN, dialogue, "turn").tolist() == pytest.approx(
        [1 / 3] * 3 + [0.5] * 2
    )
    assert aggregation_weights(TURN, DIALOGUE, "sequence").sum().item() == pytest.approx(1)


def test_kl_estimators_agree_with_the_divergence():
    generator = torch.Generator().manual_seed(0)
    p = torch.log_softmax(torch.randn(6, generator=generator, dtype=torch.float64), 0)
    q = torch.log_softmax(torch.randn(6, generator=generator, dtype=torch.float64), 0)
    exact = (p.exp() * (p - q)).sum()
    for kind in ("k1", "k3"):
        torch.testing.assert_close((p.exp() * kl_estimate(p, q, kind)).sum(), exact)
    assert (kl_estimate(p, q, "k3") >= 0).all()
    torch.testing.assert_close(kl_estimate(p, q, "k2"), (p - q) ** 2 / 2)
    with pytest.raises(InputError, match="k1, k2 or k3"):
        kl_estimate(p, q, "k4")


def test_the_gradient_of_k2_is_that_of_the_divergence():
    logits = torch.randn(6, dtype=torch.float64, requires_grad=True)
    q = torch.log_softmax(torch.randn(6, dtype=torch.float64), 0)
    p = torch.log_softmax(logits, 0)
    (exact,) = torch.autograd.grad((p.exp() * (p - q)).sum(), logits, retain_graph=True)
    (sampled,) = torch.autograd.grad((p.exp().detach() * kl_estimate(p, q, "k2")).sum(), logits)
    torch.testing.assert_close(sampled, exact)


@pytest.mark.parametrize(
    "options",
    [
        {"ratio": "word"},
        {"aggregate": "word"},
        {"clip_low": 1.0},
        {"dual_clip": 0.5},
        {"kl": "k4"},
    ],
)
def test_bad_options_are_named(options):
    with pytest.raises(InputError, match=next(iter(options))):
        PolicyLossConfig(**options)


def test_an_unknown_level_is_named():
    with pytest.raises(InputError, match="level must be token, turn or sequence"):
        aggregation_weights(TURN, DIALOGUE, "word")
