"""Games as dialogues: every move has one name, and everyone gets what the rules say."""

from __future__ import annotations

import random

import pytest

pytest.importorskip("pyspiel")

from normkit.errors import InputError
from normkit.rl.dialogue import pack, turn_table
from normkit.rl.environment import Environment, Reply, SeatedEnvironment
from normkit.rl.environments.game_texts import read_answer
from normkit.rl.environments.games import (
    HELDOUT,
    TRAIN,
    GameConfig,
    GameWorld,
    OpenSpielText,
)
from normkit.rl.rollout import Rollout, RolloutConfig
from normkit.rl.self_play import uniform
from normkit.rl.spiel import load_game, states
from normkit.rl.trainer import Trainer
from normkit.rl.trainer_config import TrainerConfig
from tests.rl.tiny import tiny_model, tiny_tokenizer

OTHERS = (
    "kuhn_poker(players=3)",
    "leduc_poker(players=3)",
    "hanabi(players=3,colors=2,ranks=2,hand_size=2)",
    "hanabi",
    "hex(board_size=3)",
    "pig",
    "backgammon",
    "phantom_ttt",
)


def said(move):
    return f"<answer>{move}</answer>"


def at(game, *moves, seed=0, **options):
    """A game after some moves, by their names."""
    text = OpenSpielText(game, seed, GameConfig(**options))
    for move in moves:
        text.apply(text.legal()[move])
    return text


def dealt(world, task, cards):
    """A game of cards whose history begins with ``cards``."""
    for seed in range(500):
        sessions = world.start_seats(task, seed)
        if sessions[0].match.text.state.history()[: len(cards)] == list(cards):
            world.poll(sessions)
            return sessions
    raise AssertionError("no such deal")


def reply(world, session, text, **more):
    world.act([session], [Reply(text, **more)])
    return world.poll([session])[0]


# ---------------------------------------------------------------------- words


@pytest.mark.parametrize("game", ["kuhn_poker", "kuhn_poker(players=3)", "tic_tac_toe"])
def test_every_legal_move_of_every_state_reads_back(game):
    seen = set()
    for state in states(game):
        if str(state) in seen:
            continue
        seen.add(str(state))
        text = OpenSpielText(game)
        text.state = state
        check_moves(text)
    assert len(seen) == {"tic_tac_toe": 4520, "kuhn_poker": 24}.get(game, len(seen))


def check_moves(text):
    moves = text.legal()
    assert sorted(moves.values()) == sorted(text.state.legal_actions())
    for move, action in moves.items():
        assert text.parse(said(move)) == action
        assert text.parse(f" <answer>\n {move.replace(' ', '  ')} </answer>\n") == action
        assert text.parse(f"<think>{move}?</think> <answer>{move}</answer>") == action
        assert text.parse(move) is None


@pytest.mark.parametrize("game", [*TRAIN[2:], *HELDOUT, *OTHERS])
def test_moves_read_back_in_random_games(game):
    for seed in range(3):
        text, rng = OpenSpielText(game, seed), random.Random(seed)
        for _ in range(60):
            if text.seat < 0:
                break
            check_moves(text)
            assert f"Legal moves: {', '.join(text.legal())}" in text.render(text.seat)
            text.apply(rng.choice(list(text.legal().values())))


def test_names_of_moves():
    assert list(at("tic_tac_toe").legal()) == [str(n) for n in range(1, 10)]
    assert list(at("kuhn_poker").legal()) == ["check", "bet"]
    assert list(at("kuhn_poker", "bet").legal()) == ["fold", "call"]
    assert list(at("kuhn_poker", "check", "bet").legal()) == ["fold", "call"]
    assert list(at("leduc_poker").legal()) == ["check", "raise"]
    assert list(at("leduc_poker", "raise").legal()) == ["fold", "call", "raise"]
    assert list(at("leduc_poker", "raise", "raise").legal()) == ["fold", "call"]
    assert list(at("connect_four", *"111111").legal()) == [str(n) for n in range(2, 8)]
    hanabi = set(at("mini_hanabi", "hint 1").legal())
    assert {f"{verb} {n}" for verb in ("play", "discard") for n in (1, 2, 3)} < hanabi
    assert hanabi - {"hint R", "hint Y", "hint 1", "hint 2"} == {
        f"{verb} {n}" for verb in ("play", "discard") for n in (1, 2, 3)
    }


