"""Players of small games, and how good policies are: worked numbers and laws."""

from __future__ import annotations

import math

import numpy as np
import pytest

pyspiel = pytest.importorskip("pyspiel")

from normkit.errors import InputError, MissingDependencyError  # noqa: E402
from normkit.rl.self_play import (  # noqa: E402
    MCTS,
    Minimax,
    Tabular,
    can_play,
    cfr,
    draw,
    evaluate,
    expected_returns,
    exploitability,
    play,
    player,
    tabulate,
    uniform,
)
from normkit.rl.spiel import (  # noqa: E402
    GAMES,
    information_states,
    load_game,
    opening,
    states,
)


@pytest.fixture(autouse=True)
def _cache(tmp_path, monkeypatch):
    monkeypatch.setenv("NORMKIT_CACHE", str(tmp_path))


def test_exploitability_of_uniform_play():
    # Card of MARS, computed with open_spiel 2.0.2.
    assert exploitability(uniform, "kuhn_poker") == pytest.approx(11 / 24, abs=1e-12)
    assert exploitability(uniform, "leduc_poker") == pytest.approx(2.373611, abs=1e-6)
    three = exploitability(uniform, "kuhn_poker(players=3)")
    game = load_game("kuhn_poker(players=3)")
    reference = pyspiel.nash_conv(game, pyspiel.UniformRandomPolicy(game)) / 3
    assert three == pytest.approx(reference, abs=1e-12)


def kuhn_equilibrium(alpha):
    """Kuhn (1950): seat 0 bets a jack with probability alpha, a king with 3 alpha."""
    bets = {"0": alpha, "1": 0, "2": 3 * alpha, "0pb": 0, "1pb": alpha + 1 / 3, "2pb": 1}
    bets |= {"0p": 1 / 3, "1p": 0, "2p": 1, "0b": 0, "1b": 1 / 3, "2b": 1}
    return Tabular({state: {0: 1 - p, 1: p} for state, p in bets.items()})


@pytest.mark.parametrize("alpha", [0.0, 0.1, 1 / 3])
def test_the_equilibria_of_kuhn_poker(alpha):
    policy = kuhn_equilibrium(alpha)
    assert exploitability(policy, "kuhn_poker") == pytest.approx(0, abs=1e-12)
    assert expected_returns([policy] * 2, "kuhn_poker") == pytest.approx([-1 / 18, 1 / 18])


def test_a_policy_may_leave_out_what_it_never_does():
    def bold(state, seat):
        return {1: 1.0}

    whole = exploitability(lambda s, p: {0: 0.0, 1: 1.0}, "kuhn_poker")
    assert exploitability(bold, "kuhn_poker") == whole
    # Both always put in two chips: the dealt cards decide, evenly.
    assert expected_returns([bold, bold], "kuhn_poker") == pytest.approx([0, 0], abs=1e-12)
    # The best response folds a jack for 1 and calls or bets a king for 2; a queen is even:
    # each seat gains (-1 + 0 + 2) / 3.
    assert whole == pytest.approx(1 / 3)


def test_cfr_comes_close_to_an_equilibrium():
    # Card of MARS: 500 iterations of CFR give value -.055688 and exploitability .00117.
    policy = cfr("kuhn_poker", 500, plus=False)
    assert expected_returns([policy] * 2, "kuhn_poker")[0] == pytest.approx(-0.055688, abs=1e-6)
    assert exploitability(policy, "kuhn_poker") == pytest.approx(0.00117, abs=1e-5)
    assert exploitability(cfr("kuhn_poker", 1000), "kuhn_poker") < 1e-4


def test_cfr_is_computed_once(tmp_path):
    cfr.__globals__["_solve"].cache_clear()
    policy = cfr("kuhn_poker", 20)
    (path,) = (tmp_path / "games").iterdir()
    written = path.read_bytes()
    cfr.__globals__["_solve"].cache_clear()
    assert cfr("kuhn_poker", 20) == policy
    assert path.read_bytes() == written
    path.write_text("{ half a fi")
    cfr.__globals__["_solve"].cache_clear()
    assert cfr("kuhn_poker", 20) == policy


def test_counts_of_states():
    # Card of MARS: 12 and 936 information states, 5,478 positions of tic-tac-toe.
    assert len(information_states("kuhn_poker")) == 12
    assert len(information_states("leduc_poker")) == 936
    solver = Minimax()
    empty = load_game("tic_tac_toe").new_initial_state()
    assert solver.value(empty) == 0
    seen, stack = set(), [empty]
    while stack:
        state = stack.pop()
        if str(state) not in seen:
            seen.add(str(state))
            if not state.is_terminal():
                stack += [state.child(a) for a in state.legal_actions()]
    assert len(seen) == 5478
    # The solver keeps what is not over: 958 positions are.
    (known,) = solver._games.values()
    assert {text for text, _ in known} < seen
    assert len(known) == 5478 - 958


