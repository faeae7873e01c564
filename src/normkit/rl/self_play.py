"""Small games of OpenSpiel: players that are no language models, and how good a policy is.

MARS: Reinforcing Multi-Agent Reasoning of LLMs through Self-Play in Strategic Games (Yuan et al.,
2025), arXiv 2510.15414: the games and fixed opponents of its section 4.

A *policy* is any callable that takes a state of OpenSpiel and a seat, and returns the probabilities
of the legal actions: ``action_probabilities`` of OpenSpiel's own policies, a table of a trained
softmax policy, a language model, or one of the players below.

Differences from the authors' code: their opponent in Leduc poker is a stored table, ours the
average policy of CFR+; their tree search may be given games with hidden cards, which it sees
through, ours may not.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, TypeAlias

import numpy as np

from normkit.errors import InputError
from normkit.files import write_json
from normkit.rl.models import cache_folder
from normkit.rl.spiel import (
    check_small,
    deal,
    hides,
    information_states,
    is_small,
    load_game,
    opening,
)
from normkit.statistics import Interval, bootstrap_interval

Policy: TypeAlias = Callable[[Any, int], Mapping[int, float]]

_MOST_POSITIONS = 100_000
_MOST_MOVES = 12
_ROUNDING = 1e-4


def ask(policy: Policy, state: Any, seat: int) -> dict[int, float]:
    """What a policy would do: a probability for every legal action, those it leaves out at 0.

    Raises:
        InputError: where it names an action that is not legal, or its probabilities are negative,
            not finite or do not sum to 1.
    """
    chances, legal = policy(state, seat), state.legal_actions(seat)
    total = math.fsum(chances.values())
    fits = abs(total - 1) < _ROUNDING and min(chances.values()) >= 0
    if not fits or not chances.keys() <= set(legal):
        raise InputError(
            f"policy: the probabilities of the legal actions {legal} must sum to 1, "
            f"got {dict(chances)} at {state.history_str()!r}"
        )
    return {action: chances.get(action, 0.0) / total for action in legal}


def draw(chances: Mapping[int, float], numbers: np.random.Generator) -> int:
    """Sample an action of a policy's answer."""
    weights = np.array(list(chances.values()), dtype=np.float64)
    return int(numbers.choice(list(chances), p=weights / weights.sum()))


# ---------------------------------------------------------------------- players


def uniform(state: Any, seat: int) -> dict[int, float]:
    """Play every legal action with the same probability."""
    actions = state.legal_actions(seat)
    return dict.fromkeys(actions, 1.0 / len(actions))


@dataclass(frozen=True)
class Tabular:
    """A policy that is written down: the probabilities of each information state's actions.

    Attributes:
        table: probability by action, by information state as OpenSpiel writes it.
    """

    table: Mapping[str, Mapping[int, float]]

    def __call__(self, state: Any, seat: int) -> Mapping[int, float]:
        """Probabilities of the legal actions; all the same where the state is not written down."""
        found = self.table.get(state.information_state_string(seat))
        return uniform(state, seat) if found is None else found


@dataclass(frozen=True)
class MCTS:
    """Monte-Carlo tree search with random rollouts; its move is a function of the moves so far.

    For games with open cards: it searches the whole state, what others hold included.

    Attributes:
        simulations: of each move.
        seed: of the search.
        uct_c: weight of exploration.
        rollouts: random games that a leaf is weighed by.
    """

    simulations: int = 100
    seed: int = 0
    uct_c: float = 2.0
    rollouts: int = 10

    def __call__(self, state: Any, seat: int) -> dict[int, float]:
        """The move that was visited most, with probability 1."""
        import pyspiel

        game = state.get_game()
        mixed = np.random.SeedSequence([self.seed, *state.history()]).generate_state(2) >> 1
        evaluator = pyspiel.RandomRolloutEvaluator(self.rollouts, int(mixed[0]))
        bot = pyspiel.MCTSBot(
            game, evaluator, self.uct_c, self.simulations, 64, False, int(mixed[1]), False
        )
        return {int(bot.step(state)): 1.0}


_Values: TypeAlias = dict[tuple[str, int], float]


