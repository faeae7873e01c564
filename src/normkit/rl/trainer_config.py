"""Options of the trainer."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from normkit.errors import InputError, check_least
from normkit.optim.clipping_bias import Mode
from normkit.rl.advantage import get_estimator
from normkit.rl.critic import CriticConfig


@dataclass(frozen=True)
class TrainerConfig:
    """Options of the trainer.

    Attributes:
        steps: rollout-and-update rounds.
        groups: tasks per step.
        group_size: dialogues per task, compared with one another.
        estimator: how turns are credited (a key of :data:`normkit.rl.advantage.ESTIMATORS`).
        estimator_options: its options.
        critic: options of the critic, where the estimator ("ppo") needs one.
        correction: what :class:`normkit.optim.ClippingBias` makes of the policy's gradients, those
            of the divergence and of a critic that is not detached among them; "measure" watches
            the clipping bias only, None does not compute it.
        correction_floor: clipping bias that the correction "floor" lets pass.
        learning_rate: peak of the schedule.
        schedule: "constant" or "cosine" (to zero) after the warm-up.
        warmup_steps: updates of linear warm-up.
        weight_decay: of AdamW.
        max_grad_norm: gradients are clipped to this norm.
        mini_batches: updates that one batch is split into.
        epochs: passes over a batch.
        micro_batch_tokens: tokens of one forward pass; bounds memory.
        lora_rank: rank of LoRA adapters; 0 trains all weights.
        autocast: dtype of the forward pass: "auto", "float32" or "bfloat16".
        recompute: compute the layers' activations again in the backward pass instead of keeping
            them; less memory for about a third more time.
        checkpoint_every: steps between checkpoints; 0 keeps only the last.
        evaluate_every: steps between evaluations on held-out tasks; 0 evaluates never.
        seed: of tasks, sampling and adapters.
    """

    steps: int = 24
    groups: int = 4
    group_size: int = 4
    estimator: str = "mapo"
    estimator_options: Mapping[str, Any] = field(default_factory=dict)
    critic: CriticConfig = field(default_factory=CriticConfig)
    correction: Mode | None = None
    correction_floor: float = 1.0
    learning_rate: float = 1e-5
    schedule: Literal["constant", "cosine"] = "constant"
    warmup_steps: int = 1
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    mini_batches: int = 1
    epochs: int = 1
    micro_batch_tokens: int = 2048
    lora_rank: int = 0
    autocast: Literal["auto", "float32", "bfloat16"] = "auto"
    recompute: bool = False
    checkpoint_every: int = 10
    evaluate_every: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        counts = ("steps", "groups", "group_size", "mini_batches", "epochs", "micro_batch_tokens")
        check_least(self, 1, *counts)
        check_least(
            self, 0, "checkpoint_every", "evaluate_every", "warmup_steps", "lora_rank", "seed"
        )
        for name in ("learning_rate", "weight_decay"):
            if not 0 <= getattr(self, name) < math.inf:
                raise InputError(f"{name} must be at least 0, got {getattr(self, name)}")
        if not self.max_grad_norm > 0:
            raise InputError(f"max_grad_norm must be above 0, got {self.max_grad_norm}")
        if self.schedule not in ("constant", "cosine"):
            raise InputError(f"schedule must be constant or cosine, got {self.schedule!r}")
        if self.correction not in (None, *get_args(Mode)):
            modes = ", ".join(get_args(Mode))
            raise InputError(f"correction must be None or one of {modes}; got {self.correction!r}")
        if not self.correction_floor > 0:
            raise InputError(f"correction_floor must be above 0, got {self.correction_floor}")
        estimator = get_estimator(self.estimator)
        if set(estimator.needs) - {"value"}:
            raise InputError(f"estimator {self.estimator!r} needs more than the trainer has")
        for name in self.estimator_options:
            if name not in estimator.options:
                known = ", ".join(estimator.options) or "none"
                raise InputError(f"estimator_options: {self.estimator} has {known}; got {name!r}")
        if self.mini_batches > self.groups * self.group_size:
            raise InputError("mini_batches must not exceed groups x group_size")

    @property
    def needs_critic(self) -> bool:
        """Whether the estimator needs values of states."""
        return "value" in get_estimator(self.estimator).needs
