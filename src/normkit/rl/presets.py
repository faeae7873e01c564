"""PPO, GRPO and what ST-PPO makes of them, by name.

Stabilizing Off-Policy Training for Long-Horizon LLM Agent via Turn-Level Importance Sampling and
Clipping-Triggered Normalization (Li et al., 2025; first named ST-PPO), arXiv 2511.20718.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from normkit.errors import InputError
from normkit.optim.clipping_bias import Mode
from normkit.rl.critic import CriticConfig
from normkit.rl.loss import Level, PolicyLossConfig
from normkit.rl.trainer_config import TrainerConfig


class Method(NamedTuple):
    """What tells the methods apart.

    Attributes:
        estimator: "ppo" with a critic for tokens, or "grpo" with none.
        ratio: what shares an importance ratio.
        correction: mode of the clipping-bias correction; "measure" only logs the bias.
    """

    estimator: str
    ratio: Level
    correction: Mode


METHODS: Mapping[str, Method] = {
    "ppo": Method("ppo", "token", "measure"),
    "turn-ppo": Method("ppo", "turn", "measure"),
    "s-ppo": Method("ppo", "token", "floor"),
    "st-ppo": Method("ppo", "turn", "floor"),
    "grpo": Method("grpo", "token", "measure"),
    "so-grpo": Method("grpo", "turn", "floor"),
}
ALIASES: Mapping[str, str] = {"so-ppo": "st-ppo"}
"""The second version of the paper renamed the method."""


def preset(name: str, **options: Any) -> tuple[TrainerConfig, PolicyLossConfig]:
    """Options of the trainer and of the loss for a method of the ST-PPO paper.

    The loss is the paper's: ratios clipped to 0.8..1.2, a mean over each response of its tokens,
    no dual clip. The critic values tokens (gamma and lambda 1), on hidden states whose gradient is
    stopped, so that the correction divides the gradient of the policy's objective alone.

    Args:
        name: a key of :data:`METHODS` or an alias.
        options: other options of :class:`TrainerConfig`, or other values of those set here.

    Raises:
        InputError: for an unknown name.
    """
    method = METHODS.get(ALIASES.get(name, name))
    if method is None:
        raise InputError(f"preset must be one of {', '.join([*METHODS, *ALIASES])}; got {name!r}")
    chosen: dict[str, Any] = {"estimator": method.estimator, "correction": method.correction}
    if method.estimator == "ppo":
        chosen["estimator_options"] = {"gamma": 1.0, "lam": 1.0}
        chosen["critic"] = CriticConfig(level="token", detach=True)
    loss = PolicyLossConfig(
        ratio=method.ratio, clip_low=0.2, clip_high=0.2, dual_clip=0.0, aggregate="sequence"
    )
    return TrainerConfig(**{**chosen, **options}), loss
