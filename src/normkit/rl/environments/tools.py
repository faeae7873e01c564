"""The tool world: questions that take three to six calls of tools which are really run.

A reply calls tools (``<tool_call>`` tags, as Qwen and Hermes write them) or answers
(``<answer>`` tags); what it thinks before (``</think>``) does neither. Calls are run and their
results are the next message. A turn earns what its calls match of the reference trace (MatchTIR,
arXiv 2601.10712: :mod:`normkit.rl.tool_rewards`), the turn that answers the F1 of its words.

Calls are matched over the whole dialogue, so that an earlier turn's reward may change when a later
call fits better. A step reports what its turn has earned so far; ``info["turn_rewards"]`` holds all
turns so far, which :func:`normkit.rl.dialogue.settle` gives a finished dialogue.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from normkit.errors import InputError, check_least
from normkit.rl.chat import without_reasoning
from normkit.rl.environment import Reply, Split, Step, check_paired
from normkit.rl.environments.tool_tasks import Task, make_tasks
from normkit.rl.environments.toolbox import Result, Toolbox
from normkit.rl.tool_calls import Parsed, ToolCall, read_qwen
from normkit.rl.tool_rewards import (
    MatchOptions,
    Trace,
    answer_f1,
    count_solved,
    find_answer,
    turn_rewards,
)

_FORMAT = (
    "Answer the question with the help of tools. To call one, write\n"
    '<tool_call>{"name": NAME, "arguments": {PARAMETER: VALUE}}</tool_call>\n'
    "and wait for its result. When you know the answer, write <answer>ANSWER</answer>.\nTools:\n"
)


@dataclass(frozen=True)
class ToolWorldConfig:
    """Options of the world.

    Attributes:
        max_turns: a dialogue ends here, whatever it calls.
        max_calls: calls of one reply that are run; the first beyond is told so, and all are paid.
        reward: what turns earn: "matched", or nothing but the answer's F1 ("outcome").
        matching: how calls are paid.
    """

    max_turns: int = 10
    max_calls: int = 4
    reward: Literal["matched", "outcome"] = "matched"
    matching: MatchOptions = field(default_factory=MatchOptions)

    def __post_init__(self) -> None:
        check_least(self, 1, "max_turns", "max_calls")
        if self.reward not in ("matched", "outcome"):
            raise InputError(f"reward must be matched or outcome, got {self.reward!r}")


@dataclass(eq=False)
class ToolSession:
    """One dialogue in progress.

    Attributes:
        reference: the task with its reference trace.
        system: system prompt of the policy.
        turns: what each reply called.
        results: what the calls returned, in order.
        answer: the answer; None while there is none.
        ended: why it is over; None while it goes on.
    """

    reference: Task
    system: str
    turns: list[Parsed] = field(default_factory=list)
    results: list[Result] = field(default_factory=list)
    answer: str | None = None
    ended: str | None = None

    @property
    def task(self) -> str:
        """Name of the task."""
        return self.reference.id

    @property
    def message(self) -> str:
        """The question."""
        return self.reference.question

    @property
    def calls(self) -> list[ToolCall]:
        """All calls so far."""
        return [call for parsed in self.turns for call in parsed.calls]

    @property
    def answer_score(self) -> float:
        """F1 of the answer; 0 without one."""
        return 0.0 if self.answer is None else answer_f1(self.answer, self.reference.answer)

    def trace(self) -> Trace:
        """The dialogue so far, to be paid."""
        answered = {} if self.answer is None else {len(self.turns) - 1: self.answer_score}
        return Trace(self.turns, self.reference.gold, answered)


class ToolWorld:
    """Many dialogues with tools side by side; they share nothing but a database that is only read.

    Args:
        config: options of the world.
    """

    def __init__(self, config: ToolWorldConfig | None = None) -> None:
        self.config = config or ToolWorldConfig()
        self.box = Toolbox()
        lines = [json.dumps(tool.to_json()["function"]) for tool in self.box.tools.values()]
        self._system = _FORMAT + "\n".join(lines)
        self._splits: dict[Split, dict[str, Task]] = {
            "train": {task.id: task for task in make_tasks("train")},
            "heldout": {task.id: task for task in make_tasks("heldout")},
        }

    @property
    def max_turns(self) -> int:
        """No dialogue has more turns than this."""
        return self.config.max_turns

    def tasks(self, split: Split) -> Sequence[str]:
        """Names of the tasks of a split.

        Raises:
            InputError: for a split that does not exist.
        """
        if split not in self._splits:
            raise InputError(f"split must be train or heldout, got {split!r}")
        return list(self._splits[split])

    def start(self, task: str, seed: int) -> ToolSession:
        """Ask a task's question; nothing in this world is random.

        Raises:
            InputError: where there is no such task.
        """
        for tasks in self._splits.values():
            if task in tasks:
                return ToolSession(tasks[task], self._system)
        raise InputError(f"task: there is no task {task!r}")

    def step(self, sessions: Sequence[ToolSession], replies: Sequence[Reply]) -> list[Step]:
        """Run the calls of one reply of each session.

        A reply with an answer ends its session, and what it calls is not run; one with neither
        calls nor an answer ends it too.

        Raises:
            InputError: where sessions and replies do not fit together or a session has ended.
        """
        check_paired(sessions, replies)
        if any(session.ended is not None for session in sessions):
            raise InputError("sessions must not have ended")
        messages = [self._answer(s, r.text) for s, r in zip(sessions, replies, strict=True)]
        paid = turn_rewards([s.trace() for s in sessions], self.config.matching)
        steps = []
        for session, message, rewards in zip(sessions, messages, paid, strict=True):
            turns = rewards.turns
            if self.config.reward == "outcome":
                turns = [0.0] * (len(turns) - 1) + [session.answer_score]
            last = session.turns[-1]
            info: dict[str, Any] = {
                "calls": [call.to_json() for call in last.calls],
                "unreadable": last.failures,
                "turn_rewards": turns,
            }
            steps.append(Step(turns[-1], message, session.ended, info))
        return steps

    def score(self, session: ToolSession) -> dict[str, float]:
        """Metrics of FTRL, and what else was called.

        Returns:
            ``score`` (solve-F1), ``precision``, ``rate``; ``answer`` (F1); counts ``calls``,
            ``repeated``, ``wrong`` (:class:`~normkit.rl.tool_rewards.Solved`), ``unreadable``.
        """
        gold = session.reference
        needed = [(c.name, r) for c, r in zip(gold.gold, gold.results, strict=True)]
        found = count_solved(session.calls, [r.text for r in session.results], needed)
        return {
            "score": found.f1,
            "precision": found.precision,
            "rate": found.rate,
            "answer": session.answer_score,
            "calls": float(found.calls),
            "repeated": float(found.repeated),
            "wrong": float(found.wrong),
            "unreadable": float(sum(len(parsed.failures) for parsed in session.turns)),
        }

    def _answer(self, session: ToolSession, text: str) -> str | None:
        """Take a reply in and return the next message; None at the end."""
        text = without_reasoning(text)
        session.answer = find_answer(text)
        parsed = read_qwen(text) if session.answer is None else Parsed([], [])
        session.turns.append(parsed)
        if session.answer is not None:
            session.ended = "success" if session.answer_score == 1 else "answered"
            return None
        results = [
            self.box.run(call)
            if i < self.config.max_calls
            else Result("error: too many calls", False)
            for i, call in enumerate(parsed.calls)
        ]
        session.results += results
        if not parsed.calls and not parsed.failures:
            session.ended = "neither calls nor an answer"
        elif len(session.turns) == self.config.max_turns:
            session.ended = "max_turns"
        if session.ended is not None:
            return None
        most = self.config.max_calls
        texts = [result.text for result in results[: most + 1]]  # of those beyond, one says so
        texts += [f"error: {reason}" for reason in parsed.failures[:most]]
        return "\n".join(f"<tool_response>{text}</tool_response>" for text in texts)
