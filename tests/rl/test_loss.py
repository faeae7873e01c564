"""Policy losses: gradients, clipping and what it removes, units that sum exactly, KL estimators."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from normkit.errors import InputError
from normkit.rl.loss import (
    PolicyLossConfig,
    aggregation_weights,
    complementary_loss,
    kl_estimate,
    policy_loss,
    sampling_weight,
)
from tests.reference import mapo as oracle
from tests.reference import st_ppo

TURN = torch.tensor([0, 0, 0, 1, 1])
DIALOGUE = torch.tensor([0, 0, 0, 0, 0])
LOG_RATIO = torch.tensor([0.1, -0.2, 0.3, 0.05, 0.0], dtype=torch.float64)
ADVANTAGE = torch.ones(5, dtype=torch.float64)
NAN = float("nan")
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


TOKENS = st.lists(
    st.tuples(
        st.floats(-4, 4), st.floats(-3, 3), st.floats(0, 1), st.integers(0, 3), st.integers(0, 1)
    ),
    max_size=12,
)
LEVELS = st.sampled_from(["token", "turn", "sequence"])


def tensors_of(tokens):
    """Log-ratio, advantage, weight, turn and dialogue of each token."""
    columns = list(zip(*tokens, strict=True)) or [()] * 5
    log_ratio, advantage, weight = (torch.tensor(c, dtype=torch.float64) for c in columns[:3])
    turn, dialogue = (torch.tensor(c, dtype=torch.int64) for c in columns[3:])
    return log_ratio, advantage, weight, turn + 4 * dialogue, dialogue


def units_of(level, turn, dialogue):
    return {"token": range(len(turn)), "turn": turn.tolist(), "sequence": dialogue.tolist()}[level]


@settings(deadline=None)
@given(TOKENS, LEVELS, st.sampled_from([0, 3, 10]))
def test_the_loss_is_its_reference(tokens, level, dual):
    log_ratio, advantage, weight, turn, dialogue = tensors_of(tokens)
    config = PolicyLossConfig(ratio=level, dual_clip=dual)
    loss, metrics = policy_loss(
        log_ratio, torch.zeros_like(log_ratio), advantage, turn, dialogue, weight, config
    )
    unit = list(units_of(level, turn, dialogue))
    lists = [x.tolist() for x in (log_ratio, advantage, weight)]
    expected, clipped = oracle.policy_loss(*lists[:2], unit, lists[2], 0.2, 0.28, dual)
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


@settings(deadline=None)
@given(TOKENS, LEVELS, st.sampled_from([0, 3, 10]))
def test_clipping_removes_exactly_the_bias(tokens, level, dual):
    """Lemma 4.2's last term: grad J_clipped = grad J_unclipped - C; Lemma 4.1 is grad J_unclipped.

    Tokens are clipped as ``min`` says, by the sign of each one's advantage.
    """
    log_ratio, advantage, weight, turn, dialogue = tensors_of(tokens)
    log_ratio.requires_grad_()
    old = torch.zeros_like(log_ratio)
    rows = (log_ratio, old, advantage, turn, dialogue, weight)
    config = PolicyLossConfig(ratio=level, clip_high=0.2, dual_clip=dual)
    unit = list(units_of(level, turn, dialogue))
    lists = [log_ratio.tolist(), advantage.tolist(), unit, weight.tolist()]
    lost = st_ppo.clipping_bias(*lists, 0.2, 0.2, dual)
    whole = st_ppo.gradient(*lists, np.ones(len(unit)))
    kept = torch.autograd.grad(policy_loss(*rows, config)[0], log_ratio)[0]
    complementary = complementary_loss(*rows, config)
    if complementary is None:
        np.testing.assert_array_equal(lost, 0)
        found = torch.zeros_like(kept)
    else:
        (found,) = torch.autograd.grad(complementary, log_ratio)
    np.testing.assert_allclose(-found.numpy(), lost, atol=1e-12)
    np.testing.assert_allclose(-(kept + found).numpy(), whole, atol=1e-12)


def softmax_policy(seed=0):
    """Log-probabilities of ten tokens of two dialogues, three turns each, by one weight matrix."""
    generator = torch.Generator().manual_seed(seed)
    weights = torch.randn(6, 8, generator=generator, dtype=torch.float64, requires_grad=True)
    states = torch.randn(10, 8, generator=generator, dtype=torch.float64)
    token = torch.randint(6, (10,), generator=generator)
    logprob = torch.log_softmax(states @ weights.T, -1).gather(1, token[:, None])[:, 0]
    advantage = torch.randn(10, generator=generator, dtype=torch.float64)
    turn = torch.tensor([0, 0, 0, 1, 2, 2, 3, 3, 4, 4])
    dialogue = torch.tensor([0, 0, 0, 0, 0, 0, 1, 1, 1, 1])
    return weights, logprob, advantage, turn, dialogue


def test_turn_ratios_credit_the_mean_advantage_of_the_turn():
    """Lemma 4.1: ``1/|y| sum_k w^k mean(A) grad log pi(y^k)`` while nothing clips."""
    weights, logprob, advantage, turn, dialogue = softmax_policy()
    old = logprob.detach() + 0.05 * torch.randn_like(advantage)
    per_response = aggregation_weights(turn, dialogue, "sequence").double()
    config = PolicyLossConfig(ratio="turn")
    loss, metrics = policy_loss(logprob, old, advantage, turn, dialogue, per_response, config)
    assert metrics["clip_fraction"] == 0
    found = torch.autograd.grad(-loss, weights, retain_graph=True)[0]
    expected = torch.zeros_like(found)
    for k in range(5):
        own = turn == k
        factor = (logprob - old)[own].mean().exp() * advantage[own].mean() * per_response[own][0]
        step = torch.autograd.grad(logprob[own].sum(), weights, retain_graph=True)[0]
        expected += factor.detach() * step
    torch.testing.assert_close(found, expected, atol=1e-14, rtol=1e-12)


@pytest.mark.parametrize("level", ["token", "turn", "sequence"])
def test_the_bias_of_parameters_is_what_clipping_takes_from_their_gradient(level):
    weights, logprob, advantage, turn, dialogue = softmax_policy()
    old = logprob.detach() + torch.randn(10, generator=torch.Generator().manual_seed(1))
    weight = aggregation_weights(turn, dialogue, "sequence").double()
    rows = (logprob, old, advantage, turn, dialogue, weight)

    def gradient(loss):
        return torch.autograd.grad(loss, weights, retain_graph=True)[0]

    clipping = PolicyLossConfig(ratio=level)
    without = PolicyLossConfig(ratio=level, clip_high=1e9, clip_low=1 - 1e-15, dual_clip=0)
    kept, lost = (
        gradient(f) for f in (policy_loss(*rows, clipping)[0], complementary_loss(*rows, clipping))
    )
    assert lost.norm() > 0.01
    whole = gradient(policy_loss(*rows, without)[0])
    torch.testing.assert_close(kept + lost, whole, atol=1e-15, rtol=1e-13)
    scaled = complementary_loss(logprob, old, 3 * advantage, *rows[3:], clipping)
    torch.testing.assert_close(gradient(scaled), 3 * lost)


def test_where_sampling_policy_and_policy_agree_all_ratios_do_and_nothing_is_removed():
    losses = {}
    for level in ("token", "turn", "sequence"):
        losses[level] = loss_of(torch.zeros(5, dtype=torch.float64), LOG_RATIO, ratio=level)[0]
        config = PolicyLossConfig(ratio=level)
        old = torch.full_like(LOG_RATIO, -2.0)
        assert complementary_loss(old, old, LOG_RATIO, TURN, DIALOGUE, WEIGHT, config) is None
    assert losses["token"] == losses["turn"] == losses["sequence"]


@settings(deadline=None)
@given(TOKENS)
def test_units_of_one_token_and_of_the_whole_reply(tokens):
    """One token per turn: Turn-PPO is PPO. One turn per reply: it is GSPO's ratio."""
    log_ratio, advantage, weight, _, dialogue = tensors_of(tokens)
    old = torch.zeros_like(log_ratio)
    for turn, level in ((torch.arange(len(old)), "token"), (dialogue, "sequence")):
        rows = (log_ratio, old, advantage, turn, dialogue, weight)
        for function in (lambda *a: policy_loss(*a)[0], complementary_loss):
            by_turn = function(*rows, PolicyLossConfig(ratio="turn"))
            other = function(*rows, PolicyLossConfig(ratio=level))
            assert (by_turn is None) == (other is None)
            if by_turn is not None:
                torch.testing.assert_close(by_turn, other)


