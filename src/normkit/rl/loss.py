"""Clipped policy losses over flat tokens, with ratios per token, turn or sequence.

Stabilizing Off-Policy Training for Long-Horizon LLM Agent via Turn-Level Importance Sampling and
Clipping-Triggered Normalization (Li et al., 2025; first named ST-PPO), arXiv 2511.20718::

    w_k = exp(mean over the unit's tokens of (log pi - log pi_old))
    J   = sum_k weight_k min(w_k A_k, clip(w_k) A_k)
    C   = sum over clipped k of weight_k grad(w_k A_k)          grad J = grad J_unclipped - C

A token is clipped where its term has no gradient: A > 0 and w above the range, A < 0 and w below
it, or A < 0 and w above the dual clip. :func:`complementary_loss` has -C as its gradient;
:class:`normkit.optim.ClippingBias` divides by its size.

Shapes: M sampled tokens; each belongs to a turn (row of the turn table) and to a dialogue.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from normkit.errors import InputError
from normkit.functional.moments import segment_moments

Level = Literal["token", "turn", "sequence"]
KL = Literal["k1", "k2", "k3"]

_LARGEST = 20.0  # |log ratio| that is told apart; exp(20) is far outside of any clipping range


@dataclass(frozen=True)
class PolicyLossConfig:
    """Options of :func:`policy_loss`; the defaults are MAPO's launch scripts (arXiv 2603.06194).

    Attributes:
        ratio: what shares an importance ratio. "turn" and "sequence" use the geometric mean over
            the unit's tokens (arXiv 2511.20718; GSPO, arXiv 2507.18071).
        clip_low: the ratio is clipped below at ``1 - clip_low``.
        clip_high: and above at ``1 + clip_high``.
        dual_clip: bound of the ratio for negative advantages; 0 switches it off.
        sampling_cap: cap of :func:`sampling_weight`, which corrects for an engine that samples with
            other numbers than the trainer's; 0 switches it off.
        aggregate: what weighs the same in the mean: every token, every turn or every dialogue.
        kl: estimator of the divergence from the reference.
        kl_weight: weight of the divergence in the loss; 0 switches it off.
        entropy_weight: weight of the entropy bonus.
    """

    ratio: Level = "token"
    clip_low: float = 0.2
    clip_high: float = 0.28
    dual_clip: float = 10.0
    sampling_cap: float = 0.0
    aggregate: Level = "token"
    kl: KL = "k3"
    kl_weight: float = 0.0
    entropy_weight: float = 0.0

    def __post_init__(self) -> None:
        _check_level("ratio", self.ratio)
        _check_level("aggregate", self.aggregate)
        if self.kl not in ("k1", "k2", "k3"):
            raise InputError(f"kl must be k1, k2 or k3, got {self.kl!r}")
        # NaN fails every comparison, and so must fail here.
        if not (0 <= self.clip_low < 1 and self.clip_high >= 0):
            raise InputError("clip_low must be in [0, 1) and clip_high at least 0")
        if not (self.dual_clip == 0 or self.dual_clip > 1):
            raise InputError(f"dual_clip must be 0 or above 1, got {self.dual_clip}")
        for name in ("sampling_cap", "kl_weight"):
            if not 0 <= getattr(self, name) < math.inf:
                raise InputError(f"{name} must be at least 0, got {getattr(self, name)}")
        if not math.isfinite(self.entropy_weight):
            raise InputError(f"entropy_weight must be finite, got {self.entropy_weight}")


def kl_estimate(logprob: Tensor, reference: Tensor, kind: KL = "k3") -> Tensor:
    r"""Per-token estimate of ``KL(policy || reference)`` from samples of the policy.

    With ``d = log ref - log policy``: k1 ``-d``, unbiased; k2 ``d^2 / 2``, biased, low variance;
    k3 ``exp(d) - 1 - d``, unbiased and never negative. As a loss, the gradient of k2 is the one
    that is unbiased for the gradient of the divergence (k1's is zero in expectation).

    Args:
        logprob: log-probabilities under the policy ``[M]``.
        reference: under the reference ``[M]``.
        kind: the estimator.

    Returns:
        ``[M]``, in nats.

    Raises:
        InputError: for a ``kind`` that does not exist.
    """
    d = reference - logprob
    if kind == "k1":
        return -d
    if kind == "k2":
        return d.square() / 2
    if kind == "k3":
        return torch.expm1(d) - d
    raise InputError(f"kl must be k1, k2 or k3, got {kind!r}")


def aggregation_weights(turn: Tensor, dialogue: Tensor, level: Level) -> Tensor:
    """Weight of each token such that weights sum to the number of units of the level.

    Dividing a weighted sum by the number of units of the *whole* batch makes gradient accumulation
    and data parallelism sum exactly to the loss of the batch at once.

    Args:
        turn: turn of each token ``[M]``.
        dialogue: dialogue of each token ``[M]``.
        level: the unit.

    Returns:
        ``[M]``; 1 for tokens, else one over the length of the token's unit.

    Raises:
        InputError: for an unknown level.
    """
    _check_level("level", level)
    if level == "token":
        return torch.ones_like(turn, dtype=torch.float32)
    unit = turn if level == "turn" else dialogue
    return 1 / torch.bincount(unit)[unit].float()


def policy_loss(
    logprob: Tensor,
    old_logprob: Tensor,
    advantage: Tensor,
    turn: Tensor,
    dialogue: Tensor,
    weight: Tensor,
    config: PolicyLossConfig,
    reference: Tensor | None = None,
    entropy: Tensor | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    r"""Clipped surrogate, to be minimized.

    ``sum_k weight_k [-min(w_k A_k, clip(w_k, 1 - low, 1 + high) A_k)]`` with
    ``w = exp(log pi - log pi_old)`` per token or its geometric mean per turn or dialogue; for
    negative advantages no lower than ``dual_clip A_k``.

    Args:
        logprob: log-probabilities under the policy being trained ``[M]``.
        old_logprob: under the policy that sampled ``[M]``.
        advantage: advantage of each token ``[M]``.
        turn: turn of each token ``[M]``.
        dialogue: dialogue of each token ``[M]``. All tokens of what shares a ratio must be in the
            call.
        weight: weight of each token in the sum ``[M]``: :func:`aggregation_weights` over the number
            of units of the whole batch.
        config: the options.
        reference: log-probabilities under the reference ``[M]``, for the KL term.
        entropy: entropy of each token's distribution ``[M]``, for the bonus.

    Returns:
        The loss, and detached numbers. Sums over the call's tokens with ``weight``:
        "clip_fraction" of clipped tokens, "clip_fraction_turn" of tokens in turns with a clipped
        one, "ratio", "kl_old", and "kl" and "entropy" where given. The largest ratio of a token
        that counts: "ratio_max".
    """
    ratio, _, value, clipped = _surrogate(logprob, old_logprob, advantage, turn, dialogue, config)
    loss = -(weight * value).sum()
    with torch.no_grad():
        size = int(turn.max()) + 1 if turn.numel() else 0
        beside = clipped.new_zeros(size).index_fill(0, turn[clipped], True)[turn]
        metrics = {
            "clip_fraction": (weight * clipped).sum(),
            "clip_fraction_turn": (weight * beside).sum(),
            "ratio": (weight * ratio).sum(),
            "ratio_max": (ratio * (weight != 0)).amax() if ratio.numel() else ratio.sum(),
            "kl_old": (weight * kl_estimate(logprob, old_logprob, "k3")).sum(),
        }
    if reference is not None:
        kl = (weight * kl_estimate(logprob, reference, config.kl)).sum()
        metrics["kl"] = kl.detach()
        if config.kl_weight:
            loss = loss + config.kl_weight * kl
    if entropy is not None:
        total = (weight * entropy).sum()
        metrics["entropy"] = total.detach()
        loss = loss - config.entropy_weight * total
    return loss, metrics


def complementary_loss(
    logprob: Tensor,
    old_logprob: Tensor,
    advantage: Tensor,
    turn: Tensor,
    dialogue: Tensor,
    weight: Tensor,
    config: PolicyLossConfig,
) -> Tensor | None:
    r"""What clipping takes out of the surrogate: ``-sum_{k clipped} weight_k w_k A_k``.

    With it :func:`policy_loss` has the gradient that it would have without clipping; its own
    gradient is minus the clipping bias of ST-PPO (arXiv 2511.20718, Lemma 4.2).

    Args:
        logprob: as in :func:`policy_loss`, and so the others.
        old_logprob: ``[M]``.
        advantage: ``[M]``.
        turn: ``[M]``.
        dialogue: ``[M]``.
        weight: ``[M]``.
        config: the options.

    Returns:
        The loss, or None where no token that counts is clipped.
    """
    _, plain, _, clipped = _surrogate(logprob, old_logprob, advantage, turn, dialogue, config)
    lost = clipped & (weight != 0)
    return -(weight * plain)[lost].sum() if bool(lost.any()) else None


def sampling_weight(old_logprob: Tensor, sampling_logprob: Tensor, cap: float) -> Tensor:
    """Truncated importance weight of tokens that another engine sampled.

    ``min(pi_old / pi_sampling, cap)``, detached, to multiply advantages by: the engine's
    arithmetic differs from the trainer's (the truncation is V-trace's, arXiv 1802.01561).

    Args:
        old_logprob: log-probabilities by the trainer before the update ``[M]``.
        sampling_logprob: by the engine that sampled ``[M]``.
        cap: largest weight, above 0.

    Returns:
        ``[M]``.
    """
    ratio = (old_logprob - sampling_logprob).clamp(max=_LARGEST).exp()
    return ratio.clamp(max=cap).detach()


class _Surrogate(NamedTuple):
    """Terms of the surrogate, one per token ``[M]``.

    Attributes:
        ratio: importance ratio of the token's unit.
        plain: ratio times advantage.
        value: the same, clipped.
        clipped: where ``value`` has no gradient.
    """

    ratio: Tensor
    plain: Tensor
    value: Tensor
    clipped: Tensor


def _surrogate(
    logprob: Tensor,
    old_logprob: Tensor,
    advantage: Tensor,
    turn: Tensor,
    dialogue: Tensor,
    config: PolicyLossConfig,
) -> _Surrogate:
    log_ratio = logprob - old_logprob
    if config.ratio != "token":
        unit = turn if config.ratio == "turn" else dialogue
        size = int(unit.max()) + 1 if unit.numel() else 0
        log_ratio = segment_moments(log_ratio, unit, size).center[unit]
    # Without bounds a policy that moved too far has ratio infinity, and 0 * inf is NaN.
    ratio = log_ratio.clamp(-_LARGEST, _LARGEST).exp()
    plain = ratio * advantage
    bound = ratio.clamp(1 - config.clip_low, 1 + config.clip_high) * advantage
    clipped = bound < plain
    if config.dual_clip:
        worst = config.dual_clip * advantage
        beyond = (advantage < 0) & (plain < worst)
        bound, clipped = torch.where(beyond, worst, bound), clipped | beyond
    # Not by a minimum, which halves the gradient where both sides round to the same number.
    return _Surrogate(ratio, plain, torch.where(clipped, bound, plain), clipped)


def _check_level(name: str, level: str) -> None:
    if level not in ("token", "turn", "sequence"):
        raise InputError(f"{name} must be token, turn or sequence, got {level!r}")
