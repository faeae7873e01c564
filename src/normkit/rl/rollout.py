"""Batched multi-turn generation that keeps its KV cache from turn to turn.

All dialogues of a batch take their turns side by side. What a turn adds (the next message of the
user) is encoded in one pass, replies are sampled together, and nothing is encoded twice unless a
dialogue outgrows its context. Sampling needs no random state: the uniforms of turn t of a dialogue
with seed s are a function of (s, t) and the seat alone, so a dialogue comes out the same in another
batch, or in a run that was killed and resumed (up to the rounding of the logits).

In a :class:`~normkit.rl.environment.SeatedEnvironment` a task is a game with one dialogue for each
seat. All games go side by side; a seat that waits for the others keeps its part of the cache.

Shapes: B rows, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from copy import copy
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from normkit.errors import InputError, NormkitError, check_least
from normkit.rl.chat_format import ChatFormat
from normkit.rl.dialogue import Dialogue, Segment, Turn, settle
from normkit.rl.environment import (
    Environment,
    Reply,
    S,
    SeatedEnvironment,
    Step,
    check_step,
)
from normkit.rl.inference import Decoder, InferenceCopy, make_decoder, unwrap
from normkit.rl.models import DtypeName, resolve_dtype
from normkit.rl.sampling import sample

Progress = Callable[[int, int], None]
"""Called after every round of turns with the turns done and the most turns there can be."""


@dataclass(frozen=True)
class RolloutConfig:
    """How replies are generated.

    Attributes:
        max_new_tokens: length limit of a reply.
        min_new_tokens: tokens before which a reply does not end.
        temperature: divides the logits; above 0.
        top_p: replies are sampled from the smallest set of tokens with at least this probability.
        greedy: take the most probable token; ``top_p`` has no effect then.
        max_context: longest row in tokens, reply included; None takes the model's.
        batch_size: most dialogues side by side; None for all. Bounds the KV cache. The dialogues
            of one game are never apart.
        max_tokens: most tokens that are encoded in one forward pass. Bounds activations.
        dtype: dtype of the inference copy; "auto" is bfloat16 where the hardware multiplies it.
    """

    max_new_tokens: int = 64
    min_new_tokens: int = 0
    temperature: float = 1.0
    top_p: float = 1.0
    greedy: bool = False
    max_context: int | None = None
    batch_size: int | None = None
    max_tokens: int = 8192
    dtype: DtypeName = "auto"

    def __post_init__(self) -> None:
        check_least(self, 1, "max_new_tokens", "max_tokens")
        check_least(self, 0, "min_new_tokens")
        if self.min_new_tokens > self.max_new_tokens:
            raise InputError(
                f"min_new_tokens must be at most max_new_tokens ({self.max_new_tokens}), "
                f"got {self.min_new_tokens}"
            )
        if not 0.0 < self.temperature < float("inf"):
            raise InputError(f"temperature must be above 0, got {self.temperature}")
        if not 0.0 < self.top_p <= 1.0:
            raise InputError(f"top_p must be in (0, 1], got {self.top_p}")
        if self.batch_size is not None and self.batch_size < 1:
            raise InputError(f"batch_size must be at least 1, got {self.batch_size}")
        if self.max_context is not None and self.max_context < 2 * self.max_new_tokens:
            raise InputError(
                f"max_context must be at least twice max_new_tokens ({self.max_new_tokens}), "
                f"got {self.max_context}"
            )


@dataclass(eq=False)
class _Live:
    """A dialogue in progress.

    Attributes:
        dialogue: what has been collected so far; its last segment is the row in the cache.
        session: the session in the world.
        message: what the user said last.
        waiting: True while other seats move.
        cached: tokens of the last segment that the cache holds.
        reply: tokens sampled in this turn.
        logprobs: their log-probabilities.
        ended: True once the reply is complete.
        truncated: True where the length limit completed it.
    """

    dialogue: Dialogue
    session: Any
    message: str
    waiting: bool = False
    cached: int = 0
    reply: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    ended: bool = False
    truncated: bool = False

    @property
    def slot(self) -> int:
        return self.dialogue.index

    @property
    def row(self) -> list[int]:
        return self.dialogue.segments[-1].token_ids

    def hear(self, step: Step, max_turns: int) -> None:
        """Take in the world's answer to the last turn, or what opens the dialogue."""
        check_step(step, len(self.dialogue.turns), max_turns)
        self.waiting = False
        if self.dialogue.turns:
            turn = self.dialogue.turns[-1]
            turn.reward += step.reward
            turn.info = {**turn.info, **step.info}
        if step.message is None:
            self.dialogue.end_reason = self.dialogue.end_reason or step.end_reason or "end"
        else:
            self.message = step.message


