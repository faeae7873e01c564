"""verl's agent loop for a world of normkit: a reward per turn, on the turn's last token.

A file of verl's ``agent_loop_config_path`` names it (examples/verl_agent.yaml)::

    - name: normkit_world
      _target_: normkit.integrations.verl_agent.WorldAgentLoop
      environment: my_project.worlds:make     # called once a process; returns an Environment
      max_new_tokens: 512                     # length limit of one reply

Each example of the data names its task in ``extra_info: {"task": ...}``. Written against verl
0.9.1, whose own loops give one reward per dialogue.
"""

from __future__ import annotations

import asyncio
import importlib
import math
import zlib
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cache
from queue import Empty, SimpleQueue
from typing import Any, TypeVar
from uuid import uuid4

import torch

from normkit.errors import InputError, MissingDependencyError, NormkitError
from normkit.rl.chat_format import ChatFormat
from normkit.rl.environment import Environment, Reply, SeatedEnvironment, Step

try:
    from verl.experimental.agent_loop import AgentLoopBase, AgentLoopOutput
except ModuleNotFoundError as error:
    if error.name != "verl":
        raise
    raise MissingDependencyError("verl", "verl") from None


T = TypeVar("T")


class TurnOutput(AgentLoopOutput):  # type: ignore[misc]
    """An agent loop's output that keeps the rewards of turns apart.

    Attributes:
        turn_rewards: reward of each turn; NaN where it is unknown.
        turn_ends: place of each turn's last token in the response.
    """

    turn_rewards: list[float]
    turn_ends: list[int]

    def as_dict(self) -> dict[str, Any]:
        """Return verl's dictionary, with the rewards on the last tokens of their turns."""
        output: dict[str, Any] = super().as_dict()
        rewards, ends = output.pop("turn_rewards"), output.pop("turn_ends")
        scores = torch.zeros_like(output["response_mask"], dtype=torch.float32)
        scores[ends] = torch.tensor(rewards, dtype=torch.float32)
        output["rm_scores"] = scores
        return output


class WorldAgentLoop(AgentLoopBase):  # type: ignore[misc]
    """Plays one dialogue of a world.

    Args:
        args: what verl passes to an agent loop.
        environment: where to find a function that returns the world: ``"module:function"``.
        max_new_tokens: length limit of one reply.
        kwargs: what verl passes to an agent loop.
    """

    def __init__(self, *args: Any, environment: str, max_new_tokens: int, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.world = shared_world(environment)
        self.max_new_tokens = max_new_tokens
        self.format = ChatFormat(self.tokenizer)

    async def run(self, sampling_params: dict[str, Any], **kwargs: Any) -> TurnOutput:
        """Play the task of an example until the world ends it or the response is full.

        Args:
            sampling_params: verl's.
            kwargs: the example: ``extra_info`` with ``task``, and verl's ``uid``, ``session_id``.

        Raises:
            InputError: for an example without a task.
            NormkitError: when the server gives up before the first reply.
        """
        task = (kwargs.get("extra_info") or {}).get("task")
        if task is None:
            raise InputError("extra_info of an example must name its task")
        room = int(self.rollout_config.response_length)
        seed = zlib.crc32(f"{kwargs.get('uid')} {kwargs.get('session_id')}".encode())
        session = await self.world.call(lambda world: world.start(task, seed))
        prompt = self.format.opening(session.system, session.message)
        response: list[int] = []
        mask: list[int] = []
        logprobs: list[float] = []
        rewards: list[float] = []
        ends: list[int] = []
        while True:
            left = min(self.max_new_tokens, room - len(response))
            output = await self.server_manager.generate(
                request_id=uuid4().hex,
                prompt_ids=prompt + response,
                sampling_params={**sampling_params, "max_tokens": left},
            )
            ids = list(output.token_ids)[:left]
            if not ids:  # the server gave the request up
                break
            response += ids
            mask += [1] * len(ids)
            logprobs += list(output.log_probs or [0.0] * len(ids))[: len(ids)]
            reply = Reply(self.format.decode(ids), ids[-1] not in self.format.end_ids)
            step = await self.world.step(session, reply)
            rewards.append(step.reward)
            ends.append(len(response) - 1)
            if step.message is None:
                break
            following = self.format.following(step.message, self.format.closed(ids))
            if len(response) + len(following) >= room:
                break
            response += following
            mask += [0] * len(following)
            logprobs += [0.0] * len(following)
        if not rewards:
            raise NormkitError(f"verl: its server gave up before the first reply of {task!r}")
        # What a world pays earlier turns may change up to the last (normkit.rl.dialogue.settle).
        final = step.info.get("turn_rewards", ())
        rewards[: len(final)] = final
        scores = await self.world.call(lambda world: world.score(session))
        return TurnOutput(
            prompt_ids=prompt,
            response_ids=response,
            response_mask=mask,
            response_logprobs=logprobs if sampling_params.get("logprobs") else None,
            reward_score=sum(r for r in rewards if math.isfinite(r)),
            num_turns=2 * len(rewards),
            metrics={},
            turn_rewards=rewards,
            turn_ends=ends,
            extra_fields={"reward_extra_info": {"score": scores["score"]}},
        )


class SharedWorld:
    """The world of a process's dialogues, in a thread of its own.

    A judge may take seconds; verl's other dialogues go on meanwhile. Replies that come in while the
    world is busy are then answered together, so that a judge sees several at once.

    Args:
        environment: where to find a function that returns the world: ``"module:function"``.

    Raises:
        InputError: when there is no such function, or the world has seats.
    """

    def __init__(self, environment: str) -> None:
        self._thread = ThreadPoolExecutor(1)
        self._waiting: SimpleQueue[tuple[Any, Reply, Future[Step]]] = SimpleQueue()
        self._world = self._thread.submit(load_environment, environment).result()

    async def call(self, function: Callable[[Environment[Any]], T]) -> T:
        """What a function of the world returns."""
        return await asyncio.wrap_future(self._thread.submit(function, self._world))

    async def step(self, session: Any, reply: Reply) -> Step:
        """The world's answer to a reply."""
        answer: Future[Step] = Future()
        self._waiting.put((session, reply, answer))
        self._thread.submit(self._answer)
        return await asyncio.wrap_future(answer)

    def _answer(self) -> None:
        """Answer all replies that wait."""
        waiting = []
        try:
            while True:
                waiting.append(self._waiting.get_nowait())
        except Empty:
            waiting = [one for one in waiting if one[2].set_running_or_notify_cancel()]
        if not waiting:
            return
        sessions, replies, answers = zip(*waiting, strict=True)
        try:
            steps = dict(zip(answers, self._world.step(sessions, replies), strict=True))
        except Exception as error:  # whatever it is, the dialogues that wait must hear of it
            for answer in answers:
                answer.set_exception(error)
            return
        for answer, step in steps.items():
            answer.set_result(step)


shared_world = cache(SharedWorld)
"""One world a process for each place."""


def load_environment(place: str) -> Environment[Any]:
    """Call the function at ``"module:function"``.

    Raises:
        InputError: when there is no such function, or the world has seats.
    """
    module, _, name = place.partition(":")
    try:
        make = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise InputError(
            f"environment must be 'module:function', got {place!r} ({error})"
        ) from error
    world: Environment[Any] = make()
    if isinstance(world, SeatedEnvironment):
        raise InputError(f"environment: {place!r} has seats, and verl's loop plays one dialogue")
    return world
