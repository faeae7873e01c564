"""Small two-player games as tables of their terminal histories (part of the recipe of mars).

OpenSpiel builds a table once; whatever is played, credited, averaged or exploited afterwards is
tensor work over all runs together. Policies are probabilities ``[R, I, A]``; a *cell* is an action
at an information set, ``i A + a``.

Shapes: R runs; H terminal histories; I information sets; A actions; K turns of a seat at most;
M games; two seats.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from normkit.rl.spiel import load_game

Game = Literal["kuhn", "leduc", "loaded"]
GAMES: tuple[Game, ...] = ("kuhn", "leduc", "loaded")
LOADED = 0.9
"""Chance that the first seat holds the higher card of the loaded deck."""


class Played(NamedTuple):
    """Self-play games, both seats.

    Attributes:
        cell: of each turn ``[R, M, 2, K]``.
        reward: of each turn ``[R, M, 2, K]``.
        live: whether the turn happened ``[R, M, 2, K]``.
    """

    cell: Tensor
    reward: Tensor
    live: Tensor


@dataclass(frozen=True)
class Tree:
    """A zero-sum game with perfect recall.

    Attributes:
        chance: probability of the chance events of each history ``[H]``.
        payoff: of both seats at its end ``[H, 2]``.
        cell: of each turn of each seat ``[H, 2, K]``; ``I A`` where there is none.
        legal: whether an information set has an action ``[I, A]``.
        before: cells of the same seat that lead to an information set ``[I, K]``; ``I A`` for none.
        names: of the information sets.
    """

    chance: Tensor
    payoff: Tensor
    cell: Tensor
    legal: Tensor
    before: Tensor
    names: tuple[str, ...]

    @property
    def live(self) -> Tensor:
        """Whether a turn happens ``[H, 2, K]``."""
        return self.cell < self.legal.numel()

    @property
    def reward(self) -> Tensor:
        """Reward of each turn ``[H, 2, K]``: the payoff at a seat's last."""
        last = self.live.sum(2, keepdim=True) - 1 == torch.arange(self.cell.shape[2])
        return self.payoff[..., None] * last

    def uniform(self, runs: int = 1) -> Tensor:
        """The policy that takes all legal actions alike ``[R, I, A]``."""
        legal = self.legal.double()
        return (legal / legal.sum(1, keepdim=True)).expand(runs, -1, -1)

    def reach(self, policy: Tensor) -> Tensor:
        """Probability of every history ``[R, H]``."""
        return self.chance * _take(policy, self.cell.flatten(1)).prod(2)

    def own_reach(self, policy: Tensor) -> Tensor:
        """A seat's own part in reaching its information sets ``[R, I]``."""
        return _take(policy, self.before).prod(2)

    def value(self, policy: Tensor) -> Tensor:
        """Expected payoff of the first seat ``[R]``."""
        return self.reach(policy) @ self.payoff[:, 0]

    def exploitability(self, policy: Tensor) -> Tensor:
        """What best responses gain on average, half of NashConv ``[R]``."""
        return (self._best_response(policy, 0) + self._best_response(policy, 1)) / 2

    def _best_response(self, policy: Tensor, seat: int) -> Tensor:
        """Value of a best response of a seat: its last decisions first, each set on its own."""
        others = _take(policy, self.cell[:, 1 - seat])
        weight = self.chance * self.payoff[:, seat] * others.prod(2)
        runs, cells = policy.shape[0], self.legal.numel()
        for k in reversed(range(self.cell.shape[2])):
            place = self.cell[:, seat, k]
            gain = weight.new_zeros(runs, cells + 1).index_add(1, place, weight)[:, :-1]
            gain = gain.view(policy.shape).masked_fill(~self.legal, -math.inf)
            best = torch.zeros_like(gain).scatter(2, gain.argmax(2, keepdim=True), 1.0)
            weight = weight * _take(best, place[:, None]).squeeze(2)
        return weight.sum(1)

    def expected_gradient(self, credit: Tensor, policy: Tensor) -> Tensor:
        """Expectation of a trajectory's ``sum_k A_k grad log pi``, seats averaged ``[R, I, A]``.

        Args:
            credit: of each turn of each history ``[H, 2, K]``.
            policy: ``[R, I, A]``.
        """
        weight = self.reach(policy)[..., None, None] * credit / 2
        return policy_gradient(weight, self.cell.expand(weight.shape), policy)

    def true_gradient(self, policy: Tensor) -> Tensor:
        """Gradient of each seat's own expected payoff by its own logits, halved ``[R, I, A]``."""
        return self.expected_gradient(self.payoff[..., None].expand(self.cell.shape), policy)

    def play(self, policy: Tensor, games: int, generator: torch.Generator) -> Played:
        """Sample games of all runs; as many random numbers are drawn whatever the policy."""
        edges = self.reach(policy).cumsum(1)
        luck = torch.rand(len(policy), games, generator=generator, dtype=policy.dtype)
        history = torch.searchsorted(edges, luck * edges[:, -1:]).clamp(max=len(self.chance) - 1)
        return Played(self.cell[history], self.reward[history], self.live[history])