@dataclass(frozen=True)
class Minimax:
    """Exact play of small games for two without chance or hidden cards: the best moves."""

    _games: dict[str, _Values] = field(default_factory=dict, repr=False)

    def __call__(self, state: Any, seat: int) -> dict[int, float]:
        """Probabilities of the best moves.

        Raises:
            InputError: where the game does not suit (:func:`can_play`), or has more than 100,000
                positions.
        """
        values = {action: self.value(state.child(action)) for action in state.legal_actions()}
        sign = 1.0 if seat == 0 else -1.0
        best = max(sign * value for value in values.values())
        moves = [action for action, value in values.items() if sign * value == best]
        return dict.fromkeys(moves, 1.0 / len(moves))

    def value(self, state: Any) -> float:
        """What seat 0 gets from a position under the best play of both."""
        game = str(state.get_game())
        if game not in self._games:
            check_player("minimax", game)
            self._games[game] = {}
        return _value(state, self._games[game])


def _value(state: Any, known: _Values) -> float:
    """Value of a position to seat 0; what is found goes to ``known``."""
    if state.is_terminal():
        return float(state.returns()[0])
    seat = state.current_player()
    key = (str(state), seat)
    if key not in known:
        if len(known) >= _MOST_POSITIONS:
            raise InputError(f"minimax: the game has more than {_MOST_POSITIONS:,} positions")
        outcomes = [_value(state.child(action), known) for action in state.legal_actions()]
        known[key] = max(outcomes) if seat == 0 else min(outcomes)
    return known[key]


def cfr(game: str, iterations: int = 100, plus: bool = True) -> Tabular:
    """Average policy of counterfactual regret minimization, close to an equilibrium.

    Args:
        game: name of a game with information states; kept in the cache folder once computed.
        iterations: of the solver. 100 of CFR+ leave Leduc poker an exploitability of 0.013 chips.
        plus: CFR+ instead of CFR.

    Raises:
        InputError: where the game does not suit (:func:`can_play`), or there are no iterations.
    """
    check_player("cfr", game)
    if iterations < 1:
        raise InputError(f"iterations must be at least 1, got {iterations}")
    return _solve(game, iterations, plus)


@lru_cache(maxsize=16)
def _solve(name: str, iterations: int, plus: bool) -> Tabular:
    import pyspiel

    game = load_game(name)
    spelled = "".join(c if c.isalnum() else "-" for c in str(game))
    kept = Path(cache_folder(), "games", f"{'cfr-plus' if plus else 'cfr'}-{spelled}-{iterations}")
    path = kept.with_name(kept.name + ".json")
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        solver = (pyspiel.CFRPlusSolver if plus else pyspiel.CFRSolver)(game)
        for _ in range(iterations):
            solver.evaluate_and_update_policy()
        stored = solver.tabular_average_policy().policy_table()
        write_json(path, stored)
    return Tabular({key: {int(a): float(p) for a, p in row} for key, row in stored.items()})


def player(name: str, game: str, seed: int = 0) -> Policy:
    """A fixed player by name.

    Args:
        name: "random", "mcts" (100 simulations), "mcts-N", "cfr" or "minimax".
        game: name of the game.
        seed: of a tree search.

    Raises:
        InputError: for another name, or a player that cannot play the game.
    """
    check_player(name, game)
    if name.startswith("mcts"):
        return MCTS(int(name.partition("-")[2] or 100), seed)
    if name == "cfr":
        return cfr(game)
    return _minimax() if name == "minimax" else uniform


@lru_cache(maxsize=1)
def _minimax() -> Minimax:
    return Minimax()


def check_player(name: str, game: str) -> None:
    """Check that a player suits a game.

    Raises:
        InputError: where it does not, or there is no player of that name.
    """
    if not can_play(name, game):
        raise InputError(f"opponent: {name} cannot play {game}")


def can_play(name: str, game: str) -> bool:
    """Whether a player of :func:`player` suits a game.

    Tree search and minimax need open cards and opposed players (minimax two, no chance and at most
    12 moves), CFR opposed players, information states of hidden cards and a tree that can be gone
    through (:func:`normkit.rl.spiel.is_small`).

    Raises:
        InputError: where there is no player of that name.
    """
    if re.fullmatch(r"random|cfr|minimax|mcts(-[1-9]\d{0,6})?", name) is None:
        raise InputError(f"opponent must be random, mcts, mcts-N, cfr or minimax, got {name!r}")
    loaded = load_game(game)
    kind = loaded.get_type()
    if name == "random":
        return True
    if kind.utility.name != "ZERO_SUM":
        return False
    if name == "cfr":
        told = hides(loaded) and bool(kind.provides_information_state_string)
        return told and is_small(game)
    if name == "minimax":
        return not hides(loaded) and _is_short_duel(loaded)
    return not hides(loaded)