def test_what_a_seat_is_shown():
    assert at("tic_tac_toe", "5", "1").render(0) == (
        "O: 1\nO 2 3\n4 X 6\n7 8 9\nLegal moves: 2, 3, 4, 6, 7, 8, 9"
    )
    assert at("tic_tac_toe", "5", "1", others="nothing").render(0).startswith("O 2 3")
    told = at("connect_four", "4", others="choices").render(1).splitlines()
    assert told[0] == "X: 4 (of 1, 2, 3, 4, 5, 6, 7)"
    assert told[1:8] == ["1234567", *["......."] * 5, "...X..."]
    kuhn = at("kuhn_poker", "check", "bet", seed=1)
    first, second = kuhn.state.history()[:2]
    assert kuhn.render(0) == (
        f"Your card: {'JQK'[first]}. So far: you check, player 2 bet.\nLegal moves: fold, call"
    )
    assert kuhn.render(1) == f"Your card: {'JQK'[second]}. So far: player 1 check, you bet."
    leduc = at("leduc_poker", "raise", "call", "check", seed=1)
    cards = leduc.state.history()
    assert leduc.render(1) == (
        f"Your card: {'JJQQKK'[cards[1]]}. Public card: {'JJQQKK'[cards[4]]}. Round 2. Chips in "
        "the pot: player 1 3, you 3. So far: player 1 raise, you call, player 1 check.\n"
        "Legal moves: check, raise"
    )
    three = at("kuhn_poker(players=3)", "check", "check")
    assert "player 1 check, player 2 check" in three.render(2)
    assert "You are player 3." in three.system(2)
    assert "<think>" in at("kuhn_poker", thinking=True).system(0)


def test_cards_of_leduc_poker_with_and_without_suits():
    for game, suits in (("leduc_poker", 2), ("leduc_poker(suit_isomorphism=True)", 1)):
        for seed in range(12):
            text = at(game, "check", "check", seed=seed)
            first, second, _, _, public = text.state.history()
            cards = ["JQK"[card // suits] for card in (first, second, public)]
            for seat in (0, 1):
                shown = f"Your card: {cards[seat]}. Public card: {cards[2]}. Round 2."
                assert text.render(seat).startswith(shown)


def test_hanabi_shows_others_cards_and_what_one_was_told():
    text = at("mini_hanabi", "hint 1", seed=4)
    table, you, other, legal = text.render(1).splitlines()[-4:]
    hands = [line.split(" ")[0] for line in str(text.state).splitlines() if " || " in line]
    assert table == "Lives 3, info tokens 2, deck 2, stacks R0 Y0, discarded none"
    assert other == "Other: " + ", ".join(f"{card} (RY12)" for card in hands[:3])
    ranks = [card[1] for card in hands[3:]]
    assert you == "You: " + ", ".join(f"RY{rank}" for rank in ranks)
    assert legal.startswith("Legal moves: discard 1")
    assert text.render(1).splitlines()[0] == "player 1: hint 1"


def test_games_of_moves_at_once_are_refused_and_played_in_turns_unseen():
    with pytest.raises(InputError, match="one after another, as in 'turn_based") as refused:
        load_game("goofspiel")
    name = str(refused.value).split("'")[-2]
    first, second = (at(name, f"[P0]Bid: {bid}").render(1) for bid in (1, 2))
    assert first == second
    assert "[P1]Bid: 13" in first
    with pytest.raises(InputError, match=r"one after another$"):
        load_game("mfg_garnet")


def test_games_that_hide_without_saying_what_one_sees_are_refused():
    assert not OpenSpielText("phantom_ttt").words.board
    text = at("phantom_ttt", "x(1,1)")
    assert "x(1,1)" not in text.render(1)
    assert "x" not in text.words.view(text.state, 1)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "5",
        "<answer></answer>",
        "<answer>5",
        "<answer>0</answer>",
        "<answer>10</answer>",
        "<answer>5 6</answer>",
        "<answer>5, 6</answer>",
        "<answer>5</answer><answer>5</answer>",
        "<answer><answer>5</answer></answer>",
        "I play <answer>5</answer>",
        "<answer>5</answer> since it is the center",
        "<think>5 it is <answer>5</answer>",
        "<answer>٥</answer>",
        "<answer>5\x00</answer>",
        "<answer>" * 5000,
        "<think>" * 5000 + "<answer>5</answer>",
        " " * 100_000 + "<answer>",
    ],
)
def test_anything_but_one_legal_move_is_none(text):
    assert OpenSpielText("tic_tac_toe").parse(text) is None