def policy_gradient(weight: Tensor, cell: Tensor, policy: Tensor) -> Tensor:
    """Sum of ``weight grad log pi`` over decisions, by the logits of the policy ``[R, I, A]``.

    Args:
        weight: of each decision ``[R, *]``.
        cell: of each decision ``[R, *]``; ``I A`` where there is none.
        policy: ``[R, I, A]``.
    """
    total = weight.new_zeros(len(policy), policy[0].numel() + 1)
    total = total.scatter_add(1, cell.flatten(1), weight.flatten(1))[:, :-1].view(policy.shape)
    return total - policy * total.sum(2, keepdim=True)


def _take(policy: Tensor, cell: Tensor) -> Tensor:
    """Probability of cells ``[R, *cell]``; 1 for the cell that is none."""
    flat = torch.cat([policy.flatten(1), policy.new_ones(len(policy), 1)], 1)
    return flat.index_select(1, cell.flatten()).view(-1, *cell.shape)


@dataclass(frozen=True)
class _Line:
    """A terminal history: its chance events and decisions ``(seat, information set, action)``."""

    dealt: tuple[int, ...]
    chance: float
    decisions: tuple[tuple[int, str, int], ...]
    payoff: tuple[float, float]


@cache
def tree(game: Game) -> Tree:
    """Build a game's table.

    Args:
        game: "kuhn" and "leduc" poker, or "loaded": Kuhn poker whose first seat holds the higher
            card nine times in ten.

    Raises:
        MissingDependencyError: without OpenSpiel.
    """
    root = load_game("leduc_poker" if game == "leduc" else "kuhn_poker")
    lines: list[_Line] = []
    legal: dict[str, list[int]] = {}
    _walk(root.new_initial_state(), _Line((), 1.0, (), (0.0, 0.0)), lines, legal)
    weigh = _load_deck if game == "loaded" else _as_dealt
    return _table(lines, legal, root.num_distinct_actions(), weigh)


def _walk(state: Any, so_far: _Line, lines: list[_Line], legal: dict[str, list[int]]) -> None:
    if state.is_terminal():
        first, second = state.returns()
        lines.append(_Line(so_far.dealt, so_far.chance, so_far.decisions, (first, second)))
    elif state.is_chance_node():
        for outcome, probability in state.chance_outcomes():
            dealt, chance = (*so_far.dealt, outcome), so_far.chance * probability
            line = _Line(dealt, chance, so_far.decisions, so_far.payoff)
            _walk(state.child(outcome), line, lines, legal)
    else:
        seat = state.current_player()
        key = state.information_state_string(seat)
        legal[key] = state.legal_actions()
        for action in legal[key]:
            decisions = (*so_far.decisions, (seat, key, action))
            line = _Line(so_far.dealt, so_far.chance, decisions, so_far.payoff)
            _walk(state.child(action), line, lines, legal)


def _as_dealt(line: _Line) -> float:
    return line.chance


def _load_deck(line: _Line) -> float:
    """Three deals favour each seat; those of a seat stay equally likely."""
    first, second = line.dealt
    return (LOADED if first > second else 1 - LOADED) / 3


def _table(
    lines: list[_Line],
    legal: dict[str, list[int]],
    actions: int,
    weigh: Callable[[_Line], float],
) -> Tree:
    number = {key: i for i, key in enumerate(legal)}
    nowhere = len(legal) * actions
    own = [
        [
            [number[key] * actions + a for s, key, a in line.decisions if s == seat]
            for seat in (0, 1)
        ]
        for line in lines
    ]
    longest = max(len(cells) for pair in own for cells in pair)
    before = torch.full((len(legal), longest), nowhere)
    for pair in own:
        for cells in pair:
            for k, cell in enumerate(cells):
                before[cell // actions, :k] = torch.tensor(cells[:k], dtype=torch.int64)
    mask = torch.zeros(len(legal), actions, dtype=torch.bool)
    for key, allowed in legal.items():
        mask[number[key], allowed] = True
    padded = [[cells + [nowhere] * (longest - len(cells)) for cells in pair] for pair in own]
    return Tree(
        torch.tensor([weigh(line) for line in lines], dtype=torch.float64),
        torch.tensor([line.payoff for line in lines], dtype=torch.float64),
        torch.tensor(padded),
        mask,
        before,
        tuple(legal),
    )
