"""Self-play in Mini Hanabi, where both seats earn every point (part of the recipe of mars).

Two colours, two ranks, hands of three, three hints and three lives; at best 4 points. One small
network plays both seats from what each sees. OpenSpiel keeps the rules; all games of all runs move
at once, so that the network is called once a move.

Shapes: R runs; M games; B = R M; K turns of a seat; F numbers of an observation; A actions.
"""

from __future__ import annotations

from dataclasses import dataclass
from random import Random
from typing import Any

import numpy as np
import torch
from torch import Tensor

from normkit.recipes._mars_gradient import Arm, credit
from normkit.rl.spiel import load_game

HIDDEN = 32


@dataclass(frozen=True)
class Decisions:
    """What every turn of a batch of games saw, could do, did and earned.

    Attributes:
        seen: observation ``[R, M, 2, K, F]``.
        legal: allowed actions ``[R, M, 2, K, A]``.
        chosen: action ``[R, M, 2, K]``.
        reward: points until the seat's next turn ``[R, M, 2, K]``.
        live: whether the turn happened ``[R, M, 2, K]``.
    """

    seen: Tensor
    legal: Tensor
    chosen: Tensor
    reward: Tensor
    live: Tensor

    @property
    def score(self) -> Tensor:
        """Points of each game ``[R, M]``: the first seat waits from the first move on."""
        return self.reward[:, :, 0].sum(2)


class Players:
    """A network for each run, whose parameters differ by run: ``theta_0 + rate * weight``."""

    def __init__(self, rates: Tensor, generator: torch.Generator) -> None:
        """Draw the networks.

        Args:
            rates: learning rate of each run ``[R]``.
            generator: of the first layer; the second begins at zero, that is, with uniform play.
        """
        runs, game = len(rates), load_game("mini_hanabi")
        features, actions = game.observation_tensor_shape()[0], game.num_distinct_actions()
        self.scale = rates.view(-1, 1, 1).float()
        first = torch.randn(runs, features + 1, HIDDEN, generator=generator) / features**0.5
        self.start = (first, torch.zeros(runs, HIDDEN + 1, actions))
        self.weight = [torch.zeros_like(x).requires_grad_() for x in self.start]
        self.adam = torch.optim.Adam(self.weight, lr=1.0, maximize=True)

    def log_policy(self, seen: Tensor, legal: Tensor) -> Tensor:
        """Log-probabilities ``[R, *, A]`` of observations ``[R, *, F]``."""
        first, second = (s + self.scale * w for s, w in zip(self.start, self.weight, strict=True))
        hidden = torch.tanh(seen @ first[:, :-1] + first[:, -1:])
        logits: Tensor = hidden @ second[:, :-1] + second[:, -1:]
        return logits.masked_fill(~legal, -1e9).log_softmax(-1)


def play(players: Players, games: int, luck: Random) -> Decisions:
    """Play games of all runs to their end."""
    game = load_game("mini_hanabi")
    runs, actions = len(players.scale), game.num_distinct_actions()
    longest = game.max_game_length() // 2 + 1
    shape = (runs * games, 2, longest)
    seen = np.zeros((*shape, game.observation_tensor_shape()[0]), dtype=np.float32)
    legal = np.zeros((*shape, actions), dtype=bool)
    chosen = np.zeros(shape, dtype=np.int64)
    reward = np.zeros(shape)
    turns = np.zeros((runs * games, 2), dtype=np.int64)
    states = [game.new_initial_state() for _ in range(runs * games)]
    for state in states:
        _deal(state, luck)
    moving = list(range(len(states)))
    while moving:
        seats = [states[b].current_player() for b in moving]
        at = (moving, seats, turns[moving, seats])
        now = np.zeros((runs * games, seen.shape[-1]), dtype=np.float32)
        can = np.zeros((runs * games, actions), dtype=bool)
        now[moving] = [states[b].observation_tensor(p) for b, p in zip(moving, seats, strict=True)]
        can[moving] = [states[b].legal_actions_mask() for b in moving]
        seen[at], legal[at] = now[moving], can[moving]
        policy = players.log_policy(*_by_run(runs, now, can)).exp().flatten(0, 1)
        edges = policy.detach().numpy().cumsum(1)
        drawn = np.array([luck.random() for _ in range(runs * games)])[:, None]
        action = (drawn * edges[:, -1:] >= edges).sum(1)
        chosen[at] = action[moving]
        turns[moving, seats] += 1
        points = np.zeros(len(states))
        for b in moving:
            states[b].apply_action(int(action[b]))
            points[b] = states[b].rewards()[0]
            _deal(states[b], luck)
        game_, seat = np.nonzero(turns)  # whose turn is over waits for what the other brings
        reward[game_, seat, turns[game_, seat] - 1] += points[game_]
        moving = [b for b in moving if not states[b].is_terminal()]
    live = np.arange(longest) < turns[..., None]
    return Decisions(*_by_run(runs, seen, legal, chosen, reward, live))


def _deal(state: Any, luck: Random) -> None:
    while state.is_chance_node():
        outcomes, chances = zip(*state.chance_outcomes(), strict=True)
        state.apply_action(luck.choices(outcomes, chances)[0])


def _by_run(runs: int, *arrays: Any) -> list[Tensor]:
    return [torch.from_numpy(x).view(runs, -1, *x.shape[1:]) for x in arrays]


def train(
    arm: Arm, rates: Tensor, updates: int, games: int, seed: int, zero_sum: bool = False
) -> Tensor:
    """Train one network per learning rate by self-play.

    Args:
        arm: how turns are credited.
        rates: learning rate of Adam for each run ``[R]``.
        updates: number of updates.
        games: in the batch of an update.
        seed: of all runs together.
        zero_sum: credit the second seat with the opposite of its points, as the zero-sum games
            that SPIRAL was made for would.

    Returns:
        Mean score of the training games ``[updates, R]``.
    """
    players = Players(rates, torch.Generator().manual_seed(seed))
    luck = Random(seed)
    baseline = torch.zeros(len(rates), 2, dtype=torch.float64)
    sign = torch.tensor([1.0, -1.0 if zero_sum else 1.0], dtype=torch.float64)
    scores = []
    for _ in range(updates):
        turns = play(players, games, luck)
        scores.append(turns.score.mean(1))
        reward = turns.reward * sign[:, None]
        advantage, baseline = credit(arm, reward, turns.live, baseline)
        seen, legal, chosen, credited = (
            x.flatten(1, 3) for x in (turns.seen, turns.legal, turns.chosen, advantage)
        )
        used = turns.live.flatten(1)
        log_policy = players.log_policy(seen, legal | ~used[..., None])
        taken = log_policy.gather(2, chosen[..., None]).squeeze(2)
        players.adam.zero_grad()
        gain = (taken * credited.float()).sum() / (2 * games)
        torch.autograd.backward(gain)
        players.adam.step()
    return torch.stack(scores)
