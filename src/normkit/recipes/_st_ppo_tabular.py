r"""What makes an off-policy update go wrong, term by term, where the truth is known.

Lemma 4.2 of ST-PPO (arXiv 2511.20718) splits the gradient of a clipped surrogate::

    grad J = sum w A grad log pi            off-policy policy gradient, true advantage
           + sum w (A^ - A) grad log pi     error of the estimated advantages
           - C                              clipping bias

In the chain of hops A, the advantage under the policy that is being trained, is known exactly, so
that each term of every update of a training is measured by itself. The error is split once more:
the luck of the dialogues (rewards less their expectation under the policy that sampled) and the
rest, which is the critic's: values that are wrong, or of an older policy.

Shapes: R runs; E dialogues a run; M tokens (flat, all runs); U updates.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from normkit.optim import correction_factor
from normkit.recipes._st_ppo_arms import (
    GROUP,
    Arm,
    Tokens,
    coefficients,
    group_advantage,
    limited,
)
from normkit.recipes._st_ppo_chain import (
    CELLS,
    TURNS,
    VOCABULARY,
    Rollouts,
    Truth,
    roll_out,
    truth,
)

_CAUTION = 8
"""Dialogues that the critic's old value of a cell counts as, when new ones come."""


@dataclass(frozen=True)
class Schedule:
    """How much is sampled and updated.

    Attributes:
        updates: in all, U.
        staleness: updates per batch of dialogues; each takes its own part of the batch, so that
            the first is on-policy and the last as many updates behind.
        dialogues: of each run and update.
    """

    updates: int = 512
    staleness: int = 64
    dialogues: int = 32


@dataclass(frozen=True)
class History:
    """What a training did, by update and run ``[U, R]``.

    Attributes:
        value: expected reward of the policy, exact.
        clipped: share of the tokens that are clipped.
        gradient: norm of the gradient, before correction.
        bias: norm of the clipping bias C.
        cosine: of the gradient with the exact gradient of the expected reward.
        true: norm of the off-policy policy gradient with the true advantage.
        luck: norm of the error by the luck of the dialogues.
        critic: norm of the error by the critic.
        value_error: root mean square over the tokens of the critic's distance to true values.
    """

    value: Tensor
    clipped: Tensor
    gradient: Tensor
    bias: Tensor
    cosine: Tensor
    true: Tensor
    luck: Tensor
    critic: Tensor
    value_error: Tensor


@dataclass(frozen=True)
class Batch:
    """Dialogues of all runs as flat tokens.

    Attributes:
        run: ``[M]``.
        step: index into tables over runs, turns and cells ``[M]``.
        place: index into policies: over runs, cells and tokens ``[M]``.
        reward: of the token's dialogue ``[M]``.
        compared: reward as :func:`group_advantage` has it ``[M]``.
        tokens: for the losses.
    """

    run: Tensor
    step: Tensor
    place: Tensor
    reward: Tensor
    compared: Tensor
    tokens: Tokens

    @property
    def choice(self) -> Tensor:
        """Index into tables over runs, turns, cells and tokens ``[M]``."""
        return self.step * VOCABULARY + self.place % VOCABULARY


def flatten(rollouts: Rollouts, policy: Tensor) -> Batch:
    """Lay out the tokens of all runs one after the other.

    Args:
        rollouts: E dialogues a run.
        policy: that sampled them ``[R, C, V]``.
    """
    run, dialogue, turn, _ = index = rollouts.live.nonzero(as_tuple=True)
    count = rollouts.live.shape[1]
    cell, token = rollouts.cell[index], rollouts.token[index]
    place = (run * CELLS + cell) * VOCABULARY + token
    unique = run * count + dialogue
    length = rollouts.live.sum((2, 3)).double()
    return Batch(
        run=run,
        step=(run * TURNS + turn) * CELLS + cell,
        place=place,
        reward=rollouts.reward[run, dialogue],
        compared=group_advantage(rollouts.reward, GROUP)[run, dialogue],
        tokens=Tokens(
            old=policy.flatten()[place].log(),
            turn=unique * TURNS + turn,
            dialogue=unique,
            weight=1 / (length * count)[run, dialogue],
        ),
    )


def ascent(coefficient: Tensor, batch: Batch, policy: Tensor) -> Tensor:
    """Sum of coefficients ``[M]`` times scores, by the logits ``[R, C * V]``."""
    total = torch.bincount(batch.place, coefficient, policy.numel()).view_as(policy)
    return (total - policy * total.sum(-1, keepdim=True)).flatten(1)