def test_thinking_is_asked_for_or_may_be():
    both = "<think>hm</think><answer>5</answer>"
    assert read_answer(both, thinking=True) == read_answer(both, thinking=False) == "5"
    assert read_answer(said(5), thinking=True) is None
    assert read_answer(said(5), thinking=False) == "5"
    assert read_answer("<answer>5</answer><think>hm</think>", thinking=True) is None
    assert read_answer("<think>a</think><think>b</think><answer>5</answer>", False) is None
    assert read_answer("<Answer>Hint  R</ANSWER>", False) == "Hint R"
    assert at("mini_hanabi").parse(said("HINT 1")) is not None
    # Chess tells a bishop from a pawn by the letter's case, which matters where both can take.
    chess = at("chess", "e3", "c5", "b3", "c4")
    both = {chess.parse(said("bxc4")), chess.parse(said("Bxc4"))}
    assert both == {chess.legal()["bxc4"], chess.legal()["Bxc4"]}
    assert chess.parse(said("BXC4")) is None


# ---------------------------------------------------------------------- what moves pay


def test_a_won_game_of_tic_tac_toe():
    world = GameWorld()
    x, o = world.start_seats("tic_tac_toe", 0)
    first, second = world.poll([x, o])
    assert second is None
    assert (first.reward, first.end_reason) == (0.0, None)
    assert first.message.startswith("1 2 3")
    for turn in range(2):
        assert reply(world, x, said(1 + turn)) is None
        step = world.poll([o])[0]
        assert step.reward == (0.0 if turn == 0 else 0.05)
        assert reply(world, o, said(4 + turn)) is None
        assert world.poll([x])[0].reward == 0.05
    won = reply(world, x, said(3))
    lost = world.poll([o])[0]
    assert (won.reward, won.message, won.end_reason) == (1.05, None, "success")
    assert (lost.reward, lost.message, lost.end_reason) == (-0.95, None, "loss")
    assert won.info == {"game": "tic_tac_toe", "seat": 0, "return": 1.0}
    assert world.score(x) == {"score": 1.0, "won": 1.0, "illegal": 0.0, "turns": 3.0}
    assert world.score(o) == {"score": -1.0, "won": 0.0, "illegal": 0.0, "turns": 2.0}


@pytest.mark.parametrize(
    ("game", "moves"),
    [
        ("tic_tac_toe", "512873469"),
        ("connect_four", "472424756645422154157737216635626711335331"),
    ],
)
def test_a_draw_pays_both_a_little(game, moves):
    world = GameWorld()
    sessions = world.start_seats(game, 0)
    steps = world.poll(sessions)
    for number, move in enumerate(moves):
        reply(world, sessions[number % 2], said(move))
        steps = world.poll(sessions)
    assert [step.reward for step in steps] == [pytest.approx(0.15)] * 2
    assert {step.end_reason for step in steps} == {"draw"}


@pytest.mark.parametrize(
    # Pig and cribbage give a seat several turns in a row; cribbage pays as it goes.
    "game",
    [*TRAIN, *HELDOUT, "kuhn_poker(players=3)", "pig(winscore=12)", "cribbage(players=3)"],
)
def test_rewards_of_a_seat_add_up_to_its_return_and_bonuses(game):
    config = GameConfig(draw=0.0)
    for seed in range(15):
        world, rng = GameWorld(config=config, train=[game], heldout=[]), random.Random(seed)
        sessions = world.start_seats(game, seed)
        total = [0.0] * len(sessions)
        steps = world.poll(sessions)
        while not sessions[0].match.over:
            (mover,) = [s for s in sessions if s.match.text.seat == s.seat]
            if mover.turns == 0:
                total[mover.seat] += mover.match.earned[mover.seat]  # of before the first turn
            move = rng.choice(list(mover.match.text.legal()))
            world.act([mover], [Reply(said(move))])
            steps = world.poll(sessions)
            for session, step in zip(sessions, steps, strict=True):
                if step is not None and session.turns:
                    total[session.seat] += step.reward
        returns = sessions[0].match.text.state.returns()
        for session, paid, value in zip(sessions, total, returns, strict=True):
            if session.turns:  # else nothing was the seat's doing
                assert paid == pytest.approx(value + 0.05 * session.turns)
            assert world.score(session)["score"] == value
        if "hanabi" in game:
            assert len(set(returns)) == 1
        elif game != "cribbage(players=3)":
            assert sum(returns) == 0