def test_the_order_of_tokens_in_a_turn_is_nothing_to_its_ratio():
    advantage = torch.tensor([1.0, -2, 3, 0.5, 4], dtype=torch.float64)
    place = torch.tensor([2, 0, 1, 4, 3])
    before, metrics = loss_of(4 * LOG_RATIO, advantage, ratio="turn")
    # Their ratio stays with the turn, wherever in it the advantages are.
    after, same = loss_of((4 * LOG_RATIO)[place], advantage, ratio="turn")
    assert after.item() == pytest.approx(before.item(), abs=1e-12)
    assert same["ratio_max"].item() == pytest.approx(metrics["ratio_max"].item(), abs=1e-12)


@pytest.mark.parametrize("level", ["token", "turn", "sequence"])
def test_tokens_without_weight_in_units_of_their_own_change_nothing(level):
    """What is masked: turns that were not judged, and padding where a caller keeps it."""
    config = PolicyLossConfig(ratio=level)
    old = torch.zeros(5, dtype=torch.float64)
    rows = (4 * LOG_RATIO, old, ADVANTAGE, TURN, DIALOGUE, WEIGHT)
    more = (torch.tensor([3.0, -9]), torch.zeros(2), torch.tensor([1.0, -1]))
    more = (*more, torch.tensor([2, 3]), torch.tensor([1, 1]), torch.zeros(2))
    both = [torch.cat([a, b.to(a)]) for a, b in zip(rows, more, strict=True)]
    loss, metrics = policy_loss(*rows, config)
    padded, same = policy_loss(*both, config)
    assert padded == loss
    for name in ("clip_fraction", "clip_fraction_turn", "ratio", "kl_old"):
        assert metrics[name] == same[name]
    assert complementary_loss(*both, config) == complementary_loss(*rows, config)
    assert complementary_loss(*more, config) is None


