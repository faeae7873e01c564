"""The tool world in TRL: its tools as methods of a TRL environment, its rewards by turn.

TRL renders the tools into the prompt, parses what the model calls, runs it and goes on until a
message calls nothing; the world pays each message as it does in normkit's own trainer::

    trainer = TurnAdvantageTrainer(
        model, args=args, estimator="matchtir", processing_class=tokenizer, **tool_calling(world)
    )

The tokenizer's chat template must render tool calls. In ``args``, ``max_tool_calling_iterations``
is one less than the world's ``max_turns``, and ``max_completion_length`` holds a whole dialogue,
what tools return included. Written against TRL 1.16, which calls ``environment_factory``
experimental.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

from normkit.errors import MissingDependencyError
from normkit.rl.dialogue import finite_mean
from normkit.rl.environment import Reply, Split
from normkit.rl.environments.toolbox import Tool
from normkit.rl.environments.tools import ToolWorld
from normkit.rl.tool_calls import ToolCall

try:
    from datasets import Dataset
except ImportError:
    raise MissingDependencyError("datasets", "trl") from None

Message = Mapping[str, Any]

SYSTEM = (
    "Answer the question with the help of the tools. When you know the answer, write "
    "<answer>ANSWER</answer>."
)
_TYPES: Mapping[str, type] = {"string": str, "number": float}


def tool_calling(world: ToolWorld, split: Split = "train") -> dict[str, Any]:
    """What a GRPOTrainer needs to play a tool world by its own tool calls.

    Args:
        world: the world. What TRL ran beyond its ``max_calls`` of a message solves nothing.
        split: which tasks.

    Returns:
        ``environment_factory``, ``train_dataset`` and ``reward_funcs``, to be passed on by name.
    """

    def pay(
        completions: Sequence[Sequence[Message]],
        environments: Sequence[ToolDialogue],
        task: Sequence[str],
        log_metric: Any,
        **_: Any,
    ) -> list[float]:
        replies = [[as_reply(m) for m in c if m["role"] == "assistant"] for c in completions]
        rewards, scores = replay(world, task, replies)
        for environment, row in zip(environments, rewards, strict=True):
            environment.turn_rewards = row
        for name in scores[0]:
            log_metric(name, finite_mean([score[name] for score in scores]))
        return [sum(row) for row in rewards]

    return {
        "environment_factory": _dialogue_class(world),
        "train_dataset": Dataset.from_list([_example(world, task) for task in world.tasks(split)]),
        "reward_funcs": [pay],
    }


class ToolDialogue:
    """A TRL environment: one dialogue of a tool world. Subclasses have a method for each tool.

    Attributes:
        turn_rewards: reward of each assistant message, once the dialogue is over.
    """

    _world: ClassVar[ToolWorld]

    def __init__(self) -> None:
        self.turn_rewards: list[float] = []

    def reset(self, **_: Any) -> None:
        """Begin a dialogue; its question stands in the prompt already."""
        self.turn_rewards = []


def as_reply(message: Message) -> str:
    """An assistant message as the world reads replies: its text, then what it calls in tags."""
    text: str = message["content"]
    for call in message.get("tool_calls") or ():
        text += f"<tool_call>{json.dumps(call['function'], ensure_ascii=False)}</tool_call>"
    return text


def replay(
    world: ToolWorld, tasks: Sequence[str], replies: Sequence[Sequence[str]]
) -> tuple[list[list[float]], list[dict[str, float]]]:
    """Let the world answer dialogues that were held elsewhere.

    Args:
        world: the world.
        tasks: task of each dialogue.
        replies: what the policy said in each, turn by turn.

    Returns:
        The final rewards of the turns (0 for a turn after the world saw the end, by an answer for
        example), and the world's metrics, of each dialogue.
    """
    sessions = [world.start(task, 0) for task in tasks]
    rewards = [[0.0] * len(row) for row in replies]
    for turn in range(max(map(len, replies), default=0)):
        live = [i for i, s in enumerate(sessions) if s.ended is None and turn < len(replies[i])]
        steps = world.step([sessions[i] for i in live], [Reply(replies[i][turn]) for i in live])
        for i, step in zip(live, steps, strict=True):
            rewards[i][: turn + 1] = step.info["turn_rewards"]
    return rewards, [world.score(session) for session in sessions]


def _example(world: ToolWorld, task: str) -> dict[str, Any]:
    question = world.start(task, 0).message
    prompt = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": question}]
    return {"prompt": prompt, "task": task}


def _dialogue_class(world: ToolWorld) -> type[ToolDialogue]:
    methods = {name: _method(tool) for name, tool in world.box.tools.items()}
    return type("ToolDialogue", (ToolDialogue,), {"_world": world, **methods})


def _method(tool: Tool) -> Callable[..., str]:
    """A method that runs a tool, with the signature and docstring that schemas are read off.

    It takes any arguments, so that the world's own words on wrong ones reach the model.
    """

    def run(self: ToolDialogue, /, **arguments: Any) -> str:
        return self._world.box.run(ToolCall(tool.name, arguments)).text

    hints: dict[str, Any] = {name: _TYPES[kind] for name, kind in tool.parameters.items()}
    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    parameters = [inspect.Parameter(n, kind, annotation=hint) for n, hint in hints.items()]
    itself = inspect.Parameter("self", inspect.Parameter.POSITIONAL_ONLY)
    lines = [f"    {name}: the {name}" for name in tool.parameters]
    run.__name__ = run.__qualname__ = tool.name
    run.__doc__ = "\n".join([tool.description, "", "Args:", *lines])
    run.__annotations__ = {**hints, "return": str}
    run.__signature__ = inspect.Signature([itself, *parameters])  # type: ignore[attr-defined]
    return run