class Rollout:
    """Generates batches of dialogues between a policy and a world.

    Args:
        model: a causal language model of transformers, wrapped or not. It is not changed; replies
            come from a copy of it that shares its weights where dtype and adapters allow.
        tokenizer: its tokenizer, with a chat template.
        config: how replies are generated.

    Raises:
        InputError: when the tokenizer's template cannot be used (:class:`ChatFormat`), or
            ``max_context`` exceeds what the model can encode.
    """

    def __init__(self, model: nn.Module, tokenizer: Any, config: RolloutConfig) -> None:
        base = unwrap(model)
        self.config = config
        self.format = ChatFormat(tokenizer, _declared_ends(base))
        limit = getattr(base.config.get_text_config(), "max_position_embeddings", None)
        if limit is not None and (config.max_context or limit) > limit:
            raise InputError(
                f"max_context must be at most {limit}, the length the model can encode, "
                f"got {config.max_context}"
            )
        self.max_context: int | None = config.max_context or limit
        device = next(model.parameters()).device
        self._copy = InferenceCopy(model, resolve_dtype(config.dtype, device))
        self._decoder: Decoder = make_decoder(self._copy, config.max_tokens)
        self._ends = torch.tensor(self.format.end_ids, device=device)

    def sync(self, model: nn.Module) -> None:
        """Take over the weights of the model in training.

        Args:
            model: the model given at construction, after updates.
        """
        self._copy.sync(model)

    def with_config(self, config: RolloutConfig) -> Rollout:
        """A rollout that replies in another way, from the same copy of the model.

        Args:
            config: how; with the ``max_context``, ``max_tokens`` and ``dtype`` of this rollout.

        Raises:
            InputError: where one of these three differs.
        """
        for name in ("max_context", "max_tokens", "dtype"):
            asked, ours = getattr(config, name), getattr(self.config, name)
            if asked != ours:
                raise InputError(f"{name} must stay {ours}, as the copy was made, got {asked}")
        other = copy(self)
        other.config = config
        return other

    def run(
        self,
        environment: Environment[S],
        tasks: Sequence[tuple[str, int, int]],
        progress: Progress | None = None,
    ) -> list[Dialogue]:
        """Play one dialogue per task, or one per seat of each task's game.

        A dialogue that would exceed ``max_context`` drops its oldest turns: the system prompt
        stays, with the most recent turns that together fill at most half of the context (the last
        message at least), and a new segment begins. Where the last message alone leaves no room for
        a reply, the dialogue ends with the reason "context"; a seat is given up so, and what that
        costs is added to its last turn.

        Args:
            environment: the world.
            tasks: ``(task, group, seed)`` per dialogue. Give dialogues of one group different
                seeds: equal seeds draw equal random numbers.
            progress: called after every round of turns.

        Returns:
            One dialogue per task, in order; in a seated environment those of all seats, task by
            task. A seat whose game ended before its turn came has a dialogue without turns.

        Raises:
            InputError: when a first message leaves no room for a reply.
        """
        waiting = [self._start(environment, *task) for task in tasks]
        dialogues = [live.dialogue for lives in waiting for live in lives]
        for index, dialogue in enumerate(dialogues):
            dialogue.index = index
        waiting.reverse()
        running: list[_Live] = []
        room = self.config.batch_size or len(dialogues)
        try:
            while running or waiting:
                while waiting and (not running or len(running) + len(waiting[-1]) <= room):
                    running += self._settle(environment, waiting.pop())
                if running:
                    running = self._round(environment, running)
                if progress is not None:
                    done = sum(len(dialogue.turns) for dialogue in dialogues)
                    left = sum(
                        environment.max_turns - len(live.dialogue.turns)
                        for live in (*running, *(live for lives in waiting for live in lives))
                    )
                    progress(done, done + left)
        finally:
            self._release(running)
        return dialogues

    def _start(self, environment: Environment[S], task: str, group: int, seed: int) -> list[_Live]:
        """Open the sessions of a task; their dialogues are not numbered yet."""
        if seed < 0:
            raise InputError(f"tasks: a seed must be at least 0, got {seed}")

        def open_(session: S, seat: int, waiting: bool) -> _Live:
            dialogue = Dialogue(task, group, -1, seed, session.system, [], [], "", {}, seat)
            return _Live(dialogue, session, session.message, waiting)

        if isinstance(environment, SeatedEnvironment):
            seats = environment.start_seats(task, seed)
            return [open_(session, environment.seat(session), waiting=True) for session in seats]
        return [open_(environment.start(task, seed), 0, waiting=False)]

    def _round(self, environment: Environment[S], running: list[_Live]) -> list[_Live]:
        """Let every dialogue whose turn it is take it; return those that go on."""
        ready = [live for live in running if not live.waiting]
        if not ready:
            raise NormkitError("environment: all sessions wait for one another")
        speaking = [live for live in ready if self._prepare(live)]
        self._generate(speaking)
        replies = []
        for live in speaking:
            text = self.format.decode(live.reply)
            replies.append(Reply(text, live.truncated, len(live.reply)))
            live.dialogue.turns.append(
                Turn(live.message, text, live.reply, live.logprobs, live.truncated, 0.0)
            )
        if isinstance(environment, SeatedEnvironment):
            full = [live for live in ready if live not in speaking]
            replies += [Reply("", truncated=True)] * len(full)
            environment.act([live.session for live in (*speaking, *full)], replies)
            for live in ready:
                live.waiting = True
        elif speaking:
            steps = environment.step([live.session for live in speaking], replies)
            if len(steps) != len(speaking):
                raise InputError(
                    f"environment: step must answer each of {len(speaking)} replies, "
                    f"got {len(steps)} answers"
                )
            for live, step in zip(speaking, steps, strict=True):
                live.hear(step, environment.max_turns)
        return self._settle(environment, running)

    def _settle(self, environment: Environment[S], lives: list[_Live]) -> list[_Live]:
        """Tell waiting dialogues what there is to tell, close finished ones, return the others."""
        waiting = [live for live in lives if live.waiting]
        if isinstance(environment, SeatedEnvironment) and waiting:
            steps = environment.poll([live.session for live in waiting])
            for live, step in zip(waiting, steps, strict=True):
                if step is not None:
                    live.hear(step, environment.max_turns)
        finished = [live for live in lives if not live.waiting and live.dialogue.end_reason]
        for live in finished:
            live.dialogue.scores = environment.score(live.session)
            if "score" not in live.dialogue.scores:
                raise InputError('environment: score must have the key "score", got none')
            settle(live.dialogue)
        self._release(finished)
        over = {live.slot for live in finished}
        return [live for live in lives if live.slot not in over]

    @torch.inference_mode()
    def _release(self, lives: Sequence[_Live]) -> None:
        self._decoder.release([live.slot for live in lives])
        for live in lives:
            live.cached = 0

    # ------------------------------------------------------------------ prompts

    def _prepare(self, live: _Live) -> bool:
        """Append the user's message to the row; False where there is no room for a reply."""
        dialogue = live.dialogue
        live.reply, live.logprobs, live.ended, live.truncated = [], [], False, False
        if dialogue.turns:
            new = self._following(dialogue.turns[-1].token_ids, live.message)
        else:
            new = self.format.opening(dialogue.system, live.message)
            dialogue.segments.append(Segment([], []))
        if not self._fits(len(live.row) + len(new)):
            new = self._shortened(live)
            if not self._fits(len(new)):
                if dialogue.turns:
                    dialogue.end_reason = "context"
                    return False
                raise InputError(
                    f"tasks: the opening of {dialogue.task!r} has {len(new)} tokens, which leaves "
                    f"no room for a reply within max_context {self.max_context}"
                )
            if dialogue.turns:
                self._release([live])
                dialogue.segments.append(Segment([], []))
        live.row.extend(new)
        return True

    def _fits(self, length: int) -> bool:
        return self.max_context is None or length + self.config.max_new_tokens <= self.max_context

    def _following(self, reply: list[int], message: str) -> list[int]:
        return self.format.following(message, self.format.closed(reply))

    def _shortened(self, live: _Live) -> list[int]:
        """Row of the most recent turns that fill at most half of the context."""
        turns, system = live.dialogue.turns, live.dialogue.system
        shortest = self.format.opening(system, live.message)
        tail: list[int] = []
        message = live.message
        for turn in reversed(turns):
            tail = turn.token_ids + self._following(turn.token_ids, message) + tail
            message = turn.message
            row = self.format.opening(system, message) + tail
            if self.max_context is not None and len(row) > self.max_context // 2:
                break
            shortest = row
        return shortest

    # ------------------------------------------------------------------ generation

    @torch.inference_mode()
    def _generate(self, speaking: list[_Live]) -> None:
        """Sample one reply for every dialogue, its new tokens encoded first."""
        if not speaking:
            return
        config = self.config
        uniforms = {
            live.slot: turn_uniforms(
                live.dialogue.seed,
                len(live.dialogue.turns),
                config.max_new_tokens,
                live.dialogue.agent,
            )
            for live in speaking
        }
        for live in speaking:
            start = len(live.row)
            live.dialogue.segments[-1].spans.append((len(live.dialogue.turns), start, start))
        active, logits = speaking, self._encode(speaking)
        for position in range(config.max_new_tokens):
            chosen, logprobs = sample(
                logits,
                np.array([uniforms[live.slot][position] for live in active]),
                temperature=config.temperature,
                top_p=config.top_p,
                greedy=config.greedy,
                banned=self._ends if position < config.min_new_tokens else None,
            )
            last = position + 1 == config.max_new_tokens
            for live, token, logprob in zip(active, chosen, logprobs, strict=True):
                live.reply.append(token)
                live.logprobs.append(logprob)
                live.row.append(token)
                ended = token in self.format.end_ids
                live.ended, live.truncated = ended or last, last and not ended
            active = [live for live in active if not live.ended]
            if not active:
                break
            logits = self._extend(active)
        for live in speaking:
            spans = live.dialogue.segments[-1].spans
            spans[-1] = (spans[-1][0], spans[-1][1], len(live.row))

    def _encode(self, speaking: list[_Live]) -> Tensor:
        """Encode what the cache lacks; equal beginnings (the same task) are encoded once."""
        first: dict[tuple[int, ...], _Live] = {}
        twins: list[tuple[_Live, _Live]] = []
        encoded: list[_Live] = []
        for live in speaking:
            key = tuple(live.row) if live.cached == 0 else ()
            if key and key in first:
                twins.append((live, first[key]))
            else:
                first[key] = live
                encoded.append(live)
        logits = self._extend(encoded)
        self._decoder.copy([(source.slot, live.slot) for live, source in twins])
        for live, source in twins:
            live.cached = source.cached
        place = {live.slot: i for i, live in enumerate(encoded)}
        place.update({live.slot: place[source.slot] for live, source in twins})
        return logits[[place[live.slot] for live in speaking]]

    def _extend(self, lives: list[_Live]) -> Tensor:
        new = [live.row[live.cached :] for live in lives]
        logits = self._decoder.extend([live.slot for live in lives], new)
        for live in lives:
            live.cached = len(live.row)
        return logits


def turn_uniforms(seed: int, turn: int, count: int, agent: int = 0) -> npt.NDArray[np.float64]:
    """Uniform numbers in [0, 1) that turn ``turn`` of a dialogue is sampled with ``[count]``.

    A function of its arguments alone; the numbers of a smaller count begin those of a larger one.
    """
    entropy = [seed, turn, agent] if agent else [seed, turn]
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence(entropy))).random(count)


def _declared_ends(base: Any) -> list[int]:
    """End tokens that the model's own generation settings name."""
    ends: list[int] = []
    for holder in (getattr(base, "generation_config", None), base.config):
        declared = getattr(holder, "eos_token_id", None)
        if declared is not None:
            ends += declared if isinstance(declared, (list, tuple)) else [declared]
    return ends
