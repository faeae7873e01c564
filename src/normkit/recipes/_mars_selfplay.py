"""Self-play with tabular policies, exactly evaluated (part of the recipe of mars).

One softmax per information set, trained by the mean over trajectories (two a game) of the sum over
turns of ``A grad log pi``: the published update where each batch is used once, so that no ratio is
clipped, without its pull to a reference policy. All runs of a setting are trained together.

Shapes: R runs; E evaluations; I information sets; A actions.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from normkit.recipes._mars_gradient import Arm, credit
from normkit.recipes._mars_tree import Game, policy_gradient, tree


class Softmax:
    """A softmax policy per run, ascended by Adam at the run's own rate, from uniform play."""

    def __init__(self, rates: Tensor, legal: Tensor) -> None:
        """Take the rate of each run ``[R]`` and the legal actions ``[I, A]``."""
        self.legal, self.scale = legal, rates.double().view(-1, 1, 1)
        self.weight = torch.zeros(len(rates), *legal.shape, dtype=torch.float64)
        # Adam's step does not depend on the gradient's size: steps of one, scaled, are of `rate`.
        self.adam = torch.optim.Adam([self.weight], lr=1.0, maximize=True)

    def policy(self) -> Tensor:
        """Probabilities ``[R, I, A]``."""
        return torch.softmax((self.scale * self.weight).masked_fill(~self.legal, -torch.inf), -1)

    def ascend(self, gradient: Tensor) -> None:
        """Make a step along a gradient by the logits ``[R, I, A]``."""
        self.weight.grad = gradient
        self.adam.step()


@dataclass(frozen=True)
class Trained:
    """What training did.

    Attributes:
        games: played before each evaluation ``[E]``.
        last: exploitability of the policy of the moment ``[E, R]``.
        average: exploitability of the average of all policies so far ``[E, R]``.
        wins: share of the training games that the first seat won ``[R]``.
    """

    games: list[int]
    last: Tensor
    average: Tensor
    wins: Tensor


def train(
    arm: Arm,
    game: Game,
    rates: Tensor,
    updates: int,
    games: int,
    seed: int,
    evaluations: int = 15,
) -> Trained:
    """Train one policy per learning rate by self-play, all from uniform play.

    Args:
        arm: how turns are credited.
        game: what is played.
        rates: learning rate of Adam for each run ``[R]``.
        updates: number of updates.
        games: in the batch of an update.
        seed: of all runs together; run r has the same luck with every arm.
        evaluations: number of exact evaluations on the way.
    """
    table, learner = tree(game), Softmax(rates, tree(game).legal)
    generator = torch.Generator().manual_seed(seed)
    baseline = torch.zeros(len(rates), 2, dtype=torch.float64)
    behaviour = torch.zeros_like(learner.weight)
    wins = torch.zeros(len(rates), dtype=torch.float64)
    at = {round(updates * (e + 1) / evaluations) for e in range(evaluations)}
    played_before, last, average = [], [], []
    for update in range(1, updates + 1):
        policy = learner.policy()
        behaviour += table.own_reach(policy)[..., None] * policy
        played = table.play(policy, games, generator)
        advantage, baseline = credit(arm, played.reward, played.live, baseline)
        learner.ascend(policy_gradient(advantage, played.cell, policy) / (2 * games))
        wins += (played.reward[:, :, 0].sum(2) > 0).double().mean(1) / updates
        if update in at:
            played_before.append(update * games)
            last.append(table.exploitability(policy))
            mean = behaviour / behaviour.sum(-1, keepdim=True)
            average.append(table.exploitability(mean))
    return Trained(played_before, torch.stack(last), torch.stack(average), wins)
