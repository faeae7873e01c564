"""Games of OpenSpiel: their names, their chance, their trees."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import lru_cache
from itertools import islice
from typing import Any

import numpy as np

from normkit.errors import InputError, MissingDependencyError

_HANABI = (
    "hanabi(players=2,colors={},ranks={},hand_size={},max_information_tokens={},max_life_tokens=3)"
)
GAMES: Mapping[str, str] = {
    "tic_tac_toe": "tic_tac_toe",
    "kuhn_poker": "kuhn_poker",
    "mini_hanabi": _HANABI.format(2, 2, 3, 3),
    "connect_four": "connect_four",
    "leduc_poker": "leduc_poker",
    "simple_hanabi": _HANABI.format(3, 2, 5, 8),
}
"""Our names of the paper's games, as OpenSpiel spells them."""

_MOST_DEALS = 64
_MOST_HISTORIES = 500_000


def load_game(name: str) -> Any:
    """Load a game by a name of :data:`GAMES` or of OpenSpiel, such as ``"hex(board_size=3)"``.

    Raises:
        InputError: where there is no such game, or its players do not move one after another.
        MissingDependencyError: without OpenSpiel.
    """
    try:
        import pyspiel
    except ImportError:
        raise MissingDependencyError("open_spiel", "games") from None
    spelled = GAMES.get(name, name)
    if spelled.partition("(")[0] not in pyspiel.registered_names():
        raise InputError(f"game must be one of {', '.join(GAMES)} or OpenSpiel's, got {name!r}")
    try:
        game = pyspiel.load_game(spelled)
    except pyspiel.SpielError:
        raise InputError(f"game: OpenSpiel cannot play {name!r} with these settings") from None
    dynamics = game.get_type().dynamics
    if dynamics != pyspiel.GameType.Dynamics.SEQUENTIAL:
        at_once = dynamics == pyspiel.GameType.Dynamics.SIMULTANEOUS
        instead = f", as in 'turn_based_simultaneous_game(game={game})'" if at_once else ""
        raise InputError(f"game: the players of {name!r} must move one after another{instead}")
    return game


def hides(game: Any) -> bool:
    """Whether players of a game see less than there is."""
    return bool(game.get_type().information.name == "IMPERFECT_INFORMATION")


@lru_cache(maxsize=64)
def _deals(name: str) -> tuple[tuple[int, ...], ...]:
    """The opening deals of a game where they are few and equally likely, else none."""
    found: dict[tuple[int, ...], float] = {}
    open_ = [(load_game(name).new_initial_state(), 1.0)]
    while open_:
        state, reach = open_.pop()
        if not state.is_chance_node():
            found[tuple(state.history())] = reach
            continue
        open_ += [(state.child(a), reach * p) for a, p in reversed(state.chance_outcomes())]
        if len(found) + len(open_) > _MOST_DEALS:
            return ()
    return tuple(found) if np.ptp(list(found.values())) < 1e-9 else ()


def opening(name: str, seed: int) -> tuple[Any, np.random.Generator]:
    """A game at its first decision, and the random numbers that it goes on with.

    Where there are at most 64 opening deals, all equally likely, consecutive seeds meet each of
    them in turn (the six of Kuhn poker: seed mod 6).
    """
    state = load_game(name).new_initial_state()
    numbers = np.random.default_rng([seed, 1])
    if deals := _deals(name):
        for action in deals[seed % len(deals)]:
            state.apply_action(action)
    deal(state, numbers)
    return state, numbers


def deal(state: Any, numbers: np.random.Generator) -> None:
    """Let chance move until it is a player's turn or the game is over."""
    while state.is_chance_node():
        actions, shares = zip(*state.chance_outcomes(), strict=True)
        state.apply_action(int(numbers.choice(actions, p=np.divide(shares, sum(shares)))))


def histories(game: str) -> Iterator[Any]:
    """Every history of a game, from the root on: chance, decisions and ends."""
    stack = [load_game(game).new_initial_state()]
    while stack:
        state = stack.pop()
        yield state
        stack += [state.child(action) for action in reversed(state.legal_actions())]


def states(game: str) -> Iterator[Any]:
    """Every history of a game at which a player is to move."""
    return (state for state in histories(game) if state.current_player() >= 0)


def positions(game: str) -> Mapping[str, Any]:
    """Every position of a small game without chance, by its text, in order of the moves made."""
    root = load_game(game).new_initial_state()
    found = {str(root): root}
    queue = [root]
    for state in queue:
        for action in state.legal_actions():
            child = state.child(action)
            if found.setdefault(str(child), child) is child:
                queue.append(child)
    return found


@lru_cache(maxsize=64)
def is_small(game: str) -> bool:
    """Whether a game has at most 500,000 histories, so that all of them can be gone through."""
    return sum(1 for _ in islice(histories(game), _MOST_HISTORIES + 1)) <= _MOST_HISTORIES


def check_small(game: str) -> None:
    """Check that all histories of a game can be gone through (:func:`is_small`).

    Raises:
        InputError: where they are too many.
    """
    if not is_small(game):
        raise InputError(f"game: {game!r} must have at most {_MOST_HISTORIES:,} histories")


@lru_cache(maxsize=8)
def information_states(game: str) -> Mapping[str, Any]:
    """The first history of every information state of a small game, by its text.

    Raises:
        InputError: where the game has no information states, or is not small.
    """
    if not load_game(game).get_type().provides_information_state_string:
        raise InputError(f"game: {game!r} has no information states")
    check_small(game)
    found: dict[str, Any] = {}
    for state in states(game):
        found.setdefault(state.information_state_string(state.current_player()), state)
    return found
