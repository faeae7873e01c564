r"""Turn rewards for tool use: every call is paid by the reference call that it is matched with.

MatchTIR (arXiv 2601.10712). Calls are matched by their similarity
(:mod:`normkit.rl.tool_similarity`) over the whole dialogue: one made too early, or in another
order, still finds its reference. A turn earns the mean over its calls, a turn with an answer the F1
of its words, any other 0.

Differences from the authors' code: calls that cannot be read are counted (and optionally paid as
calls that match nothing); no reference calls give zeros, not a division by zero; the matching that
they name Hungarian is greedy (:mod:`normkit.functional.matching`).

Shapes: B dialogues; C predicted calls of all of them; m predicted calls of the dialogue that has
most; n reference calls; T turns.
"""

from __future__ import annotations

import math
import operator
import re
import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Any, Literal, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from normkit.errors import InputError
from normkit.functional.matching import METHODS, Matching, Method, match
from normkit.rl.chat import content_text, without_reasoning
from normkit.rl.tool_calls import Parsed, ToolCall, read_openai, read_qwen
from normkit.rl.tool_similarity import Equal, similarities

T = TypeVar("T")
_Array = npt.NDArray[Any]

_ANSWER = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)
_SPACED = str.maketrans(dict.fromkeys(string.punctuation, " "))


def answer_f1(answer: str, reference: str) -> float:
    """F1 of the sets of words, lower-cased, punctuation as spaces; 0 where they share none."""
    a, b = (set(text.lower().translate(_SPACED).split()) for text in (answer, reference))
    return 2 * len(a & b) / (len(a) + len(b)) if a & b else 0.0


def find_answer(text: str) -> str | None:
    """What stands between the first ``<answer>`` and its end; None where there is no answer."""
    found = _ANSWER.search(text)
    return found[1].strip() if found else None


@dataclass(frozen=True)
class Trace:
    """A dialogue to be paid.

    Attributes:
        turns: the calls of each turn, T.
        gold: the reference calls; may be none.
        answers: reward of the turns that answered, by turn; what such a turn calls is not paid.
    """

    turns: Sequence[Parsed]
    gold: Sequence[ToolCall]
    answers: Mapping[int, float] = field(default_factory=dict)

    @property
    def paid(self) -> list[list[ToolCall]]:
        """The calls of each turn that are paid."""
        if not self.answers:
            return [parsed.calls for parsed in self.turns]
        return [[] if t in self.answers else x.calls for t, x in enumerate(self.turns)]

    @property
    def calls(self) -> list[ToolCall]:
        """The calls that are paid, in order."""
        return list(chain.from_iterable(self.paid))


@dataclass(slots=True)
class TurnRewards:
    """Rewards of a dialogue.

    Attributes:
        turns: reward of each turn ``[T]``.
        calls: what each call earned ``[m]``, in order.
        assignment: reference of each call ``[m]``, -1 for none; None for "ot".
        trace: the dialogue.
        batch: similarities and matching of all dialogues that were paid together.
        row: place of this dialogue in the batch.
    """

    turns: list[float]
    calls: list[float]
    assignment: list[int] | None
    trace: Trace
    batch: tuple[Tensor, Matching]
    row: int

    @property
    def failures(self) -> list[str]:
        """Reasons of the calls that could not be read."""
        return [reason for parsed in self.trace.turns for reason in parsed.failures]

    @property
    def similarity(self) -> Tensor:
        """Similarities ``[m, n]``."""
        return self._own(self.batch[0])

    @property
    def plan(self) -> Tensor | None:
        """Mass between calls and references ``[m, n]``, to be drawn as a heat map; else None."""
        plan = self.batch[1].plan
        return None if plan is None else self._own(plan)

    def _own(self, grid: Tensor) -> Tensor:
        return grid[self.row, : len(self.calls), : len(self.trace.gold)]


@dataclass(frozen=True)
class MatchOptions:
    """How calls are paid.

    Attributes:
        method: "hungarian", "greedy" (the authors' code) or "ot".
        reg: weight of the entropy of "ot".
        unmatched: what a call without a reference earns, hard matching only; the authors train
            with 0, their helper's default is -0.5.
        rescale: multiply what "ot" pays by the number of calls.
        unreadable: "drop" calls that cannot be read (the authors' code), or let them "count" in
            their turn's mean as calls that earn ``unmatched``.
        equal: compares two values.
    """

    method: Method = "hungarian"
    reg: float = 0.1
    unmatched: float = 0.0
    rescale: bool = False
    unreadable: Literal["drop", "count"] = "drop"
    equal: Equal = operator.eq

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise InputError(f"method must be one of {', '.join(METHODS)}, got {self.method!r}")
        if self.unreadable not in ("drop", "count"):
            raise InputError(f"unreadable must be drop or count, got {self.unreadable!r}")
        if not math.isfinite(self.unmatched):
            raise InputError(f"unmatched must be a finite number, got {self.unmatched}")