@dataclass
class _Sample:
    """What is known since the last sampling: dialogues, and policy, truth and values then."""

    rollouts: Rollouts
    policy: Tensor
    truth: Truth
    value: Tensor


def train(
    arm: Arm,
    rates: Tensor,
    schedule: Schedule,
    seed: int,
    lemma: bool = False,
) -> History:
    """Train one policy per learning rate, all from the uniform policy.

    Args:
        arm: the method.
        rates: learning rate of Adam for each run ``[R]``.
        schedule: how much is sampled and updated.
        seed: of all runs together; run r has the same luck under every method.
        lemma: also measure the last four of the history, where the method has a critic; else NaN.
    """
    generator = torch.Generator().manual_seed(seed)
    weight = torch.zeros(len(rates), CELLS, VOCABULARY, dtype=torch.float64)
    # Adam's step does not depend on the gradient's size: steps of one, scaled, are steps of `rate`.
    adam = torch.optim.Adam([weight], lr=1.0, maximize=True)
    scale = rates.double()[:, None, None]
    critic = torch.zeros(len(rates), TURNS, CELLS, dtype=torch.float64)
    rows: list[tuple[Tensor, ...]] = []
    for update in range(schedule.updates):
        policy = torch.softmax(scale * weight, -1)
        now = truth(policy)
        part = update % schedule.staleness
        if part == 0:
            played = roll_out(policy, schedule.dialogues * schedule.staleness, generator)
            sample = _Sample(played, policy, now, critic)
        begin = part * schedule.dialogues
        taken = sample.rollouts.part(begin, begin + schedule.dialogues)
        batch = flatten(taken, sample.policy)
        logprob = policy.flatten()[batch.place].log()
        advantage = batch.compared
        if arm.critic:
            advantage = batch.reward - sample.value.flatten()[batch.step]
        found = coefficients(logprob, advantage, batch.tokens, arm.ratio)
        kept, lost = (ascent(x, batch, policy) for x in (found.kept, found.lost))
        size, bias = kept.norm(dim=1), lost.norm(dim=1)
        terms = _lemma(arm, batch, policy, now, sample, critic) if lemma and arm.critic else []
        rows.append(
            (
                now.start,
                _mean(found.clipped.double(), batch, len(rates)),
                size,
                bias,
                torch.cosine_similarity(kept, now.gradient.flatten(1), dim=1),
                *(terms or [torch.full_like(size, torch.nan)] * 4),
            )
        )
        given = kept * correction_factor(size, bias, arm.correction)[:, None]
        weight.grad = limited(given).view_as(weight)
        adam.step()
        critic = critic + _surprise(batch, critic)
    return History(*(torch.stack(x) for x in zip(*rows, strict=True)))


def _lemma(
    arm: Arm, batch: Batch, policy: Tensor, now: Truth, sample: _Sample, critic: Tensor
) -> list[Tensor]:
    """Norms of the lemma's terms but the clipping bias, and the critic's error, ``[R]`` each."""
    logprob = policy.flatten()[batch.place].log()
    state = now.value.flatten()[batch.step]
    true = now.q.flatten()[batch.choice] - state
    expected = sample.truth.q.flatten()[batch.choice]
    rest = expected - sample.value.flatten()[batch.step] - true
    found = []
    for advantage in (true, batch.reward - expected, rest):
        part = coefficients(logprob, advantage, batch.tokens, arm.ratio)
        found.append(ascent(part.kept + part.lost, batch, policy).norm(dim=1))
    off = (critic.flatten()[batch.step] - state).square()
    return [*found, _mean(off, batch, len(policy)).sqrt()]


def _mean(x: Tensor, batch: Batch, runs: int) -> Tensor:
    """Mean over the tokens of each run ``[R]``."""
    return torch.bincount(batch.run, x, runs) / torch.bincount(batch.run, minlength=runs)


def _surprise(batch: Batch, critic: Tensor) -> Tensor:
    """Step of the critic towards the rewards that followed, where there were any."""
    off = batch.reward - critic.flatten()[batch.step]
    count = torch.bincount(batch.step, minlength=critic.numel())
    step = torch.bincount(batch.step, off, critic.numel()) / (count + _CAUTION)
    return step.view_as(critic)
