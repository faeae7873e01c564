r"""The critic of PPO: a value head on the policy's own hidden states.

``V(s) = w . h / |h| + b``, h the last hidden state before a token of the reply: the very state that
the token is predicted from, so that the critic costs D + 1 weights and no forward pass of its own.
Hidden states of language models are long and differ in length; of unit length, one learning rate
serves all of them. The head starts at zero, so its first advantages are those without a critic.

Shapes: M sampled tokens, D width of the hidden states.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from normkit.errors import InputError, check_least


@dataclass(frozen=True)
class CriticConfig:
    """Options of the critic.

    Attributes:
        level: "turn" values the state before each reply, and credits turns; "token" values the
            state before each token of the replies, and credits tokens.
        weight: of the value loss beside the policy's.
        clip: how far the value may move from that before the update and still lower the loss; 0
            switches it off.
        detach: train the head alone, not the policy through its hidden states.
        learning_rate: of the head; it follows the schedule of the policy's.
    """

    level: Literal["turn", "token"] = "turn"
    weight: float = 0.1
    clip: float = 0.2
    detach: bool = False
    learning_rate: float = 1e-3

    def __post_init__(self) -> None:
        if self.level not in ("turn", "token"):
            raise InputError(f"level must be turn or token, got {self.level!r}")
        check_least(self, 0, "weight", "clip", "learning_rate")


class ValueHead(nn.Module):
    """Value of states from the policy's hidden states; zero everywhere at first.

    Args:
        width: D.
        detach: pass no gradient on to the hidden states.
    """

    def __init__(self, width: int, detach: bool = False) -> None:
        super().__init__()
        self.detach = detach
        self.linear = nn.Linear(width, 1)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, hidden: Tensor) -> Tensor:
        """Return values ``[M]`` in float32 of hidden states ``[M, D]``."""
        states = hidden.detach() if self.detach else hidden
        values: Tensor = self.linear(nn.functional.normalize(states.float(), dim=-1))
        return values[..., 0]


def value_loss(
    value: Tensor, old_value: Tensor, target: Tensor, weight: Tensor, clip: float = 0.2
) -> Tensor:
    r"""Squared error of values, clipped as PPO's authors' code does it.

    ``sum_k weight_k 1/2 max((V_k - R_k)^2, (V_old,k + clip(V_k - V_old,k, -c, c) - R_k)^2)``: a
    value that is further than c from what it was before the update, on the side of its target,
    has no gradient.

    Args:
        value: ``[M]``.
        old_value: before the first update on the batch ``[M]``.
        target: returns R ``[M]``: advantages before whitening, plus ``old_value``.
        weight: of each state in the sum ``[M]``.
        clip: c; 0 switches the second term off.

    Returns:
        The loss, a scalar.
    """
    error = (value - target).square()
    if clip:
        near = old_value + (value - old_value).clamp(-clip, clip)
        error = torch.maximum(error, (near - target).square())
    return (weight * error).sum() / 2


def explained_variance(sums: Tensor) -> float:
    """Share of the variance of returns that values explain, ``1 - Var(R - V) / Var(R)``.

    Args:
        sums: :func:`variance_sums` of all states ``[5]``, added up over the processes.

    Returns:
        At most 1; 0 for a critic no better than a constant, or where all returns are equal.
    """
    n, target, target_square, error, error_square = sums.tolist()
    n = max(n, 1.0)
    variance = target_square / n - (target / n) ** 2
    left = error_square / n - (error / n) ** 2
    return 1 - left / variance if variance > 1e-12 * target_square / n else 0.0


def variance_sums(target: Tensor, value: Tensor) -> Tensor:
    """Count, and sums and sums of squares of returns and of their errors ``[5]``, float64."""
    r, e = target.double(), (target - value).double()
    count = r.new_tensor(float(len(r)))
    return torch.stack([count, r.sum(), r.square().sum(), e.sum(), e.square().sum()])