def test_minimax_never_loses_and_wins_where_it_can():
    best = Minimax()
    for game_seed in range(20):
        assert play("tic_tac_toe", [best, uniform], game_seed)[0] >= 0
        assert play("tic_tac_toe", [uniform, best], game_seed)[1] >= 0
        assert play("tic_tac_toe", [best, best], game_seed) == [0, 0]
    state = load_game("tic_tac_toe").new_initial_state()
    for action in (0, 4, 1, 8):
        state.apply_action(action)
    # x takes the top row, or threatens it and the left column at once.
    assert best(state, 0) == dict.fromkeys((2, 3, 6), pytest.approx(1 / 3))


def test_minimax_keeps_games_apart_that_look_alike():
    moves, found = (0, 4, 1, 8), []
    for order in (("tic_tac_toe", "misere(game=tic_tac_toe())"), ("misere(game=tic_tac_toe())",)):
        solver = Minimax()
        for game in order:
            state = load_game(game).new_initial_state()
            for action in moves:
                state.apply_action(action)
            found.append(solver(state, 0))
    assert found[1] == found[2]
    # Three moves win; where three in a row lose, all five do, and are the same.
    assert [sorted(row) for row in found] == [[2, 3, 6], *[[2, 3, 5, 6, 7]] * 2]


def test_tree_search_is_a_function_of_seed_and_moves():
    state = load_game("connect_four").new_initial_state()
    for action in (3, 3, 2):
        state.apply_action(action)
    assert MCTS(50, 1)(state, 1) == MCTS(50, 1)(state, 1)
    (action,) = MCTS(200)(state, 1)
    assert action in state.legal_actions()
    # A win in one move is seen.
    state = load_game("tic_tac_toe").new_initial_state()
    for action in (0, 4, 1, 8):
        state.apply_action(action)
    assert [MCTS(100, seed)(state, 0) for seed in range(5)] == [{2: 1.0}] * 5


@pytest.mark.parametrize("game", [*GAMES, "kuhn_poker(players=3)", "hex(board_size=3)"])
def test_returns_of_random_play(game):
    loaded = load_game(game)
    shared = "hanabi" in game
    for seed in range(30):
        returns = play(game, [uniform] * loaded.num_players(), seed)
        if shared:
            assert len(set(returns)) == 1
            assert 0 <= returns[0] <= loaded.max_utility()
        else:
            assert sum(returns) == pytest.approx(0, abs=1e-12)
        assert returns == play(game, [uniform] * loaded.num_players(), seed)


def test_consecutive_seeds_meet_every_deal():
    deals = {tuple(opening("kuhn_poker", seed)[0].history()) for seed in range(7, 13)}
    assert len(deals) == 6
    deals = {tuple(opening("leduc_poker", seed)[0].history()) for seed in range(30)}
    assert len(deals) == 30
    hands = {tuple(opening("mini_hanabi", seed)[0].history()) for seed in range(40)}
    assert len(hands) > 30


def test_deals_that_are_not_equally_likely_are_drawn(monkeypatch):
    class Deal:
        """One card of two; after the first of them one more of two."""

        def __init__(self, cards=()):
            self.cards = cards

        def is_chance_node(self):
            return self.cards in ((), (0,))

        def chance_outcomes(self):
            return [(0, 0.5), (1, 0.5)]

        def child(self, action):
            return Deal((*self.cards, action))

        def history(self):
            return list(self.cards)

        def apply_action(self, action):
            self.cards = (*self.cards, action)

        def new_initial_state(self):
            return Deal()

    monkeypatch.setattr("normkit.rl.spiel.load_game", lambda name: Deal())
    dealt = [opening("uneven", seed)[0].cards for seed in range(300)]
    assert set(dealt) == {(1,), (0, 0), (0, 1)}
    assert dealt.count((1,)) / 300 == pytest.approx(0.5, abs=0.1)


def test_expected_returns_are_the_mean_over_all_deals_and_choices():
    exact = expected_returns([uniform, cfr("kuhn_poker")], "kuhn_poker")
    sampled = np.mean([play("kuhn_poker", [uniform, cfr("kuhn_poker")], s) for s in range(3000)], 0)
    assert exact == pytest.approx(sampled.tolist(), abs=5 * 1.5 / math.sqrt(3000))
    assert sum(exact) == pytest.approx(0, abs=1e-12)


def test_evaluate_gives_an_interval_a_seat():
    found = evaluate(Minimax(), "tic_tac_toe", "random", games=40, seed=3)
    assert list(found) == [0, 1]
    assert all(interval.n == 40 and interval.low >= 0.3 for interval in found.values())
    assert found[0].mean > found[1].mean
    assert found == evaluate(Minimax(), "tic_tac_toe", "random", games=40, seed=3)
    assert list(evaluate(uniform, "kuhn_poker(players=3)", games=5)) == [0, 1, 2]
    only = evaluate(uniform, "kuhn_poker", "cfr", seats=[1], games=200)
    exact = expected_returns([cfr("kuhn_poker"), uniform], "kuhn_poker")[1]
    assert list(only) == [1]
    assert only[1].low <= exact <= only[1].high


