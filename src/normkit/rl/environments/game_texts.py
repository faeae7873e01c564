"""How games of OpenSpiel are told in words: rules, what a seat sees, what its moves are called.

The games of MARS (Yuan et al., 2025, arXiv 2510.15414) have texts of their own, short enough for a
small model; any other game in which players move one after another gets :class:`GameText`, which
shows what OpenSpiel says the seat observes.

Differences from the authors' prompts: moves are single words or numbers (``5``, ``bet``,
``hint R``) where theirs are OpenSpiel's in angle brackets, and boards show the numbers of their
free cells.
"""

from __future__ import annotations

import re
from typing import Any

from normkit.errors import InputError
from normkit.rl.spiel import hides, opening


class GameText:
    """The words of a game that has none of its own.

    Args:
        game: a game of OpenSpiel.
    """

    board = True
    """Whether others' moves are worth telling: they are public, and the view does not list them."""

    draw_pays = False
    """Whether a last move that brings a seat nothing earns the bonus for draws."""

    def __init__(self, game: Any) -> None:
        kind = game.get_type()
        self.game = game
        self.title: str = kind.long_name
        self.shared: bool = kind.utility.name == "IDENTICAL"
        self.board = self.board and not hides(game)
        if hides(game) and not (
            kind.provides_observation_string or kind.provides_information_state_string
        ):
            raise InputError(f"game: OpenSpiel does not say what a player of {self.title!r} sees")

    @property
    def example(self) -> str:
        """A move of the beginning of a game."""
        state, _ = opening(str(self.game), 0)
        return self.move(state, state.current_player(), state.legal_actions()[0])

    def rules(self) -> str:
        """The game in a few sentences."""
        return f"The game is {self.title} for {self.game.num_players()}."

    def name(self, seat: int) -> str:
        """What a seat is called."""
        return f"player {seat + 1}"

    def view(self, state: Any, seat: int) -> str:
        """What a seat sees of a state."""
        kind = self.game.get_type()
        if kind.provides_information_state_string and hides(self.game):
            return str(state.information_state_string(seat)).strip()
        if kind.provides_observation_string:
            return str(state.observation_string(seat)).strip()
        return str(state).strip()

    def move(self, state: Any, seat: int, action: int) -> str:
        """What a legal action is called, unlike any other one of the state."""
        return str(state.action_to_string(seat, action)).strip()

    def stake(self, state: Any, seat: int) -> float:
        """What a seat loses by an illegal move, before the penalty: what it has, or may lose."""
        pays_as_it_goes = self.game.get_type().reward_model.name == "REWARDS"
        stake = state.returns()[seat] if pays_as_it_goes else -self.game.min_utility()
        return max(0.0, float(stake))


class _Board(GameText):
    """Two players who put X and O on a board."""

    draw_pays = True

    def name(self, seat: int) -> str:
        """What a seat is called."""
        return "XO"[seat]

    def stake(self, state: Any, seat: int) -> float:
        """What a seat loses by an illegal move, before the penalty."""
        return 1.0


class TicTacToe(_Board):
    """Cells are numbered from 1 to 9."""

    def rules(self) -> str:
        """The game in a few sentences."""
        return "Tic-tac-toe. X begins. Three in a row, column or diagonal win."

    def view(self, state: Any, seat: int) -> str:
        """What a seat sees of a state."""
        cells = str(state).replace("\n", "")
        shown = [c.upper() if c != "." else str(i + 1) for i, c in enumerate(cells)]
        return "\n".join(" ".join(shown[row : row + 3]) for row in (0, 3, 6))

    def move(self, state: Any, seat: int, action: int) -> str:
        """What a legal action is called."""
        return str(action + 1)


class ConnectFour(_Board):
    """Columns are numbered from 1 to 7."""

    def rules(self) -> str:
        """The game in a few sentences."""
        return (
            "Connect Four. X begins. A move names a column from 1 to 7; the disc falls to its "
            "lowest free cell. Four in a row, column or diagonal win."
        )

    def view(self, state: Any, seat: int) -> str:
        """What a seat sees of a state."""
        return "1234567\n" + str(state).strip().upper()

    def move(self, state: Any, seat: int, action: int) -> str:
        """What a legal action is called."""
        return str(action + 1)


