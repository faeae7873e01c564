r"""Turn rewards for tool use: every call is paid by the reference call that it is matched with.

MatchTIR (arXiv 2601.10712). The similarity of a predicted call p to a reference call g is 0 where
their names differ, whatever the case, and else

``s = (1 + J(keys g, keys p) + sum_k [p[k] == g[k]]) / (2 + |g|)``,

J the Jaccard index of the parameter names, k over the parameters of g. Calls are matched over the
whole dialogue: one made too early, or in another order, still finds its reference. A turn earns the
mean over its calls, a turn with an answer the F1 of its words, any other 0.

Differences from the authors' code: calls that cannot be read are counted (and optionally paid as
calls that match nothing); no reference calls give zeros, not a division by zero; the matching that
they name Hungarian is greedy (:mod:`normkit.functional.matching`); a parameter that may be left out
and was is as if the reference did not have it.

Shapes: B dialogues; m predicted calls; n reference calls; T turns.
"""

from __future__ import annotations

import operator
import re
import string
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from normkit.errors import InputError
from normkit.functional.matching import METHODS, Method, match
from normkit.rl.tool_calls import AnyOf, Parsed, ToolCall, read_openai, read_qwen

Equal = Callable[[Any, Any], bool]
_ANSWER = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)
_SPACED = str.maketrans(dict.fromkeys(string.punctuation, " "))


def tool_similarity(predicted: ToolCall, gold: ToolCall, equal: Equal = operator.eq) -> float:
    """Similarity of a predicted to a reference call, in 0..1 (formula: head of this module).

    Args:
        predicted: what the model called.
        gold: what it should have; values may be :class:`~normkit.rl.tool_calls.AnyOf`.
        equal: compares two values; by default Python's ``==``, for which ``3 != "3"``, but
            ``1 == 1.0 == True``.
    """
    if predicted.name.lower() != gold.name.lower():
        return 0.0
    given = predicted.arguments
    wanted = {k: v for k, v in gold.arguments.items() if k in given or not _optional(v)}
    right = sum(k in given and accepts(v, given[k], equal) for k, v in wanted.items())
    common = len(wanted.keys() & given.keys())
    union = len(wanted) + len(given) - common
    return (1 + (common / union if union else 1.0) + right) / (2 + len(wanted))


def accepts(pattern: Any, value: Any, equal: Equal = operator.eq) -> bool:
    """Whether a value is the one of a reference, or one of those it accepts."""
    if isinstance(pattern, AnyOf):
        return any(accepts(one, value, equal) for one in pattern.values)
    if isinstance(pattern, dict) and isinstance(value, dict):
        required = {k for k, v in pattern.items() if not _optional(v)}
        return required <= value.keys() <= pattern.keys() and all(
            accepts(pattern[k], v, equal) for k, v in value.items()
        )
    if isinstance(pattern, list) and isinstance(value, list):
        return len(pattern) == len(value) and all(
            accepts(p, v, equal) for p, v in zip(pattern, value, strict=True)
        )
    return bool(equal(pattern, value))


def similarity_matrix(
    predicted: Sequence[ToolCall], gold: Sequence[ToolCall], equal: Equal = operator.eq
) -> Tensor:
    """Similarities ``[m, n]``, float64."""
    return _similarities([predicted], [gold], equal)[0]


def _similarities(
    predicted: Sequence[Sequence[ToolCall]], gold: Sequence[Sequence[ToolCall]], equal: Equal
) -> Tensor:
    """Similarities of many dialogues ``[B, m, n]``, 0 where one has fewer calls."""
    longest = [max(map(len, side), default=0) for side in (predicted, gold)]
    out = np.zeros((len(predicted), *longest))
    for b, (calls, references) in enumerate(zip(predicted, gold, strict=True)):
        places: dict[str, list[int]] = {}
        for j, reference in enumerate(references):
            places.setdefault(reference.name.lower(), []).append(j)
        for i, call in enumerate(calls):
            for j in places.get(call.name.lower(), ()):
                out[b, i, j] = tool_similarity(call, references[j], equal)
    return torch.from_numpy(out)


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
    def calls(self) -> list[ToolCall]:
        """The calls that are paid, in order."""
        return [c for t, p in enumerate(self.turns) if t not in self.answers for c in p.calls]


@dataclass(frozen=True)
class TurnRewards:
    """Rewards of a dialogue.

    Attributes:
        turns: reward of each turn ``[T]``.
        calls: what each call earned ``[m]``, in order.
        similarity: similarities ``[m, n]``.
        assignment: reference of each call ``[m]``, -1 for none; None for "ot".
        plan: mass between calls and references ``[m, n]``, to be drawn as a heat map; None but for
            "ot".
        failures: reasons of the calls that could not be read.
    """

    turns: list[float]
    calls: list[float]
    similarity: Tensor
    assignment: list[int] | None
    plan: Tensor | None
    failures: list[str]


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


def turn_rewards(traces: Sequence[Trace], options: MatchOptions | None = None) -> list[TurnRewards]:
    """Pay the turns of dialogues, all matched at once.

    Args:
        traces: the dialogues.
        options: how calls are paid.
    """
    options = options or MatchOptions()
    calls, gold = [trace.calls for trace in traces], [trace.gold for trace in traces]
    similarity = _similarities(calls, gold, options.equal)
    m, n = [len(x) for x in calls], [len(x) for x in gold]
    matching = match(
        similarity,
        options.method,
        rows=torch.arange(similarity.shape[1]) < torch.tensor(m)[:, None],
        columns=torch.arange(similarity.shape[2]) < torch.tensor(n)[:, None],
        reg=options.reg,
        unmatched=options.unmatched,
        rescale=options.rescale,
    )
    paid = matching.reward.tolist()
    assignment = None if matching.assignment is None else matching.assignment.tolist()
    out = []
    for b, trace in enumerate(traces):
        out.append(
            TurnRewards(
                _by_turn(trace, paid[b], options),
                paid[b][: m[b]],
                similarity[b, : m[b], : n[b]],
                None if assignment is None else assignment[b][: m[b]],
                None if matching.plan is None else matching.plan[b, : m[b], : n[b]],
                [reason for parsed in trace.turns for reason in parsed.failures],
            )
        )
    return out


def _by_turn(trace: Trace, paid: Sequence[float], options: MatchOptions) -> list[float]:
    """Mean of what each turn's calls earned."""
    out, start = [], 0
    for t, parsed in enumerate(trace.turns):
        if t in trace.answers:
            out.append(trace.answers[t])
            continue
        stop = start + len(parsed.calls)
        earned = list(paid[start:stop])
        if options.unreadable == "count":
            earned += [options.unmatched] * len(parsed.failures)
        out.append(sum(earned) / len(earned) if earned else 0.0)
        start = stop
    return out


def tool_trace(
    messages: Sequence[Mapping[str, Any]],
    gold: Sequence[ToolCall],
    answer: str | None = None,
    options: MatchOptions | None = None,
) -> TurnRewards:
    """Pay the assistant's turns of a conversation.

    Args:
        messages: ``{"role", "content"}``; an assistant's calls stand in its ``tool_calls``, or in
            its text as Qwen writes them. Every assistant message is a turn.
        gold: the reference calls.
        answer: the reference answer; None where answers are not paid.
        options: how calls are paid.
    """
    turns: list[Parsed] = []
    answers = {}
    for message in messages:
        if message.get("role") != "assistant":
            continue
        content = message.get("content")
        text = content if isinstance(content, str) else ""
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


def _optional(pattern: Any) -> bool:
    return isinstance(pattern, AnyOf) and pattern.optional