def test_a_turn_is_paid_for_what_the_other_seat_does():
    world = GameWorld()
    first, second = dealt(world, "kuhn_poker", (2, 0))  # a king against a jack
    assert reply(world, first, said("check")) is None
    world.poll([second])
    assert reply(world, second, said("bet")) is None
    assert world.poll([first])[0].reward == 0.05
    assert reply(world, first, said("call")).reward == 2.05
    assert world.poll([second])[0].reward == pytest.approx(-1.95)


def test_hanabi_pays_points_to_both_as_they_come():
    world = GameWorld()
    for seed in range(200):
        sessions = world.start_seats("mini_hanabi", seed)
        state = sessions[0].match.text.state
        if str(state).splitlines()[4].startswith(("R1", "Y1")):
            break
    one, two = sessions
    world.poll(sessions)
    assert reply(world, one, said("play 1")) is None
    world.poll([two])  # a point of before the second seat's first turn
    assert reply(world, two, said("hint 1")) is None
    assert world.poll([one])[0].reward == 1.05
    # A seat that breaks the rules loses the points and 10 more; the other's turn keeps its bonus.
    assert reply(world, one, "play two").reward == -11.0
    assert world.poll([two])[0].reward == 0.05
    assert world.score(one) == {"score": 0.0, "won": 0.0, "illegal": 1.0, "turns": 2.0}
    assert world.score(two)["score"] == 0.0


def test_a_last_move_of_hanabi_that_brings_nothing_pays_as_a_draw():
    found = {True: 0, False: 0}
    for seed in range(60):
        world = GameWorld()
        sessions, rng = world.start_seats("mini_hanabi", seed), random.Random(seed)
        world.poll(sessions)
        while not sessions[0].match.over:
            (mover,) = [s for s in sessions if s.match.text.seat == s.seat]
            before = mover.match.paid[0]
            waiting = [0.05 * (s is mover) or s.match.earned[s.seat] for s in sessions]
            world.act([mover], [Reply(said(rng.choice(list(mover.match.text.legal()))))])
            steps = world.poll(sessions)
        gained = mover.match.paid[0] - before
        last = gained or 0.1
        assert [s.reward for s in steps] == [pytest.approx(w + last) for w in waiting]
        found[gained == 0] += 1
    assert min(found.values()) > 0


@pytest.mark.parametrize(
    ("game", "moves", "loss"),
    [
        ("tic_tac_toe", [], 11),
        ("connect_four", ["1", "1"], 11),
        ("kuhn_poker", [], 11),
        ("kuhn_poker", ["check", "bet"], 11),
        ("leduc_poker", [], 11),
        ("leduc_poker", ["raise", "raise"], 13),
        ("mini_hanabi", [], 10),
        ("hex(board_size=3)", [], 11),
    ],
)
def test_an_illegal_move_costs_the_stake_and_ten(game, moves, loss):
    world = GameWorld(train=[game], heldout=[])
    sessions = world.start_seats(game, 3)
    world.poll(sessions)
    for number, move in enumerate(moves):
        reply(world, sessions[number % 2], said(move))
        world.poll(sessions)
    mover, other = sessions[len(moves) % 2], sessions[1 - len(moves) % 2]
    bonus = 0.05 if moves else 0.0
    step = reply(world, mover, "I pass.")
    assert (step.reward, step.message, step.end_reason) == (-loss, None, "illegal move")
    step = world.poll([other])[0]
    assert (step.reward, step.end_reason) == (bonus, "another's illegal move")
    assert world.score(other)["score"] == 0.0
    assert world.score(mover)["score"] == 10 - loss
    with pytest.raises(InputError, match="not the turn"):
        world.act([mover], [Reply(said("1"))])