def test_clipped_tokens_and_the_turns_they_stand_in_are_counted():
    _, metrics = loss_of(LOG_RATIO, clip_high=0.2)
    assert metrics["clip_fraction"].item() == pytest.approx(0.2)
    assert metrics["clip_fraction_turn"].item() == pytest.approx(0.6)
    assert metrics["ratio_max"].item() == pytest.approx(1.349859, abs=1e-6)
    empty = torch.zeros(0)
    none = torch.zeros(0, dtype=torch.int64)
    _, metrics = policy_loss(empty, empty, empty, none, none, empty, PolicyLossConfig())
    assert metrics["ratio_max"] == 0


def test_the_dual_clip_is_the_third_way_to_be_clipped():
    log_ratio = torch.full((5,), 4.0, dtype=torch.float64)
    old = torch.zeros_like(log_ratio)
    rows = (log_ratio, old, -ADVANTAGE, TURN, DIALOGUE, WEIGHT)
    assert complementary_loss(*rows, PolicyLossConfig(dual_clip=0)) is None
    removed = complementary_loss(*rows, PolicyLossConfig(dual_clip=10))
    assert removed.item() == pytest.approx(np.exp(4.0))


def test_what_another_engine_sampled_is_weighed_up_to_the_cap():
    old = torch.tensor([-1.0, -1, -1, 500], requires_grad=True)
    sampled = torch.tensor([-1.0, -2, 0, -500])
    weight = sampling_weight(old, sampled, cap=2)
    assert weight.tolist() == pytest.approx([1, 2, np.exp(-1), 2])
    assert not weight.requires_grad


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
        {"clip_high": NAN},
        {"dual_clip": 0.5},
        {"dual_clip": NAN},
        {"sampling_cap": -1.0},
        {"kl_weight": -0.1},
        {"kl_weight": NAN},
        {"entropy_weight": NAN},
        {"kl": "k4"},
    ],
)
def test_bad_options_are_named(options):
    with pytest.raises(InputError, match=next(iter(options))):
        PolicyLossConfig(**options)


def test_an_unknown_level_is_named():
    with pytest.raises(InputError, match="level must be token, turn or sequence"):
        aggregation_weights(TURN, DIALOGUE, "word")
