"""Games of OpenSpiel as dialogues: a model against itself, or against a fixed player.

MARS: Reinforcing Multi-Agent Reasoning of LLMs through Self-Play in Strategic Games (Yuan et al.,
2025), arXiv 2510.15414, section 3 and appendix.

A game gives one dialogue per seat, which holds what that seat sees and nothing else. A turn earns
what its seat collects until its next turn, the others' moves included:

    r = game reward + 0.05 (well-formed) + 0.5 min(0, 1 - (tokens - 11) / (2048 - 11))

A reply that is not one legal move ends the game: its seat loses what it had at stake and 10 more,
the others keep what they have.

Differences from the authors' code: any number of seats; any game in which players move one after
another; the limit on a dialogue's length is the rollout's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import takewhile
from typing import Literal

import numpy as np

from normkit.errors import InputError
from normkit.rl.environment import Reply, Split, Step, check_paired
from normkit.rl.environments.game_texts import game_text, read_answer
from normkit.rl.self_play import Policy, ask, check_player, draw, player
from normkit.rl.spiel import deal, hides, load_game, opening

TRAIN = ("tic_tac_toe", "kuhn_poker", "mini_hanabi")
HELDOUT = ("connect_four", "leduc_poker", "simple_hanabi")
_SELF_PLAY = "opponent: self-play has a session for every seat; use start_seats, act and poll"


@dataclass(frozen=True)
class GameConfig:
    """Options of the world; the defaults are the paper's, but for ``thinking``.

    Attributes:
        thinking: whether a reply must begin with a think block; otherwise it may.
        others: what a message tells of the others' moves since the seat's last turn: nothing, the
            moves, or the moves and what else they could have been (in games that hide nothing:
            the hints that another could have given tell a player of Hanabi its own cards).
        penalty: what an illegal move costs on top of the seat's stake.
        well_formed: what every legal reply earns.
        draw: what each seat earns by a draw on a board, or by a last move in Hanabi that brings
            nothing.
        overlong: weight of the length term.
        free_tokens: length up to which a reply costs nothing.
        least_tokens: length of the shortest reply.
    """

    thinking: bool = False
    others: Literal["nothing", "moves", "choices"] = "moves"
    penalty: float = 10.0
    well_formed: float = 0.05
    draw: float = 0.1
    overlong: float = 0.5
    free_tokens: int = 2048
    least_tokens: int = 11

    def __post_init__(self) -> None:
        if self.others not in ("nothing", "moves", "choices"):
            raise InputError(f"others must be nothing, moves or choices, got {self.others!r}")
        if not 0 < self.least_tokens < self.free_tokens:
            raise InputError("least_tokens must be at least 1 and below free_tokens")

    def length_reward(self, tokens: int) -> float:
        """What a reply's length earns: nothing, or less than nothing beyond ``free_tokens``."""
        x = 1 - (tokens - self.least_tokens) / (self.free_tokens - self.least_tokens)
        return self.overlong * min(0.0, x)


class OpenSpielText:
    """A game in progress, in words.

    Args:
        game: a name of :data:`normkit.rl.spiel.GAMES`, or any of OpenSpiel's.
        seed: of chance.
        config: options.
        history: what happened so far, as OpenSpiel numbers it, chance included; None deals.
    """

    def __init__(
        self,
        game: str,
        seed: int = 0,
        config: GameConfig | None = None,
        history: Sequence[int] | None = None,
    ) -> None:
        self.config = config or GameConfig()
        self.state, self.numbers = opening(game, seed)
        self.words = game_text(self.state.get_game())
        self.seats = int(self.state.num_players())
        self._moves: list[tuple[int, str]] = []
        if history is not None:
            self.state = self.state.get_game().new_initial_state()
            for action in history:
                self._follow(action)

    @property
    def seat(self) -> int:
        """The seat whose turn it is; below 0 when the game is over."""
        return int(self.state.current_player())

    def legal(self) -> dict[str, int]:
        """The legal moves: OpenSpiel's number by what they are called."""
        seat = self.seat
        if seat < 0:
            return {}
        return {self.words.move(self.state, seat, a): a for a in self.state.legal_actions()}

    def parse(self, text: str) -> int | None:
        """The move of a reply, which is not trusted; None unless it is exactly one legal move."""
        answer = read_answer(text, self.config.thinking)
        moves = self.legal()
        if answer is None or answer in moves:
            return moves.get(answer or "")
        # Letters may be of either case where that leaves no doubt.
        found = [a for name, a in moves.items() if name.casefold() == answer.casefold()]
        return found[0] if len(found) == 1 else None

    def apply(self, action: int) -> None:
        """Make a legal move, and let chance follow.

        Raises:
            InputError: where the move is not legal.
        """
        if action not in self.state.legal_actions():
            raise InputError(f"action must be one of {self.state.legal_actions()}, got {action}")
        self._follow(action)
        deal(self.state, self.numbers)

    def _follow(self, action: int) -> None:
        """Take an action of a player or of chance, and keep in words what a player did."""
        seat = self.seat
        if seat >= 0:
            told = f"{self.words.name(seat)}: {self.words.move(self.state, seat, action)}"
            if self.config.others == "choices" and not hides(self.state.get_game()):
                told += f" (of {', '.join(self.legal())})"
            self._moves.append((seat, told))
        self.state.apply_action(action)

    def system(self, seat: int) -> str:
        """The rules, who one is, and how to reply."""
        think = "<think>your thoughts</think>" if self.config.thinking else ""
        return (
            f"{self.words.rules()} You are {self.words.name(seat)}. Reply with one legal move, "
            f"like this: {think}<answer>{self.words.example}</answer>"
        )

    def render(self, seat: int) -> str:
        """What a seat sees: the others' moves since its own, the state, and its legal moves."""
        lines = [self.words.view(self.state, seat)]
        if seat == self.seat:
            lines.append(f"Legal moves: {', '.join(self.legal())}")
        if self.words.board and self.config.others != "nothing":
            since = list(takewhile(lambda move: move[0] != seat, reversed(self._moves)))
            lines = [told for _, told in reversed(since)] + lines
        return "\n".join(lines)