def turn_rewards(traces: Sequence[Trace], options: MatchOptions | None = None) -> list[TurnRewards]:
    """Pay the turns of dialogues, all matched at once.

    Args:
        traces: the dialogues.
        options: how calls are paid.
    """
    options = options or MatchOptions()
    lengths = np.array([len(trace.turns) for trace in traces], np.int64)
    calls: list[ToolCall] = []
    by_turn = []
    for trace in traces:
        for made in trace.paid:
            calls += made
            by_turn.append(len(made))
    sizes = np.array(by_turn, np.int64)
    m = np.bincount(np.repeat(np.arange(len(traces)), lengths), sizes, len(traces)).astype(np.int64)
    n = np.array([len(trace.gold) for trace in traces], np.int64)
    gold = [trace.gold for trace in traces]
    similarity = similarities(calls, m, gold, options.equal)
    rows = torch.arange(similarity.shape[1]) < torch.from_numpy(m)[:, None]
    matching = match(
        similarity,
        options.method,
        rows=rows,
        columns=torch.arange(similarity.shape[2]) < torch.from_numpy(n)[:, None],
        reg=options.reg,
        unmatched=options.unmatched,
        rescale=options.rescale,
    )
    earned = matching.reward[rows]
    means = _by_turn(traces, sizes, earned.numpy(), options)
    found = matching.assignment
    columns = [None] * len(traces) if found is None else _split(found[rows].tolist(), m)
    pieces = zip(_split(means, lengths), _split(earned.tolist(), m), columns, traces, strict=True)
    batch = similarity, matching
    return [TurnRewards(*piece, batch, row) for row, piece in enumerate(pieces)]


def _by_turn(
    traces: Sequence[Trace],
    sizes: npt.NDArray[Any],
    earned: npt.NDArray[Any],
    options: MatchOptions,
) -> list[float]:
    """Mean of what the calls of each turn earned, dialogue by dialogue."""
    turns = len(sizes)
    total: _Array = np.bincount(np.repeat(np.arange(turns), sizes), earned, turns)
    if options.unreadable == "count":
        failed = [len(parsed.failures) for trace in traces for parsed in trace.turns]
        total = total + options.unmatched * np.array(failed)
        sizes = sizes + np.array(failed)
    means: list[float] = (total / np.maximum(sizes, 1)).tolist()
    start = 0
    for trace in traces:
        for t, reward in trace.answers.items():
            means[start + t] = reward
        start += len(trace.turns)
    return means


def _split(values: list[T], sizes: _Array) -> list[list[T]]:
    """Cut a list into pieces of these sizes."""
    stops = sizes.cumsum().tolist()
    return [values[a:b] for a, b in zip([0, *stops], stops, strict=False)]


def tool_trace(
    messages: Sequence[Mapping[str, Any]],
    gold: Sequence[ToolCall],
    answer: str | None = None,
    options: MatchOptions | None = None,
) -> TurnRewards:
    """Pay the assistant's turns of a conversation.

    Args:
        messages: ``{"role", "content"}``; an assistant's calls stand in its ``tool_calls``, or in
            its text as Qwen writes them. Every assistant message is a turn; thoughts in it neither
            call nor answer.
        gold: the reference calls.
        answer: the reference answer; None where answers are not paid.
        options: how calls are paid.

    Raises:
        InputError: where a message is no object, or a reference no :class:`ToolCall`.
    """
    if not all(isinstance(call, ToolCall) for call in gold):
        raise InputError("gold must hold calls as ToolCall: read_ftrl and others make them of JSON")
    if not isinstance(messages, Sequence) or not all(isinstance(m, Mapping) for m in messages):
        raise InputError('messages must be a list of objects with "role" and "content"')
    turns: list[Parsed] = []
    answers = {}
    for message in messages:
        if message.get("role") != "assistant":
            continue
        text = without_reasoning(content_text(message.get("content")))
        given = find_answer(text)
        if given is not None:
            answers[len(turns)] = 0.0 if answer is None else answer_f1(given, answer)
        calls = message.get("tool_calls")
        turns.append(read_openai(calls) if calls else read_qwen(text))
    return turn_rewards([Trace(turns, gold, answers)], options)[0]


@dataclass(frozen=True)
class Solved:
    """How much of a task was solved, and what else was called.

    Attributes:
        solved: reference results that were found.
        calls: calls that were made.
        needed: reference results that there are.
        repeated: calls that had been made before, arguments and all.
        wrong: calls of a tool that the reference uses which found nothing new and repeat nothing.
    """

    solved: int
    calls: int
    needed: int
    repeated: int = 0
    wrong: int = 0

    @property
    def precision(self) -> float:
        """Solved over calls; 1 where there were none, as in the authors' evaluation."""
        return self.solved / self.calls if self.calls else 1.0

    @property
    def rate(self) -> float:
        """Solved over needed; 1 where nothing was needed."""
        return self.solved / self.needed if self.needed else 1.0

    @property
    def f1(self) -> float:
        """``2 solved / (calls + needed)``; 1 where there were no calls and none were needed."""
        total = self.calls + self.needed
        return 2 * self.solved / total if total else 1.0


def count_solved(
    calls: Sequence[ToolCall], results: Sequence[str], needed: Sequence[tuple[str, str]]
) -> Solved:
    """Count what the calls of a dialogue solved (the metrics of FTRL).

    Args:
        calls: the calls in order.
        results: what each returned.
        needed: tool and result of each reference call; each is solved once.
    """
    left = [(name.lower(), result) for name, result in needed]
    tools = {name for name, _ in left}
    seen: list[ToolCall] = []
    solved = repeated = wrong = 0
    for call, result in zip(calls, results, strict=True):
        key = (call.name.lower(), result)
        if key in left:
            left.remove(key)
            solved += 1
        elif call in seen:
            repeated += 1
        elif key[0] in tools:
            wrong += 1
        seen.append(call)
    return Solved(solved, len(calls), len(needed), repeated, wrong)