class _Poker(GameText):
    """Betting games; the view tells all bets."""

    board = False

    def bets(self, state: Any, seat: int) -> list[str]:
        """Who did what so far, in order."""
        told, past = [], self.game.new_initial_state()
        for turn in state.full_history():
            if turn.player >= 0:
                who = "you" if turn.player == seat else self.name(turn.player)
                told.append(f"{who} {self.move(past, turn.player, turn.action)}")
            past.apply_action(turn.action)
        return told

    def _card(self, rank: int, ranks: int) -> str:
        return "JQK"[rank] if ranks == 3 else str(rank + 1)

    def _deck(self, ranks: int) -> str:
        return ", ".join(self._card(rank, ranks) for rank in range(ranks))


class KuhnPoker(_Poker):
    """Passing and betting are called by what they mean: check and bet, or fold and call."""

    def rules(self) -> str:
        """The game in a few sentences."""
        ranks = self.game.num_players() + 1
        return (
            f"Kuhn poker. Cards from low to high: {self._deck(ranks)}; everyone holds one. "
            "Everyone has put 1 chip into the pot. A bet or a call costs 1 more chip. Who folds "
            "loses; otherwise the highest card wins the pot."
        )

    def view(self, state: Any, seat: int) -> str:
        """What a seat sees of a state."""
        card = self._card(state.full_history()[seat].action, self.game.num_players() + 1)
        bets = ", ".join(self.bets(state, seat)) or "nothing yet"
        return f"Your card: {card}. So far: {bets}."

    def move(self, state: Any, seat: int, action: int) -> str:
        """What a legal action is called."""
        faced = any(turn.action == 1 for turn in state.full_history() if turn.player >= 0)
        return (("check", "bet"), ("fold", "call"))[faced][action]

    def stake(self, state: Any, seat: int) -> float:
        """What a seat loses by an illegal move, before the penalty."""
        return 1.0 + sum(int(t.action == 1) for t in state.full_history() if t.player == seat)


