"""Pairings side by side, and a language model asked for its exact policy."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("pyspiel")

from normkit.errors import InputError
from normkit.rl.chat_format import ChatFormat
from normkit.rl.environments.arena import Arena, Pairing, pairings
from normkit.rl.environments.game_policy import LanguagePolicy
from normkit.rl.environments.games import GameWorld
from normkit.rl.evaluation.dialogues import play_chat
from normkit.rl.rollout import Rollout, RolloutConfig
from normkit.rl.self_play import exploitability, tabulate
from normkit.rl.spiel import information_states
from tests.rl.tiny import tiny_model, tiny_tokenizer

GAMES = ("tic_tac_toe", "kuhn_poker", "mini_hanabi")


def test_every_opponent_plays_what_it_can_in_every_seat():
    found = [str(p) for p in pairings(GAMES, ("random", "mcts", "cfr"))]
    assert found == [
        *(f"tic_tac_toe against {o}, seat {s}" for o in ("random", "mcts") for s in (0, 1)),
        *(f"kuhn_poker against {o}, seat {s}" for o in ("random", "cfr") for s in (0, 1)),
        "mini_hanabi with itself",
    ]
    alone = list(pairings(["mini_hanabi"], ("cfr",), itself=False))
    assert alone == [Pairing("mini_hanabi", "random", seat) for seat in (0, 1)]
    assert len(list(pairings(["kuhn_poker(players=3)"], ("cfr",)))) == 3


def test_an_arena_plays_each_pairing_as_its_own_world_would():
    tokenizer = tiny_tokenizer()
    rollout = Rollout(
        tiny_model(tokenizer), tokenizer, RolloutConfig(max_new_tokens=4, dtype="float32")
    )
    arena = Arena(pairings(GAMES, ("random", "cfr")), pairings(["leduc_poker"], ("random",)))
    assert len(arena.tasks("train")) == 7
    assert list(arena.tasks("heldout")) == [f"leduc_poker against random, seat {s}" for s in (0, 1)]
    tasks = [(label, i, 40 + i) for i, label in enumerate(arena.tasks("train"))]
    played = rollout.run(arena, tasks)
    assert [d.task for d in played] == [*(label for label, _, _ in tasks), tasks[-1][0]]
    assert [d.agent for d in played] == [0, 1, 0, 1, 0, 1, 0, 1]
    for label, group, seed in tasks[:6]:
        game, _, rest = label.partition(" against ")
        opponent, _, seat = rest.partition(", seat ")
        world = GameWorld([game], [], opponent=opponent, seat=int(seat))
        (alone,) = rollout.run(world, [(game, group, seed)])
        (same,) = [d for d in played if d.task == label]
        assert same.scores == alone.scores
        for one, other in zip(same.turns, alone.turns, strict=True):
            assert (one.message, one.reply, one.reward) == (
                other.message,
                other.reply,
                other.reward,
            )
    with pytest.raises(InputError, match="no pairing 'tic_tac_toe'"):
        arena.start_seats("tic_tac_toe", 0)
    with pytest.raises(InputError, match="split must be"):
        arena.tasks("test")


def test_a_served_model_plays_too():
    arena = Arena(pairings(["kuhn_poker"], ("random", "cfr")))
    tasks = [(label, i, seed) for i, label in enumerate(arena.tasks("train")) for seed in range(6)]

    class Caller:
        name = "caller"

        def complete(self, conversations):
            last = [c[-1]["content"].rpartition(", ")[2] for c in conversations]
            return [f"<answer>{move}</answer>" for move in last]

    for dialogue in play_chat(arena, tasks, Caller()):
        assert dialogue.scores["illegal"] == 0
        assert dialogue.turns[-1].reply in ("<answer>bet</answer>", "<answer>call</answer>")
        assert dialogue.scores["score"] in (-2, 1, 2)


@pytest.fixture(scope="module")
def policy():
    tokenizer = tiny_tokenizer()
    return LanguagePolicy(tiny_model(tokenizer), tokenizer, temperature=1.5)


def test_a_language_policy_is_the_models_probability_of_the_replies(policy):
    """The slow way: one row a move, softmax by hand."""
    state = information_states("kuhn_poker")["0pb"]
    chances = policy(state, 0)
    form = policy.format
    world = GameWorld(["kuhn_poker"], [])
    text = world.start_seats("kuhn_poker", 0)[0].match.text
    row = form.opening(
        text.system(0), "Your card: J. So far: nothing yet.\nLegal moves: check, bet"
    )
    end = form.tokenizer.eos_token_id
    row += [*form.tokenizer("<answer>check</answer>")["input_ids"], end]
    row += form.following(
        "Your card: J. So far: you check, player 2 bet.\nLegal moves: fold, call", True
    )
    scores = []
    for move in ("fold", "call"):
        reply = [*form.tokenizer(f"<answer>{move}</answer>")["input_ids"], end]
        with torch.no_grad():
            logits = policy.model(torch.tensor([row + reply])).logits[0].double() / 1.5
        table = torch.log_softmax(logits, -1)
        places = torch.arange(len(row) - 1, len(row) + len(reply) - 1)
        scores.append(table[places, torch.tensor(reply)].sum())
    expected = torch.softmax(torch.stack(scores), 0).tolist()
    assert [chances[0], chances[1]] == pytest.approx(expected, rel=1e-4)
    assert policy.legal[state.history_str()] == pytest.approx(
        float(torch.stack(scores).exp().sum()), rel=1e-3
    )


def test_what_a_language_policy_is_shown_is_what_a_rollout_shows(policy):
    """Follow rollouts of a policy that moves legally: the same tokens in the same order."""
    moves = iter(["bet", "call"])
    tokenizer = policy.format.tokenizer
    rollout = Rollout(policy.model, tokenizer, RolloutConfig(max_new_tokens=30, dtype="float32"))

    def generate(speaking):
        for live in speaking:
            reply = [
                *tokenizer(f"<answer>{next(moves)}</answer>")["input_ids"],
                tokenizer.eos_token_id,
            ]
            live.reply, live.logprobs = reply, [0.0] * len(reply)
            start = len(live.row)
            live.row.extend(reply)
            live.dialogue.segments[-1].spans.append(
                (len(live.dialogue.turns), start, len(live.row))
            )

    rollout._generate = generate
    for dialogue in rollout.run(GameWorld(), [("kuhn_poker", 0, 4)]):
        state = next(
            s
            for s in information_states("kuhn_poker").values()
            if s.current_player() == dialogue.agent
            and f"Your card: {'JQK'[s.history()[dialogue.agent]]}." in dialogue.turns[0].message
            and len(s.history()) == 2 + dialogue.agent
            and s.history()[2:] in ([], [1])
        )
        start = dialogue.segments[0].spans[0][1]
        assert policy._context(state, dialogue.agent) == dialogue.segments[0].token_ids[:start]


def test_a_language_policy_has_an_exploitability(policy):
    value = exploitability(policy, "kuhn_poker")
    table = tabulate(policy, "kuhn_poker").table
    assert len(table) == 12
    assert all(sum(row.values()) == pytest.approx(1) for row in table.values())
    assert 0 < value < 1
    assert isinstance(policy.format, ChatFormat)