@dataclass(eq=False)
class Match:
    """A game with its players and what it paid so far.

    Attributes:
        text: the game.
        players: the fixed player of each seat; None where the policy plays.
        paid: what each seat got from the game.
        earned: what each seat collected since its last reply, bonuses included.
        lost_by: the seat whose illegal move ended the game.
    """

    text: OpenSpielText
    players: Sequence[Policy | None]
    paid: list[float] = field(init=False)
    earned: list[float] = field(init=False)
    lost_by: int | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        self.paid = [0.0] * self.text.seats
        self.earned = [0.0] * self.text.seats
        self._advance()

    @property
    def over(self) -> bool:
        """Whether the game has ended."""
        return self.lost_by is not None or bool(self.text.state.is_terminal())

    def answer(self, reply: Reply) -> None:
        """Take the reply of the seat whose turn it is."""
        config, seat = self.text.config, self.text.seat
        self.earned[seat] = config.length_reward(reply.tokens)
        action = None if reply.truncated else self.text.parse(reply.text)
        if action is None:
            stake = self.text.words.stake(self.text.state, seat)
            self.earned[seat] -= stake + config.penalty
            self.paid[seat] -= stake
            if self.text.words.shared:
                self.paid = [0.0] * self.text.seats
            self.lost_by = seat
            return
        self.earned[seat] += config.well_formed
        self._move(action)
        self._advance()

    def _advance(self) -> None:
        """Let fixed players move until it is the policy's turn."""
        while not self.over and (mover := self.players[self.text.seat]) is not None:
            chances = ask(mover, self.text.state, self.text.seat)
            self._move(draw(chances, self.text.numbers))

    def _move(self, action: int) -> None:
        self.text.apply(action)
        returns = [float(value) for value in self.text.state.returns()]
        ended = self.text.state.is_terminal()
        for seat, value in enumerate(returns):
            gained = value - self.paid[seat]
            self.earned[seat] += gained
            if ended and self.text.words.draw_pays and gained == 0:
                self.earned[seat] += self.text.config.draw
        self.paid = returns


@dataclass(eq=False)
class GameSession:
    """A game as one seat sees it.

    Attributes:
        task: name of the game.
        seat: the seat.
        match: the game, shared by the sessions of all seats.
        system: rules and the form of a reply.
        message: what opens the dialogue against fixed players; empty in self-play.
        turns: replies so far.
        waiting: whether the seat has not yet been told of what followed its last reply.
    """

    task: str
    seat: int
    match: Match
    system: str
    message: str = ""
    turns: int = 0
    waiting: bool = True