def _is_short_duel(game: Any) -> bool:
    sure = game.get_type().chance_mode.name == "DETERMINISTIC" and game.num_players() == 2
    return bool(sure and game.max_game_length() <= _MOST_MOVES)


# ---------------------------------------------------------------------- how good a policy is


def play(game: str, players: Sequence[Policy], seed: int) -> list[float]:
    """Play one game to its end.

    Args:
        game: name of the game.
        players: one policy per seat.
        seed: of chance and of the players' choices.

    Returns:
        What each seat got.

    Raises:
        InputError: for another number of players than the game has, or a policy that does not
            answer with probabilities of its legal actions.
    """
    _check_seats(players, game)
    state, numbers = opening(game, seed)
    while not state.is_terminal():
        seat = state.current_player()
        state.apply_action(draw(ask(players[seat], state, seat), numbers))
        deal(state, numbers)
    return [float(value) for value in state.returns()]


def _check_seats(players: Sequence[Policy], game: str) -> None:
    count = load_game(game).num_players()
    if len(players) != count:
        raise InputError(
            f"players must be {count}, one for each seat of {game}, got {len(players)}"
        )


def evaluate(
    policy: Policy,
    game: str,
    opponent: Policy | str = "random",
    seats: Literal["both"] | Sequence[int] = "both",
    games: int = 100,
    seed: int = 0,
) -> dict[int, Interval]:
    """Mean return of a policy against a fixed opponent, seat by seat, with 95% intervals.

    Args:
        policy: what is judged.
        game: name of the game.
        opponent: who has all other seats: a policy, or a name of :func:`player`.
        seats: the seats to judge the policy in; "both" stands for all.
        games: games per seat; every seat meets the same deals.
        seed: of the first game, the others follow.

    Returns:
        A bootstrap interval by seat.
    """
    count = load_game(game).num_players()
    chosen = range(count) if seats == "both" else seats
    if games < 1 or any(seat not in range(count) for seat in chosen):
        raise InputError(f"seats must be within 0 to {count - 1} and games at least 1")
    found = {}
    for seat in chosen:
        returns = []
        for number in range(seed, seed + games):
            other = player(opponent, game, number) if isinstance(opponent, str) else opponent
            players = [policy if place == seat else other for place in range(count)]
            returns.append(play(game, players, number)[seat])
        found[seat] = bootstrap_interval(returns)
    return found


def expected_returns(players: Sequence[Policy], game: str) -> list[float]:
    """What each seat gets on average: exact, over the whole tree of a small game.

    Raises:
        InputError: as :func:`play`, or where the game is not small.
    """
    _check_seats(players, game)
    check_small(game)
    total = [0.0] * len(players)
    stack = [(load_game(game).new_initial_state(), 1.0)]
    while stack:
        state, reach = stack.pop()
        if state.is_terminal():
            total = [t + reach * value for t, value in zip(total, state.returns(), strict=True)]
            continue
        if state.is_chance_node():
            chances = dict(state.chance_outcomes())
        else:
            seat = state.current_player()
            chances = ask(players[seat], state, seat)
        stack += [(state.child(action), reach * p) for action, p in chances.items() if p > 0]
    return total


def tabulate(policy: Policy, game: str) -> Tabular:
    """Write a policy down: asked once at every information state of a small game."""
    found = information_states(game).items()
    return Tabular({text: ask(policy, state, state.current_player()) for text, state in found})


def exploitability(policy: Policy, game: str) -> float:
    """How much a best response wins on average over the seats, beyond what they have: exact.

    ``NashConv / n``: the sum over the n seats of ``best response - own value``, divided by n; 0 at
    an equilibrium. Uniform play has 11/24 in Kuhn poker and 2.373611 in Leduc poker.

    Args:
        policy: plays all seats.
        game: name of a small game with information states.

    Raises:
        InputError: where the game is not small or has none, or the policy does not answer with
            probabilities of its legal actions.
    """
    import pyspiel

    table = {text: list(row.items()) for text, row in tabulate(policy, game).table.items()}
    loaded = load_game(game)
    written = pyspiel.TabularPolicy(table)
    return float(pyspiel.nash_conv(loaded, written)) / int(loaded.num_players())
