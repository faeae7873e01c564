"""What a multi-turn world is: it starts sessions and answers replies, many side by side.

A *session* is one dialogue between the policy and the world. The world speaks first. A batch of
sessions is stepped together so that judges and simulators see whole batches; sessions of one batch
may stand at different turns and end at different times.

In a :class:`SeatedEnvironment` several sessions share one game: each is what one seat sees, and a
session waits while the other seats move.
"""

from __future__ import annotations

import numbers
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, TypeVar, runtime_checkable

import numpy as np

from normkit.errors import InputError

Split = Literal["train", "heldout"]
HELDOUT_SEED = 12345
"""By which models are scored unless told otherwise, in a run and after it: on the same dialogues.
"""


@dataclass(frozen=True)
class Reply:
    """What the policy said in one turn.

    Attributes:
        text: the reply without special tokens; may be empty.
        truncated: True where it was cut at the length limit.
        tokens: its length in tokens; 0 where that is not known.
    """

    text: str
    truncated: bool = False
    tokens: int = 0


@dataclass(frozen=True)
class Step:
    """The world's answer to one reply.

    Attributes:
        reward: reward of the turn; NaN where it is unknown (the judge failed). Turns with an
            unknown reward are masked out of training and counted.
        message: the user's next message, or None when the dialogue is over.
        end_reason: why the dialogue ended ("success", "failure: ...", "max_turns", ...);
            None while it goes on.
        info: JSON-ready facts about the turn (rubric, state, work), kept in the logs.
    """

    reward: float
    message: str | None
    end_reason: str | None = None
    info: Mapping[str, Any] = field(default_factory=dict)


class Session(Protocol):
    """One dialogue in progress; worlds add their own state to it."""

    @property
    def task(self) -> str:
        """Name of the task (scenario, game, question) that is played."""

    @property
    def system(self) -> str:
        """System prompt of the policy; empty for none."""

    @property
    def message(self) -> str:
        """The message that opens the dialogue."""


S = TypeVar("S", bound=Session)


class Environment(Protocol[S]):
    """A multi-turn world."""

    @property
    def max_turns(self) -> int:
        """No dialogue has more turns than this."""

    def tasks(self, split: Split) -> Sequence[str]:
        """Names of the tasks of a split; the two splits are disjoint."""

    def start(self, task: str, seed: int) -> S:
        """Open a session; the same task and seed give the same world."""

    def step(self, sessions: Sequence[S], replies: Sequence[Reply]) -> list[Step]:
        """Answer one reply of each given session, in order.

        Raises:
            JudgeUnavailableError: when every judgement of the batch failed.
        """

    def score(self, session: S) -> dict[str, float]:
        """Metrics of a session as it stands; the key ``"score"`` is the headline."""


@runtime_checkable
class SeatedEnvironment(Environment[S], Protocol[S]):
    """A world whose sessions may have to wait for one another, as the seats of a game do.

    What :meth:`Environment.step` does in one call is two here: replies are taken, and what follows
    from them is asked for, as often as it takes. Every session waits until it is told that it is
    its turn, the first time too: there :meth:`poll` brings the message that opens the dialogue, or
    the end of a game in which the seat never had a turn. Rewards from before a seat's first turn
    belong to no turn and are dropped.
    """

    def start_seats(self, task: str, seed: int) -> Sequence[S]:
        """Open a game: one session for each seat that the policy plays, in their order."""

    def seat(self, session: S) -> int:
        """The seat that a session is seen from."""

    def act(self, sessions: Sequence[S], replies: Sequence[Reply]) -> None:
        """Take one reply of each given session; all of them wait from here on.

        A session whose context is full is given up with an empty, truncated reply.
        """

    def poll(self, sessions: Sequence[S]) -> list[Step | None]:
        """What waiting sessions were waiting for, in order; None for those that go on waiting.

        The step completes the last turn: its reward holds all that the seat collected since its
        reply, the other seats' moves included.
        """


def check_paired(sessions: Sequence[object], replies: Sequence[Reply]) -> None:
    """Check that there is one reply for each session.

    Raises:
        InputError: where there is not, or a session is given twice.
    """
    if len(sessions) != len(replies) or len(set(map(id, sessions))) != len(sessions):
        raise InputError("replies must be one for each session, and no session given twice")


def check_step(step: object, turns: int, max_turns: int) -> None:
    """Check a world's answer to the last of so many turns.

    Args:
        step: what the world answered.
        turns: turns that the dialogue has.
        max_turns: turns that it may have.

    Raises:
        InputError: where it is no :class:`Step`, its reward is no number, its message is no text,
            or the dialogue goes on although it must not.
    """
    if not isinstance(step, Step):
        raise InputError(f"environment: step must answer with a Step, got {type(step).__name__}")
    reward: Any = step.reward
    message: Any = step.message
    if not isinstance(reward, numbers.Real):
        raise InputError(f"environment: reward must be a number, got {reward!r}")
    if not isinstance(message, str | None):
        raise InputError(f"environment: message must be text or None, got {message!r}")
    if message is not None and turns >= max_turns:
        raise InputError(
            f"environment: a dialogue must end (message None) after max_turns = {max_turns} "
            "turns, and went on"
        )


def evaluation_tasks(
    environment: Environment[S], split: Split, seed: int, repeat: int = 0, limit: int | None = None
) -> list[tuple[str, int, int]]:
    """Every task of a split (or the first ``limit``) once, as ``(task, group, seed)``.

    A model meets the same dialogues whenever the seed is the same, in training and outside of it.

    Args:
        environment: the world.
        split: which tasks.
        seed: of the sessions and the sampling.
        repeat: another number gives other seeds.
        limit: most tasks.

    Raises:
        InputError: where the split has no tasks.
    """
    names = list(environment.tasks(split))[:limit]
    if not names:
        raise InputError(f"split: the world has no tasks in {split!r}")
    return [
        (name, number, int(np.random.SeedSequence([seed, number, repeat]).generate_state(1)[0]))
        for number, name in enumerate(names)
    ]