class GameWorld:
    """Games by name, played by the policy against itself or a fixed player.

    Args:
        train: the games to train in.
        heldout: the games that are only played.
        opponent: who has the other seats: None for the policy itself, a name of
            :func:`normkit.rl.self_play.player`, or a policy.
        seat: the policy's seat against an opponent; None leaves it to the seed.
        config: options.
    """

    def __init__(
        self,
        train: Sequence[str] = TRAIN,
        heldout: Sequence[str] = HELDOUT,
        opponent: str | Policy | None = None,
        seat: int | None = None,
        config: GameConfig | None = None,
    ) -> None:
        self.config = config or GameConfig()
        self.opponent = opponent
        self._seat = seat
        self._splits: dict[Split, tuple[str, ...]] = {
            "train": tuple(train),
            "heldout": tuple(heldout),
        }
        games = {name: load_game(name) for name in (*train, *heldout)}
        if not games or len(games) < len(train) + len(heldout):
            raise InputError("train and heldout must name at least one game, and none twice")
        for name, game in games.items():
            if seat is not None and seat not in range(game.num_players()):
                raise InputError(f"seat: {name!r} has {game.num_players()} seats, got {seat}")
            if isinstance(opponent, str):
                check_player(opponent, name)
        self._longest = max(int(game.max_game_length()) for game in games.values())

    @property
    def max_turns(self) -> int:
        """No dialogue has more turns than the longest game has moves."""
        return self._longest

    def tasks(self, split: Split) -> Sequence[str]:
        """Names of the games of a split.

        Raises:
            InputError: for a split that does not exist.
        """
        if split not in self._splits:
            raise InputError(f"split must be train or heldout, got {split!r}")
        return self._splits[split]

    def seat(self, session: GameSession) -> int:
        """The seat that a session is seen from."""
        return session.seat

    def start_seats(self, task: str, seed: int) -> list[GameSession]:
        """Deal a game; the same name and seed give the same cards and the same opponent.

        Raises:
            InputError: where there is no such game.
        """
        if not any(task in games for games in self._splits.values()):
            raise InputError(f"task: there is no game {task!r} in this world")
        text = OpenSpielText(task, seed, self.config)
        systems = [text.system(seat) for seat in range(text.seats)]
        players: list[Policy | None] = [None] * text.seats
        other = self.opponent
        if other is not None:
            other = player(other, task, seed) if isinstance(other, str) else other
            players = [other] * text.seats
            players[self._drawn_seat(text.seats, seed)] = None
        match = Match(text, players)
        return [
            GameSession(task, seat, match, systems[seat])
            for seat, fixed in enumerate(players)
            if fixed is None
        ]

    def _drawn_seat(self, seats: int, seed: int) -> int:
        """The policy's seat: the given one, or drawn apart from the deal, which is by remainder."""
        if self._seat is not None:
            return self._seat
        return int(np.random.default_rng([seed, 2]).integers(seats))

    def act(self, sessions: Sequence[GameSession], replies: Sequence[Reply]) -> None:
        """Make the moves of the replies, and those of fixed players after them.

        Raises:
            InputError: where sessions and replies do not fit together, or it is not their turn.
        """
        check_paired(sessions, replies)
        for session, reply in zip(sessions, replies, strict=True):
            if session.match.over or session.waiting or session.match.text.seat != session.seat:
                raise InputError(f"sessions: it is not the turn of seat {session.seat}")
            session.turns += 1
            session.waiting = True
            session.match.answer(reply)

    def poll(self, sessions: Sequence[GameSession]) -> list[Step | None]:
        """What became of the last turn of each session; None while others are to move."""
        return [self._told(session) for session in sessions]

    def _told(self, session: GameSession) -> Step | None:
        match, seat = session.match, session.seat
        if not match.over and match.text.seat != seat:
            return None
        session.waiting = False
        info = {"game": session.task, "seat": seat}
        reward = match.earned[seat]
        if match.over:
            return Step(reward, None, self._end(session), {**info, "return": match.paid[seat]})
        return Step(reward, match.text.render(seat), None, info)

    @staticmethod
    def _end(session: GameSession) -> str:
        """Why a seat's game ended; success is a win, or all points of a game won together."""
        match, words = session.match, session.match.text.words
        if match.lost_by is not None:
            return "illegal move" if match.lost_by == session.seat else "another's illegal move"
        paid = match.paid[session.seat]
        if words.shared:
            return "success" if paid >= words.game.max_utility() else "end"
        return "success" if paid > 0 else "draw" if paid == 0 else "loss"

    def start(self, task: str, seed: int) -> GameSession:
        """Open a game against a fixed player, for those who take turns with one session alone.

        A game that ends before the policy's turn opens with that; the reply changes nothing.

        Raises:
            InputError: in self-play, which takes a session for every seat.
        """
        sessions = self.start_seats(task, seed)
        if len(sessions) != 1:
            raise InputError(_SELF_PLAY)
        (session,) = sessions
        step = self._told(session)
        session.message = (step and step.message) or "The game is over."
        return session

    def step(self, sessions: Sequence[GameSession], replies: Sequence[Reply]) -> list[Step]:
        """Answer one reply of each session against fixed players (:meth:`start`).

        Raises:
            InputError: where sessions and replies do not fit together, or not just one seat of a
                game is the policy's.
        """
        check_paired(sessions, replies)
        if any(session.match.players.count(None) != 1 for session in sessions):
            raise InputError(_SELF_PLAY)
        going = [
            (session, reply)
            for session, reply in zip(sessions, replies, strict=True)
            if not session.match.over
        ]
        self.act([session for session, _ in going], [reply for _, reply in going])
        return [step for step in self.poll(sessions) if step is not None]

    def score(self, session: GameSession) -> dict[str, float]:
        """What a seat got.

        Returns:
            ``score``: what the game paid, without bonuses and penalties; an illegal move counts as
            the loss of the stake, the others keep what they have, in Hanabi all lose their points.
            ``won``: whether it is above 0; ``illegal``: whether the seat ended the game so;
            ``turns``.
        """
        paid = session.match.paid[session.seat]
        return {
            "score": paid,
            "won": float(paid > 0),
            "illegal": float(session.match.lost_by == session.seat),
            "turns": float(session.turns),
        }