def test_in_a_game_that_pays_as_it_goes_an_illegal_move_costs_what_the_seat_has():
    world, rng = GameWorld(["cribbage"], []), random.Random(0)
    sessions = world.start_seats("cribbage", 0)
    total, steps = [0.0, 0.0], world.poll(sessions)
    while min(sessions[0].match.text.state.returns()) <= 0:
        (mover,) = [s for s in sessions if s.match.text.seat == s.seat]
        world.act([mover], [Reply(said(rng.choice(list(mover.match.text.legal()))))])
        steps = world.poll(sessions)
        total = [t + (step.reward if step else 0) for t, step in zip(total, steps, strict=True)]
    had = sessions[0].match.text.state.returns()
    (mover,) = [s for s in sessions if s.match.text.seat == s.seat]
    other = sessions[1 - mover.seat]
    world.act([mover], [Reply("what?")])
    world.poll([other])
    (step,) = world.poll([mover])
    assert step.reward == -had[mover.seat] - 10
    assert world.score(mover)["score"] == 0
    assert world.score(other)["score"] == had[other.seat]


def test_an_illegal_move_does_not_give_back_what_was_lost():
    world = GameWorld(["cliff_walking"], [])
    (walker,) = world.start_seats("cliff_walking", 0)
    world.poll([walker])
    for _ in range(3):
        assert reply(world, walker, said("UP")).reward == pytest.approx(-1 + 0.05)
    assert reply(world, walker, said("SIDEWAYS")).reward == -10
    assert world.score(walker)["score"] == -3


def test_a_bet_in_kuhn_poker_is_at_stake():
    world = GameWorld()
    first, second = dealt(world, "kuhn_poker", (0, 1))
    reply(world, first, said("bet"))
    world.poll([second])
    assert reply(world, second, "").reward == -11.0
    assert world.poll([first])[0].reward == 0.05


def test_a_reply_that_was_cut_is_illegal_whatever_it_says():
    world = GameWorld()
    x, o = world.start_seats("tic_tac_toe", 0)
    world.poll([x, o])
    assert reply(world, x, said(5), truncated=True).reward == -11.0
    assert world.poll([o])[0].reward == 0.0


def test_the_length_term():
    # Card of MARS: 0 up to 2,048 tokens, -0.5027 at 4,096.
    config = GameConfig()
    assert [config.length_reward(n) for n in (0, 11, 1000, 2048)] == [0.0] * 4
    assert config.length_reward(4096) == pytest.approx(-0.5027, abs=1e-4)
    world = GameWorld()
    x, o = world.start_seats("tic_tac_toe", 0)
    world.poll([x, o])
    reply(world, x, said(5), tokens=4096)
    world.poll([o])
    reply(world, o, said(1))
    assert world.poll([x])[0].reward == pytest.approx(0.05 - 0.5027, abs=1e-4)


def test_more_than_two_seats():
    world = GameWorld(train=["kuhn_poker(players=3)"], heldout=[])
    sessions = world.start_seats("kuhn_poker(players=3)", 5)
    assert [s.seat for s in sessions] == [0, 1, 2]
    assert [step is None for step in world.poll(sessions)] == [False, True, True]
    assert reply(world, sessions[0], said("bet")) is None
    assert world.poll([sessions[1]])[0].message.endswith("fold, call")
    reply(world, sessions[1], "what?")
    rewards = [step.reward for step in world.poll(sessions)]
    assert rewards == [0.05, -11.0, 0.0]


# ---------------------------------------------------------------------- what seats see


@pytest.mark.parametrize("others", ["moves", "choices"])
@pytest.mark.parametrize("moves", [0, 1])
@pytest.mark.parametrize("game", ["kuhn_poker", "leduc_poker", "mini_hanabi", "simple_hanabi"])
def test_a_seat_sees_nothing_of_what_another_one_holds(game, moves, others):
    """Two games that differ in hidden cards alone show the same, until someone acts on them."""
    seen = {}
    for seed in range(300):
        text = OpenSpielText(game, seed, GameConfig(others=others))
        if moves:
            text.apply(text.state.legal_actions()[0])
        hidden = [text.state.observation_string(p) for p in range(2)]
        for seat in range(2):
            shown = (text.system(seat), text.render(seat))
            seen.setdefault((seat, hidden[seat]), set()).add(shown)
    assert all(len(shown) == 1 for shown in seen.values())
    assert len({shown for group in seen.values() for shown in group}) > 5