class LeducPoker(_Poker):
    """Calling without a bet to call is called check."""

    def rules(self) -> str:
        """The game in a few sentences."""
        ranks = self.game.num_players() + 1
        return (
            f"Leduc poker. Two cards each of {self._deck(ranks)}, from low to high; everyone holds "
            "one. Everyone has put 1 chip into the pot. There are two rounds of bets; before the "
            "second a public card is shown. A raise is 2 chips in round 1 and 4 in round 2, at "
            "most two raises a round. Who folds loses. A pair with the public card wins, else the "
            "higher card."
        )

    def view(self, state: Any, seat: int) -> str:
        """What a seat sees of a state."""
        ranks = self.game.num_players() + 1
        suits = 1 if self.game.get_parameters().get("suit_isomorphism") else 2
        public = state.public_card()
        shown = f" Public card: {self._card(public // suits, ranks)}." if public >= 0 else ""
        card = self._card(state.private_card(seat) // suits, ranks)
        paid = ", ".join(
            f"{'you' if p == seat else self.name(p)} {self._paid(state, p)}"
            for p in range(self.game.num_players())
        )
        bets = ", ".join(self.bets(state, seat)) or "nothing yet"
        return (
            f"Your card: {card}.{shown} Round {state.round()}. Chips in the pot: {paid}. So far: "
            f"{bets}."
        )

    def move(self, state: Any, seat: int, action: int) -> str:
        """What a legal action is called."""
        if action == 1 and 0 not in state.legal_actions():
            return "check"
        return ("fold", "call", "raise")[action]

    def stake(self, state: Any, seat: int) -> float:
        """What a seat loses by an illegal move, before the penalty."""
        return float(self._paid(state, seat))

    @staticmethod
    def _paid(state: Any, seat: int) -> int:
        return 100 - int(state.money()[seat])


class Hanabi(GameText):
    """A seat sees all hands but its own, and behind each card what its holder may think it is."""

    draw_pays = True

    def __init__(self, game: Any) -> None:
        super().__init__(game)
        self.board = True  # every move of Hanabi is public
        self._set = {"colors": 5, "ranks": 5, **game.get_parameters()}

    def rules(self) -> str:
        """The game in a few sentences."""
        colors, ranks = "RYGWB"[: self._set["colors"]], self._set["ranks"]
        copies = ", ".join(
            f"{rank} ({3 if rank == 1 else 1 if rank == ranks else 2} of each color)"
            for rank in range(1, ranks + 1)
        )
        return (
            f"Hanabi, played together. Colors {', '.join(colors)}; ranks {copies}. Each color is "
            f"stacked from 1 up to {ranks}: a card that fits earns everyone 1 point, another costs "
            "a life, and without lives all points are lost. You do not see your own cards; RY12 "
            "means: color R or Y, rank 1 or 2. play N: play your N-th card. discard N: throw it "
            "away for an info token. hint X: for an info token, tell the other which cards have "
            "color or rank X."
        )

    def view(self, state: Any, seat: int) -> str:
        """What a seat sees of a state."""
        lines = str(state.observation_string(seat)).splitlines()
        facts = {k: v.strip() for k, _, v in (line.partition(":") for line in lines)}
        start = lines.index("Hands:") + 1
        hands: list[list[str]] = [[]]
        for line in lines[start:]:
            if line.startswith("Deck size"):
                break
            if line.startswith("-----"):
                hands.append([])
            elif " || " in line:
                hands[-1].append(self._card(line))
        table = (
            f"Lives {facts['Life tokens']}, info tokens {facts['Info tokens']}, deck "
            f"{facts['Deck size']}, stacks {facts['Fireworks']}, discarded "
            f"{facts['Discards'] or 'none'}"
        )
        names = ["You", *(self._other(place) for place in range(1, len(hands)))]
        held = [f"{name}: {', '.join(hand)}" for name, hand in zip(names, hands, strict=True)]
        return "\n".join((table, *held))

    def move(self, state: Any, seat: int, action: int) -> str:
        """What a legal action is called."""
        words = str(state.action_to_string(seat, action)).strip("()").split()
        if words[0] in ("Play", "Discard"):
            return f"{words[0].lower()} {int(words[1]) + 1}"
        whom = "" if self.game.num_players() == 2 else f"{words[2]} "
        return f"hint {whom}{words[-1]}"

    def _other(self, distance: int) -> str:
        return "Other" if self.game.num_players() == 2 else f"+{distance}"

    @staticmethod
    def _card(line: str) -> str:
        """``"R1 || RX|R12"`` as ``"R1 (R12)"``; one's own, ``"XX || RX|R12"``, as ``"R12"``."""
        card, _, known = line.partition(" || ")
        possible = known.split("|")[-1].strip()
        return possible if card.strip() == "XX" else f"{card.strip()} ({possible})"


TEXTS: dict[str, type[GameText]] = {
    "tic_tac_toe": TicTacToe,
    "connect_four": ConnectFour,
    "kuhn_poker": KuhnPoker,
    "leduc_poker": LeducPoker,
    "hanabi": Hanabi,
}


def game_text(game: Any) -> GameText:
    """The words of a game of OpenSpiel."""
    return TEXTS.get(game.get_type().short_name, GameText)(game)


_ANSWER = re.compile(r"<answer>(.*?)</answer>", re.DOTALL | re.IGNORECASE)
_THOUGHT = re.compile(r"\s*<think>(.*?)</think>(.*)", re.DOTALL | re.IGNORECASE)


def read_answer(text: str, thinking: bool) -> str | None:
    """The text of a reply's answer tag; None where the reply is not as it must be.

    A reply is a think block, which may be missing unless it is asked for, then one answer tag, and
    nothing else.
    """
    thought = _THOUGHT.fullmatch(text)
    if thought is None and (thinking or "<think>" in text.lower()):
        return None
    rest = (thought[2] if thought else text).strip()
    answer = _ANSWER.fullmatch(rest)
    if answer is None or "<answer>" in answer[1].lower():
        return None
    return " ".join(answer[1].split())
