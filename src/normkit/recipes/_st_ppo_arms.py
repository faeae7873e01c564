r"""The methods that the experiments of ST-PPO compare, on flat tokens of many runs at once.

Every loss here is linear in the score: its gradient is ``sum_t k_t grad log pi_t`` with
coefficients k that do not depend on the network. The experiments take them from the library's own
losses, by differentiating these with respect to the log-probabilities, and carry them through
their own policies. What clipping keeps and what it takes away are two such vectors.

Shapes: M sampled tokens; R runs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from normkit.optim.clipping_bias import Mode
from normkit.rl.loss import Level, PolicyLossConfig, complementary_loss, policy_loss

CLIP = 0.2
"""The paper's range, for ratios of tokens, turns and whole responses alike."""

GROUP = 8
"""Dialogues of the same question; the methods without a critic compare them."""
MAX_NORM = 1.0
"""Largest norm of a gradient, after its correction; common in training language models."""


@dataclass(frozen=True)
class Arm:
    """A method.

    Attributes:
        ratio: what shares an importance ratio.
        correction: what is made of the clipping bias.
        critic: whether advantages come from a critic, or from the group's mean and deviation.
    """

    ratio: Level
    correction: Mode = "measure"
    critic: bool = True


ARMS: Mapping[str, Arm] = {
    "PPO": Arm("token"),
    "Turn-PPO": Arm("turn"),
    "S-PPO": Arm("token", "ratio"),
    "ST-PPO": Arm("turn", "ratio"),
    "ST-PPO (8)": Arm("turn", "paper"),
    "GSPO": Arm("sequence", critic=False),
    "GRPO": Arm("token", critic=False),
}
"""Corrections are made by "ratio", which has no constant to choose: the clipping bias of small
policies is far below the floor of 1. "ST-PPO (8)" is the paper's equation; the maximum norm serves
it as a floor."""


class Tokens(NamedTuple):
    """Tokens of a batch, as the losses take them; each ``[M]``.

    Attributes:
        old: log-probabilities under the policy that sampled.
        turn: turn of each token; runs share none.
        dialogue: dialogue of each token; runs share none.
        weight: 1 over the tokens of the response and over the responses of the run.
    """

    old: Tensor
    turn: Tensor
    dialogue: Tensor
    weight: Tensor


class Coefficients(NamedTuple):
    """Weights of the scores ``[M]``, for the direction of ascent.

    Attributes:
        kept: of the clipped surrogate.
        lost: of the clipping bias; ``kept + lost`` is what there would be without clipping.
        clipped: whether a token is clipped.
    """

    kept: Tensor
    lost: Tensor
    clipped: Tensor


def coefficients(logprob: Tensor, advantage: Tensor, tokens: Tokens, ratio: Level) -> Coefficients:
    """Differentiate the surrogate, and what clipping takes out of it, by the log-probabilities.

    Args:
        logprob: under the policy being trained ``[M]``.
        advantage: ``[M]``.
        tokens: the rest.
        ratio: what shares an importance ratio.
    """
    config = PolicyLossConfig(ratio=ratio, clip_low=CLIP, clip_high=CLIP, dual_clip=0)
    x, a = logprob.detach().requires_grad_(), advantage.detach().requires_grad_()
    rows = (x, tokens.old, a, tokens.turn, tokens.dialogue, tokens.weight, config)
    (kept,) = torch.autograd.grad(-policy_loss(*rows)[0], x)
    lost, by_advantage = torch.zeros_like(kept), torch.zeros_like(kept)
    complement = complementary_loss(*rows)
    if complement is not None:
        lost, by_advantage = torch.autograd.grad(-complement, (x, a))
    # A token's term, weight times ratio times advantage, is in the complement where it is clipped.
    return Coefficients(kept, lost, by_advantage != 0)


def group_advantage(reward: Tensor, group_size: int) -> Tensor:
    """Reward less the group's mean, over its deviation; 0 where all are equal.

    Args:
        reward: of the dialogues, those of a group side by side ``[R, E]``.
        group_size: dialogues of a group.
    """
    groups = reward.view(*reward.shape[:-1], -1, group_size)
    deviation = groups.std(-1, keepdim=True) + 1e-6
    return ((groups - groups.mean(-1, keepdim=True)) / deviation).view_as(reward)


def limited(gradient: Tensor) -> Tensor:
    """Gradients ``[R, P]`` of no larger norm than :data:`MAX_NORM`."""
    size: Tensor = gradient.norm(dim=1, keepdim=True)
    return gradient * (MAX_NORM / size.clamp(min=MAX_NORM))