def test_dialogues_of_self_play_hold_only_the_own_card():
    world = GameWorld()
    for seed in range(6):
        sessions = world.start_seats("kuhn_poker", seed)
        mine = ["JQK"[card] for card in sessions[0].match.text.state.history()[:2]]
        heard = ["", ""]
        steps = world.poll(sessions)
        while not sessions[0].match.over:
            (mover,) = [s for s in sessions if s.match.text.seat == s.seat]
            heard[mover.seat] += steps[mover.seat].message
            world.act([mover], [Reply(said(list(mover.match.text.legal())[-1]))])
            steps = world.poll(sessions)
        for seat in range(2):
            assert f"Your card: {mine[seat]}." in heard[seat]
            assert all(f" {c}" not in heard[seat] for c in "JQK" if c != mine[seat])


# ---------------------------------------------------------------------- worlds


def test_the_world_is_an_environment():
    world = GameWorld()
    assert isinstance(world, SeatedEnvironment)
    as_environment: Environment = world
    assert as_environment.max_turns == 42
    assert list(world.tasks("train")) == list(TRAIN)
    assert list(world.tasks("heldout")) == list(HELDOUT)


@pytest.mark.parametrize("opponent", ["random", "mcts-20", "minimax", uniform])
def test_against_a_fixed_player(opponent):
    world = GameWorld(["tic_tac_toe"], [], opponent=opponent)
    seats = set()
    for seed in range(12):
        session, rng = world.start("tic_tac_toe", seed), random.Random(seed)
        seats.add(session.seat)
        assert f"You are {'XO'[session.seat]}." in session.system
        assert session.message.startswith("X: ") == (session.seat == 1)
        step, total = None, 0.0
        while step is None or step.message is not None:
            move = rng.choice(list(session.match.text.legal()))
            (step,) = world.step([session], [Reply(said(move))])
            total += step.reward
        score = world.score(session)
        assert opponent != "minimax" or score["score"] <= 0
        draw = 0.1 * (score["score"] == 0)
        assert total == pytest.approx(score["score"] + draw + 0.05 * session.turns)
    assert seats == {0, 1}


@pytest.mark.parametrize("game", [*TRAIN, *HELDOUT])
def test_the_same_seed_is_the_same_game(game):
    for opponent in (None, "random"):
        world = GameWorld(opponent=opponent)
        runs = []
        for _ in range(2):
            log = []
            for seed in (0, 1, 7):
                sessions, rng = world.start_seats(game, seed), random.Random(seed)
                steps = world.poll(sessions)
                while not sessions[0].match.over:
                    log += [step and (step.message, step.reward) for step in steps]
                    (mover,) = [s for s in sessions if s.match.text.seat == s.seat]
                    move = rng.choice(list(mover.match.text.legal()))
                    world.act([mover], [Reply(said(move))])
                    steps = world.poll(sessions)
                log += [step.reward for step in steps]
            runs.append(log)
        assert runs[0] == runs[1]


def test_the_seat_is_given_or_left_to_the_seed():
    assert {GameWorld(opponent="random", seat=1).start("kuhn_poker", s).seat for s in range(9)} == {
        1
    }
    seen = set()
    for seed in range(60):
        session = GameWorld(opponent="random").start("kuhn_poker", seed)
        seen.add((session.seat, *session.match.text.state.history()[:2]))
    assert len(seen) == 12  # either seat with each of the six deals


