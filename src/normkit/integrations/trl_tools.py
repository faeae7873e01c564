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

A model that never calls a tool is paid nothing. :func:`reference_dialogues` writes what it should
have said, for :func:`normkit.rl.imitation.imitate` to warm it up with (examples/trl_tools.py).
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

from normkit.errors import InputError, MissingDependencyError
from normkit.rl.dialogue import Dialogue, Segment, Turn, finite_mean
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


def reference_dialogues(world: ToolWorld, tasks: Sequence[str], tokenizer: Any) -> list[Dialogue]:
    """Dialogues that call what the reference traces call, in the tokens of TRL's own loop.

    Args:
        world: the world.
        tasks: what is asked, a dialogue each.
        tokenizer: a tokenizer of transformers; its chat template says how calls are written.

    Returns:
        The dialogues, paid as the world pays them.

    Raises:
        InputError: for a template that writes past messages differently, or no tool calls.
    """
    methods = [getattr(_dialogue_class(world)(), name) for name in sorted(world.box.tools)]
    dialogues = []
    for index, task in enumerate(tasks):
        pieces = _pieces(tokenizer, _reference_messages(world, task), methods)
        ids = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in pieces]
        segment = Segment([], [])
        turns: list[Turn] = []
        for context, reply in zip(ids[::2], ids[1::2], strict=True):
            start = len(segment.token_ids) + len(context)
            segment.token_ids += context + reply
            segment.spans.append((len(turns), start, start + len(reply)))
            text = tokenizer.decode(reply, skip_special_tokens=True)
            turns.append(Turn("", text, reply, [0.0] * len(reply), False, 0.0))
        (rewards,), (scores,) = replay(world, [task], [[turn.reply for turn in turns]])
        for turn, reward in zip(turns, rewards, strict=True):
            turn.reward = reward
        dialogues.append(Dialogue(task, index, index, 0, SYSTEM, turns, [segment], "end", scores))
    return dialogues


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


def _reference_messages(world: ToolWorld, task: str) -> list[dict[str, Any]]:
    """Prompt, calls one by one with what they return, and the answer."""
    reference = world.start(task, 0).reference
    messages: list[dict[str, Any]] = list(_example(world, task)["prompt"])
    for call, result in zip(reference.gold, reference.results, strict=True):
        called = [{"type": "function", "function": call.to_json()}]
        messages.append({"role": "assistant", "content": "", "tool_calls": called})
        messages.append({"role": "tool", "name": call.name, "content": result})
    answer = f"<answer>{reference.answer}</answer>"
    return [*messages, {"role": "assistant", "content": answer}]


def _pieces(
    tokenizer: Any, messages: Sequence[Message], tools: Sequence[Callable[..., str]]
) -> list[str]:
    """A dialogue's text, cut where replies begin and end: context, reply, context, reply ...

    A reply ends with the token that ends a turn, as a sampled one does.
    """

    def written(count: int, prompt: bool) -> str:
        text: str = tokenizer.apply_chat_template(
            list(messages[:count]), tools=tools, tokenize=False, add_generation_prompt=prompt
        )
        return text

    pieces, done = [], ""
    for place, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before, after = written(place, prompt=True), written(place + 1, prompt=False)
        reply, end, _ = after[len(before) :].partition(tokenizer.eos_token)
        called = [call["function"]["name"] for call in message.get("tool_calls", ())]
        whole = after.startswith(before) and before.startswith(done)
        if not whole or not end or any(name not in reply for name in called):
            raise InputError(
                "tokenizer: its chat template must write tool calls, and later messages after "
                "earlier ones; trl.chat_template_utils has templates that do"
            )
        pieces += [before[len(done) :], reply + end]
        done = before + reply + end
    return pieces


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