def test_a_policy_of_openspiel_fits():
    from open_spiel.python import policy

    theirs = policy.UniformRandomPolicy(load_game("kuhn_poker"))
    assert exploitability(theirs.action_probabilities, "kuhn_poker") == pytest.approx(11 / 24)
    table = tabulate(uniform, "kuhn_poker")
    assert exploitability(table, "kuhn_poker") == pytest.approx(11 / 24)
    assert exploitability(Tabular({}), "kuhn_poker") == pytest.approx(11 / 24)


def test_who_can_play_what():
    suits = {
        (name, game)
        for name in ("mcts", "cfr", "minimax")
        for game in GAMES
        if can_play(name, game)
    }
    assert suits == {
        ("mcts", "tic_tac_toe"),
        ("mcts", "connect_four"),
        ("minimax", "tic_tac_toe"),
        ("cfr", "kuhn_poker"),
        ("cfr", "leduc_poker"),
    }
    assert all(can_play("random", game) for game in GAMES)
    assert can_play("minimax", "hex(board_size=3)")
    assert not can_play("minimax", "pig")
    assert not can_play("cfr", "phantom_ttt")  # too large a tree
    assert player("mcts-7", "tic_tac_toe", 5) == MCTS(7, 5)
    assert player("random", "mini_hanabi") is uniform


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: load_game("checkers with dragons"), "game must be one of tic_tac_toe"),
        (lambda: load_game("matrix_rps"), "one after another"),
        (lambda: load_game("kuhn_poker(players=99)"), "with these settings"),
        (lambda: player("mcts", "kuhn_poker"), "mcts cannot play kuhn_poker"),
        (lambda: player("mcts-0", "tic_tac_toe"), "mcts-N"),
        (lambda: player("alpha-zero", "tic_tac_toe"), "opponent must be"),
        (lambda: cfr("tic_tac_toe"), "cfr cannot play tic_tac_toe"),
        (lambda: exploitability(uniform, "mini_hanabi"), "no information states"),
        (lambda: exploitability(lambda s, p: {0: 0.2, 1: 0.2}, "kuhn_poker"), "sum to 1"),
        (lambda: exploitability(lambda s, p: {0: 2.0, 1: -1.0}, "kuhn_poker"), "sum to 1"),
        (lambda: exploitability(lambda s, p: {0: math.nan, 1: 1}, "kuhn_poker"), "sum to 1"),
        (lambda: exploitability(lambda s, p: {7: 1.0}, "kuhn_poker"), "sum to 1"),
        (lambda: exploitability(lambda s, p: {}, "kuhn_poker"), "sum to 1"),
        (lambda: exploitability(uniform, "phantom_ttt"), "at most 500,000 histories"),
        (lambda: expected_returns([uniform] * 2, "connect_four"), "at most 500,000 histories"),
        (lambda: expected_returns([uniform], "kuhn_poker"), "players must be 2"),
        (lambda: play("kuhn_poker(players=3)", [uniform] * 2, 0), "players must be 3"),
        (lambda: play("kuhn_poker", [lambda s, p: {7: 1.0}] * 2, 0), "sum to 1"),
        (lambda: cfr("kuhn_poker", 0), "iterations must be at least 1"),
        (lambda: Minimax()(load_game("pig").new_initial_state(), 0), "minimax cannot play pig"),
        (lambda: evaluate(uniform, "kuhn_poker", seats=[2]), "seats must be within 0 to 1"),
        (lambda: evaluate(uniform, "kuhn_poker", games=0), "games at least 1"),
    ],
)
def test_bad_input_is_named(call, says):
    with pytest.raises(InputError, match=says):
        call()


def test_minimax_gives_up_on_large_games(monkeypatch):
    monkeypatch.setattr("normkit.rl.self_play._MOST_POSITIONS", 50)
    with pytest.raises(InputError, match="more than 50 positions"):
        Minimax()(load_game("tic_tac_toe").new_initial_state(), 0)


def test_without_openspiel_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "pyspiel", None)
    with pytest.raises(MissingDependencyError, match=r"normkit\[games\]"):
        load_game("kuhn_poker")


def test_draw_follows_the_weights():
    numbers = np.random.default_rng(0)
    picks = [draw({3: 0.2, 8: 0.6}, numbers) for _ in range(2000)]
    assert picks.count(8) / 2000 == pytest.approx(0.75, abs=0.04)


def test_states_walk_the_whole_tree():
    # Kuhn poker has 58 histories: 54 of cards and moves after the root and its 3 first cards,
    # of which 6 x 4 = 24 are decisions.
    assert sum(1 for _ in states("kuhn_poker")) == 24