def test_a_game_that_fixed_players_end_before_the_policys_turn():
    def first(state, seat):
        return {state.legal_actions()[0]: 1.0}

    world = GameWorld(["pig(winscore=2)"], [], opponent=first, seat=1)
    over = 0
    for seed in range(40):
        session = world.start("pig(winscore=2)", seed)
        if session.match.over:
            over += 1
            assert session.message == "The game is over."
            (step,) = world.step([session], [Reply("anything")])
            assert (step.message, step.end_reason, session.turns) == (None, "loss", 0)
            assert world.score(session)["score"] == -1.0
    assert 0 < over < 40


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: GameWorld(["no such game"]), "game must be one of"),
        (lambda: GameWorld([], []), "at least one game"),
        (lambda: GameWorld(["hex"], ["hex"]), "none twice"),
        (lambda: GameWorld(["hex", "hex"], []), "none twice"),
        (
            lambda: GameWorld(opponent=uniform).step(
                [GameWorld(opponent=uniform).start("kuhn_poker", 0)], []
            ),
            "one for each session",
        ),
        (
            lambda: GameWorld(opponent=lambda s, p: {5: 1.0}, seat=1).start("kuhn_poker", 0),
            "must sum to 1",
        ),
        (lambda: GameWorld(opponent="mcts"), "mcts cannot play kuhn_poker"),
        (lambda: GameWorld(opponent="stockfish"), "opponent must be"),
        (lambda: GameWorld(opponent="random", seat=2), "has 2 seats, got 2"),
        (lambda: GameWorld().start("kuhn_poker", 0), "self-play has a session for every seat"),
        (
            lambda: GameWorld().step(GameWorld().start_seats("kuhn_poker", 0), [Reply("")] * 2),
            "self-play has a session for every seat",
        ),
        (lambda: GameWorld().start_seats("go", 0), "no game 'go' in this world"),
        (lambda: GameWorld().tasks("test"), "split must be"),
        (lambda: GameWorld().act([], [Reply("")]), "one for each session"),
        (lambda: at("tic_tac_toe").apply(9), "action must be one of"),
        (lambda: GameConfig(others="all"), "others must be"),
        (lambda: GameConfig(least_tokens=0), "least_tokens"),
    ],
)
def test_bad_input_is_named(call, says):
    with pytest.raises(InputError, match=says):
        call()


def test_a_session_acts_once_a_turn():
    world = GameWorld()
    x, o = world.start_seats("tic_tac_toe", 0)
    with pytest.raises(InputError, match="not the turn of seat 0"):
        world.act([x], [Reply(said(1))])  # not told that it is
    world.poll([x, o])
    with pytest.raises(InputError, match="not the turn of seat 1"):
        world.act([o], [Reply(said(1))])
    with pytest.raises(InputError, match="no session given twice"):
        world.act([x, x], [Reply(said(1)), Reply(said(2))])


# ---------------------------------------------------------------------- with a model


def test_a_model_that_never_moves_legally_trains_on():
    tokenizer = tiny_tokenizer()
    model = tiny_model(tokenizer)
    trainer = Trainer(
        model,
        tokenizer,
        GameWorld(),
        TrainerConfig(steps=1, groups=3, group_size=2, estimator="mars"),
        RolloutConfig(max_new_tokens=4, dtype="float32"),
    )
    numbers = trainer.train_step()
    assert numbers["turns"] == 0.5
    assert numbers["masked_turns"] == 0
    # Kuhn poker and the boards cost 11, Hanabi 10: centered by game and seat, nothing is left.
    assert numbers["reward"] == pytest.approx(-(11 + 11 + 10) / 3)
    assert numbers["advantage_abs"] == pytest.approx(0, abs=1e-9)


def test_a_rollout_of_self_play_and_of_its_half():
    tokenizer = tiny_tokenizer()
    rollout = Rollout(
        tiny_model(tokenizer), tokenizer, RolloutConfig(max_new_tokens=4, dtype="float32")
    )
    tasks = [(game, i, i) for i, game in enumerate(TRAIN)]
    both = rollout.run(GameWorld(), tasks)
    assert [(d.task, d.agent) for d in both] == [(game, seat) for game in TRAIN for seat in (0, 1)]
    assert [len(d.turns) for d in both] == [1, 0] * 3
    assert both[0].system != both[1].system
    table = turn_table(both)
    assert (table.agent.tolist(), len(pack(both))) == ([0, 0, 0], 3)
    half = rollout.run(GameWorld(opponent="random", seat=1), tasks)
    assert [(d.agent, len(d.turns)) for d in half] == [(1, 1)] * 3
    assert half == rollout.run(GameWorld(opponent="random", seat=1), tasks)
    assert load_game("tic_tac_toe").num_players() == 2
