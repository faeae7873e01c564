"""verl: the policy loss with one importance ratio per turn (Turn-PPO) in verl's layout.

:func:`normkit.integrations.verl.register` registers :func:`verl_turn_loss` with
``register_policy_loss``; a run takes it by::

    actor_rollout_ref.actor.policy_loss.loss_mode=normkit_turn_ppo \
    actor_rollout_ref.actor.loss_agg_mode=seq-mean-token-mean

which is Turn-PPO of ST-PPO (arXiv 2511.20718) with its mean over each response. The method's other
half, the clipping-bias correction (:class:`normkit.optim.ClippingBias`), acts between the backward
passes and the optimizer's step, which a loss does not reach: it is not covered.

Shapes: B dialogues, L tokens of a response (padded).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from normkit.rl.loss import PolicyLossConfig, policy_loss
from normkit.rl.token_grid import turns_of_mask

TURN_PPO = "normkit_turn_ppo"
"""Name in verl's registry."""


def verl_turn_loss(
    old_log_prob: Tensor,
    log_prob: Tensor,
    advantages: Tensor,
    response_mask: Tensor,
    loss_agg_mode: str = "token-mean",
    config: Any = None,
    rollout_is_weights: Tensor | None = None,
) -> tuple[Tensor, dict[str, float]]:
    """Turn-PPO as verl 0.9.1 calls a policy loss.

    Args:
        old_log_prob: log-probabilities before the update ``[B, L]``.
        log_prob: under the policy being trained ``[B, L]``.
        advantages: ``[B, L]``.
        response_mask: 1 on the policy's tokens ``[B, L]``; its runs are the turns.
        loss_agg_mode: verl's aggregation over tokens.
        config: verl's actor: ``clip_ratio``, ``clip_ratio_low``, ``clip_ratio_high``,
            ``clip_ratio_c`` (the dual clip) and ``global_batch_info``.
        rollout_is_weights: verl's correction for the sampling engine ``[B, L]``.

    Returns:
        The loss, to be minimized, and verl's metrics of it.
    """
    from verl.trainer.ppo.core_algos import agg_loss

    aggregate = partial(
        agg_loss, loss_mask=response_mask, loss_agg_mode=loss_agg_mode, **config.global_batch_info
    )
    low, high = config.clip_ratio_low, config.clip_ratio_high
    options = PolicyLossConfig(
        ratio="turn",
        clip_low=config.clip_ratio if low is None else low,
        clip_high=config.clip_ratio if high is None else high,
        dual_clip=config.get("clip_ratio_c", 3.0),
    )
    if rollout_is_weights is not None:
        advantages = advantages * rollout_is_weights
    return grid_loss(log_prob, old_log_prob, advantages, response_mask, aggregate, options)


def grid_loss(
    logprob: Tensor,
    old_logprob: Tensor,
    advantage: Tensor,
    mask: Tensor,
    aggregate: Callable[[Tensor], Tensor],
    options: PolicyLossConfig,
) -> tuple[Tensor, dict[str, float]]:
    """The clipped policy loss of a grid of tokens under an engine's own aggregation.

    Args:
        logprob: ``[B, L]``.
        old_logprob: ``[B, L]``.
        advantage: ``[B, L]``.
        mask: 1 on the policy's tokens ``[B, L]``; its runs are the turns.
        aggregate: linear map from a loss for each token ``[B, L]`` to the loss.
        options: of the loss.

    Returns:
        The loss, and by verl's names the share of clipped tokens and the divergence from the old
        policy, each weighted as the loss is.
    """
    ours = mask.bool()
    with torch.enable_grad():
        probe = torch.zeros_like(logprob, requires_grad=True)
        # What the aggregation multiplies each token's loss by, whatever its mode.
        (weight,) = torch.autograd.grad(aggregate(probe), probe)
    dialogue = torch.arange(len(ours), device=ours.device)[:, None].expand(ours.shape)
    turn = turns_of_mask(ours) + dialogue * ours.shape[1]
    loss, found = policy_loss(
        logprob[ours],
        old_logprob[ours],
        advantage[ours],
        turn[ours],
        dialogue[ours],
        weight[ours],
        options,
    )
    total = weight[ours].sum().clamp_min(1e-12)
    return loss, {
        "actor/pg_clipfrac": float(found["clip_fraction"] / total),
        "actor/ppo_kl": float(found["kl_old"] / total),
        "actor/ratio_max": float(found["ratio_max"]),
    }
