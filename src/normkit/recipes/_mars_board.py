"""Self-play of tic-tac-toe by position, measured against best play (part of the recipe of mars).

Perfect information and a first mover's edge: a table of all 5,478 positions, a softmax for each.
How often a policy does not lose to an opponent that picks among the best moves is exact.

Shapes: R runs; M games; S positions; 9 moves; K = 5 turns of a seat at most.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from normkit.recipes._mars_gradient import Arm, credit
from normkit.recipes._mars_selfplay import Softmax
from normkit.recipes._mars_tree import Played, policy_gradient
from normkit.rl.self_play import MCTS, play, player
from normkit.rl.spiel import positions

MOVES = 9
TURNS = 5
DRAW = 0.1
"""What both seats earn by a draw."""


@dataclass(frozen=True)
class Board:
    """All positions, in order of the moves made.

    Attributes:
        names: of the positions.
        moves: made before each position ``[S]``.
        child: position after each move ``[S, 9]``; 0, the first, where there is none.
        legal: whether a move is there ``[S, 9]``; all of them at the end of a game.
        over: whether the game is over ``[S]``.
        result: of the first seat at the end ``[S]``: 1, 0 or -1.
        best: uniform over the best moves ``[S, 9]``; 0 at the end of a game.
    """

    names: tuple[str, ...]
    moves: Tensor
    child: Tensor
    legal: Tensor
    over: Tensor
    result: Tensor
    best: Tensor

    def play(self, policy: Tensor, games: int, generator: torch.Generator) -> Played:
        """Games of a policy ``[R, S, 9]`` against itself; a draw pays both seats."""
        runs = torch.arange(len(policy))[:, None]
        edges = policy.cumsum(-1)
        place = torch.zeros(len(policy), games, dtype=torch.int64)
        shape = (len(policy), games, 2, TURNS)
        cell = torch.full(shape, len(self.names) * MOVES)
        reward = torch.zeros(shape, dtype=torch.float64)
        for ply in range(MOVES):
            edge = edges[runs, place]
            luck = torch.rand(*place.shape, 1, generator=generator, dtype=edge.dtype)
            move = (luck * edge[..., -1:] >= edge).sum(-1)
            going = ~self.over[place]
            turn = (..., ply % 2, ply // 2)
            cell[turn] = torch.where(going, place * MOVES + move, cell[turn])
            place = torch.where(going, self.child[place, move], place)
        live = cell < len(self.names) * MOVES
        first = self.result[place]
        paid = torch.stack([first, -first], 2).where((first != 0)[..., None], DRAW)
        last = live.sum(3, keepdim=True) - 1 == torch.arange(TURNS)
        return Played(cell, reward + paid[..., None] * last, live)

    def unbeaten(self, policy: Tensor, seat: int) -> Tensor:
        """Chance not to lose to best play, from a seat ``[R]``: exact."""
        here = torch.zeros(len(policy), len(self.names), dtype=torch.float64)
        here[:, 0] = 1.0
        for ply in range(MOVES):
            at = ((self.moves == ply) & ~self.over).nonzero().squeeze(1)
            moves = policy[:, at] if ply % 2 == seat else self.best[at].expand(len(policy), -1, -1)
            flow = (here[:, at, None] * moves).flatten(1)
            here = here.index_add(1, self.child[at].flatten(), flow)
        lost = self.over & (self.result == (-1 if seat == 0 else 1))
        return 1 - here[:, lost].sum(1)


@cache
def board() -> Board:
    """Walk through all positions."""
    found = positions("tic_tac_toe")
    number = {name: i for i, name in enumerate(found)}
    size, minimax = len(found), player("minimax", "tic_tac_toe")
    child_of = torch.zeros(size, MOVES, dtype=torch.int64)
    legal = torch.zeros(size, MOVES, dtype=torch.bool)
    best = torch.zeros(size, MOVES, dtype=torch.float64)
    for i, state in enumerate(found.values()):
        for action in state.legal_actions():
            legal[i, action] = True
            child_of[i, action] = number[str(state.child(action))]
        if not state.is_terminal():
            for action, chance in minimax(state, state.current_player()).items():
                best[i, action] = chance
    over = ~legal.any(1)
    result = [state.returns()[0] for state in found.values()]
    moves = torch.tensor([state.move_number() for state in found.values()])
    legal |= over[:, None]
    return Board(tuple(found), moves, child_of, legal, over, torch.tensor(result).double(), best)


@dataclass(frozen=True)
class Unbeaten:
    """How often policies do not lose, by seat and run ``[2, R]``.

    Attributes:
        minimax: against best play, exact.
        policy: the policies ``[R, S, 9]``.
    """

    minimax: Tensor
    policy: Tensor


def train(arm: Arm, rates: Tensor, updates: int, games: int, seed: int) -> Unbeaten:
    """Train one policy per learning rate by self-play, all from uniform play.

    Args:
        arm: how turns are credited.
        rates: learning rate of Adam for each run ``[R]``.
        updates: number of updates.
        games: in the batch of an update.
        seed: of all runs together; run r has the same luck with every arm.
    """
    table, learner = board(), Softmax(rates, board().legal)
    generator = torch.Generator().manual_seed(seed)
    baseline = torch.zeros(len(rates), 2, dtype=torch.float64)
    for _ in range(updates):
        policy = learner.policy()
        played = table.play(policy, games, generator)
        advantage, baseline = credit(arm, played.reward, played.live, baseline)
        learner.ascend(policy_gradient(advantage, played.cell, policy) / (2 * games))
    policy = learner.policy()
    return Unbeaten(torch.stack([table.unbeaten(policy, seat) for seat in (0, 1)]), policy)


def unbeaten_by_search(policy: Tensor, seat: int, games: int, simulations: int = 100) -> float:
    """Share of games that a policy ``[S, 9]`` does not lose to tree search, from a seat."""
    rows = dict(zip(board().names, policy.tolist(), strict=True))

    def ours(state: Any, _: int) -> Mapping[int, float]:
        row = rows[str(state)]
        return {action: row[action] for action in state.legal_actions()}

    kept = 0
    for number in range(games):
        search = MCTS(simulations, number)
        players = (ours, search) if seat == 0 else (search, ours)
        kept += play("tic_tac_toe", players, number)[seat] >= 0
    return kept / games
