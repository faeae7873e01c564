"""A small policy over call templates in the tool world, many runs side by side.

Every task of training offers its reference calls, for each of them the same tool with the arguments
of another task, three calls of tools that it does not need, and to answer. All of them were run
once, so that a dialogue is a walk through tables. A reference call whose arguments hold results
that are not known yet is made with a question mark for each, and fails.

The policy is a table: logits of the choices by kind of task and by which results are known. It sees
no arguments, so what it learns carries over to all tasks of a kind.

Shapes: R runs; K kinds; Q tasks; A choices; M = 64 sets of known results; n <= 6 reference calls;
E dialogues of all runs; T turns; N rows.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

import torch
from torch import Tensor

from normkit.functional.matching import Method, match
from normkit.rl.advantage import estimate
from normkit.rl.environments.tool_tasks import Task, make_tasks
from normkit.rl.environments.toolbox import Toolbox
from normkit.rl.tool_calls import ToolCall
from normkit.rl.tool_rewards import answer_f1
from normkit.rl.tool_similarity import similarity_matrix

LONGEST = 6
DISTRACTORS = 3
CHOICES = 2 * LONGEST + DISTRACTORS + 1
ANSWER = CHOICES - 1
SETS = 2**LONGEST
TURNS = 12
"""A dialogue ends here: twice the longest reference trace."""

Kind = Literal["needed", "repeated", "wrong", "unneeded"]
KINDS: tuple[Kind, ...] = ("needed", "repeated", "wrong", "unneeded")


@dataclass(frozen=True)
class Setting:
    """How a run is rewarded and credited.

    Attributes:
        estimator: of :mod:`normkit.rl.advantage`.
        options: of the estimator.
        reward: "outcome", the answer's F1 alone, or how calls are matched.
    """

    estimator: str
    options: Mapping[str, Any]
    reward: Literal["outcome"] | Method


_PUBLISHED = {"ddof": 1, "eps": 1e-6}
SETTINGS: Mapping[str, Setting] = {
    "outcome": Setting("grpo", _PUBLISHED, "outcome"),
    "trajectory": Setting("grpo", _PUBLISHED, "hungarian"),
    "turn": Setting("turn", {**_PUBLISHED, "gamma": 0.9}, "hungarian"),
    "dual-km": Setting("matchtir", {}, "hungarian"),
    "dual-ot": Setting("matchtir", {}, "ot"),
}


@dataclass(frozen=True)
class Tables:
    """What the choices of every task do.

    Attributes:
        kind: kind of each task ``[Q]``.
        length: reference calls of each kind ``[K]``.
        names: of the kinds.
        there: choices that a kind has ``[K, A]``.
        needs: results that a choice needs, as a set ``[K, A]``; of reference calls only.
        gives: result that a reference call gives, as a set ``[K, A]``; 0 for other choices.
        ours: whether a choice calls a tool that the reference uses ``[Q, A]``.
        similarity: similarity of each choice to the reference calls ``[Q, 2, A, n]``, by whether
            the results that it needs are known.
        answer: F1 of the answer by the set of known results ``[K, M]``.
    """

    kind: Tensor
    length: Tensor
    names: list[str]
    there: Tensor
    needs: Tensor
    gives: Tensor
    ours: Tensor
    similarity: Tensor
    answer: Tensor


@cache
def tables() -> Tables:
    """Run all choices of the training tasks."""
    tasks = make_tasks("train")
    box = Toolbox()
    names = list(dict.fromkeys(task.template.name for task in tasks))
    kind = torch.tensor([names.index(task.template.name) for task in tasks])
    there = torch.zeros(len(names), CHOICES, dtype=torch.bool)
    needs = torch.zeros(len(names), CHOICES, dtype=torch.int64)
    gives = torch.zeros_like(needs)
    length = torch.zeros(len(names), dtype=torch.int64)
    ours = torch.zeros(len(tasks), CHOICES, dtype=torch.bool)
    similarity = torch.zeros(len(tasks), 2, CHOICES, LONGEST, dtype=torch.float64)
    answer = torch.zeros(len(names), SETS)
    for q, task in enumerate(tasks):
        n, k = len(task.gold), int(kind[q])
        mates = [t for t in tasks if t.template is task.template and t is not task]
        choices = {
            **dict(enumerate(task.gold)),
            **{LONGEST + i: _other_arguments(task, i, mates, box) for i in range(n)},
            **{2 * LONGEST + i: call for i, call in enumerate(_distractors(task, tasks))},
        }
        places, made = list(choices), list(choices.values())
        wanted = {call.name for call in task.gold}
        ours[q, places] = torch.tensor([call.name in wanted for call in made])
        similarity[q, 1, places, :n] = similarity_matrix(made, task.gold)
        blind = [_blind(task, i) if i < n else call for i, call in choices.items()]
        assert not any(box.run(call).ok for call in blind[:n] if call not in task.gold)
        similarity[q, 0, places, :n] = similarity_matrix(blind, task.gold)
        there[k, [*places, ANSWER]] = True
        length[k] = n
        for i in range(n):
            needs[k, i] = sum(1 << j for j in task.template.needs(i))
            gives[k, i] = 1 << i
        answer[k] = torch.tensor([_answered(task, known) for known in range(SETS)])
    return Tables(kind, length, names, there, needs, gives, ours, similarity, answer)


def _other_arguments(task: Task, step: int, mates: list[Task], box: Toolbox) -> ToolCall:
    """The step's tool with the arguments of another task, which give nothing that is needed."""
    for mate in mates:
        call = mate.gold[step]
        found = (call.name, box.run(call).text)
        needed = {(c.name, r) for c, r in zip(task.gold, task.results, strict=True)}
        if call.name == task.gold[step].name and found not in needed:
            return call
    raise AssertionError(f"no other arguments for step {step} of {task.id}")


def _distractors(task: Task, tasks: tuple[Task, ...]) -> list[ToolCall]:
    """Calls of tools that the task does not need, from other tasks."""
    wanted = {call.name for call in task.gold}
    found: dict[str, ToolCall] = {}
    for other in tasks:
        for call in other.gold:
            if call.name not in wanted:
                found.setdefault(call.name, call)
    return list(found.values())[:DISTRACTORS]


def _blind(task: Task, step: int) -> ToolCall:
    """A reference call whose arguments lack the results of other calls."""
    if not task.template.needs(step):
        return task.gold[step]
    name, arguments = task.template.steps[step]
    given = task.gold[step].arguments
    # Where a result stands in the name that was searched for, nothing of the call is known.
    hidden = {k for k, v in arguments.items() if re.search(r"\{\d\}", str(v))} or set(given)
    return ToolCall(name, {k: "?" if k in hidden else v for k, v in given.items()})


def _answered(task: Task, known: int) -> float:
    results = [r if known >> i & 1 else "?" for i, r in enumerate(task.results)]
    return answer_f1(task.template.answer.format(*results), task.answer)


@dataclass(frozen=True)
class Rollouts:
    """Dialogues of all runs.

    Attributes:
        task: of each dialogue ``[E]``.
        choice: of each turn ``[E, T]``.
        known: set of results known before each turn ``[E, T]``.
        live: whether the turn happened ``[E, T]``.
    """

    task: Tensor
    choice: Tensor
    known: Tensor
    live: Tensor

    @property
    def call(self) -> Tensor:
        """Whether the turn called a tool ``[E, T]``."""
        return self.live & (self.choice != ANSWER)

    @property
    def able(self) -> Tensor:
        """Whether the results that the choice needs were known ``[E, T]``."""
        needs = tables().needs[tables().kind[self.task][:, None], self.choice]
        return (needs & ~self.known) == 0

    def kinds(self) -> dict[Kind, Tensor]:
        """What each call was ``[E, T]``."""
        table, able = tables(), self.able
        gives = table.gives[table.kind[self.task][:, None], self.choice]
        needed = self.call & able & (gives & ~self.known > 0)
        made = 2 * self.choice + able.long()
        again = (made[:, :, None] == made[:, None, :]).tril(-1)
        repeated = self.call & ~needed & (again & self.call[:, None, :]).any(2)
        ours = table.ours[self.task[:, None], self.choice]
        wrong = self.call & ~needed & ~repeated & ours
        return {
            "needed": needed,
            "repeated": repeated,
            "wrong": wrong,
            "unneeded": self.call & ~needed & ~repeated & ~wrong,
        }

    def rewards(self, how: Literal["outcome"] | Method) -> Tensor:
        """Reward of each turn ``[E, T]``, float64."""
        table = tables()
        kind = table.kind[self.task][:, None]
        answered = self.live & (self.choice == ANSWER)
        reward = torch.where(answered, table.answer[kind, self.known], 0).double()
        if how == "outcome":
            return reward
        score = table.similarity[self.task[:, None], self.able.long(), self.choice]
        columns = torch.arange(LONGEST) < table.length[kind]
        return reward + match(score, how, rows=self.call, columns=columns).reward


def roll_out(policy: Tensor, groups: int, group_size: int, generator: torch.Generator) -> Rollouts:
    """Play ``groups x group_size`` dialogues for each kind of task and run.

    Args:
        policy: probabilities of the choices ``[R, K, M, A]``.
        groups: tasks of each kind.
        group_size: dialogues of a task.
        generator: of all random numbers; as many are drawn whatever the policy.
    """
    table = tables()
    runs, kinds = policy.shape[:2]
    of_kind = torch.stack([(table.kind == k).nonzero().squeeze(1) for k in range(kinds)])
    draw = torch.randint(of_kind.shape[1], (runs, kinds, groups), generator=generator)
    task = of_kind[torch.arange(kinds)[:, None], draw].flatten().repeat_interleave(group_size)
    size = len(task)
    run = torch.arange(size) // (kinds * groups * group_size)
    kind = table.kind[task]
    edges = policy.cumsum(-1)[..., :-1].flatten(0, 2)
    known = torch.zeros(size, dtype=torch.int64)
    alive = torch.ones(size, dtype=torch.bool)
    turns: list[tuple[Tensor, Tensor, Tensor]] = []
    for _ in range(TURNS):
        luck = torch.rand(size, 1, generator=generator, dtype=policy.dtype)
        choice = (luck >= edges[(run * kinds + kind) * SETS + known]).sum(1)
        turns.append((choice, known, alive))
        able = (table.needs[kind, choice] & ~known) == 0
        known = known | torch.where(alive & able, table.gives[kind, choice], 0)
        alive = alive & (choice != ANSWER)
    columns = [torch.stack(x, 1) for x in zip(*turns, strict=True)]
    return Rollouts(task, *columns)


def credit(rollouts: Rollouts, setting: Setting, runs: int, group_size: int) -> Tensor:
    """Advantage of each turn ``[E, T]``; runs are batches of their own."""
    size = len(rollouts.task)
    dialogue, turn = rollouts.live.nonzero(as_tuple=True)
    reward = rollouts.rewards(setting.reward)[dialogue, turn]
    batch = dialogue // (size // runs)
    rows = (reward, dialogue, turn, dialogue // group_size)
    advantage = estimate(setting.estimator, *rows, batch=batch, **setting.options)
    return torch.zeros(size, TURNS, dtype=torch.float64).index_put((dialogue, turn), advantage)


def gradient(rollouts: Rollouts, advantage: Tensor, policy: Tensor) -> Tensor:
    """Mean over a run's turns of ``A grad log pi``, by the logits ``[R, K, M, A]``."""
    runs, kinds = policy.shape[:2]
    run = torch.arange(len(rollouts.task)) // (len(rollouts.task) // runs)
    cell = (run * kinds + tables().kind[rollouts.task])[:, None] * SETS + rollouts.known
    place = (cell * CHOICES + rollouts.choice)[rollouts.live]
    total = torch.bincount(place, advantage[rollouts.live], policy.numel()).view_as(policy)
    turns = rollouts.live.view(runs, -1).sum(1).view(-1, 1, 1, 1)
    return (total - policy * total.sum(-1, keepdim=True)) / turns


@dataclass(frozen=True)
class Score:
    """How good dialogues are, by run and kind of task ``[R, K]``.

    Attributes:
        f1: solve-F1.
        answer: F1 of the answer.
        redundant: calls a dialogue that were repeated or of tools that are not needed.
        wrong: share of the calls that had wrong arguments.
    """

    f1: Tensor
    answer: Tensor
    redundant: Tensor
    wrong: Tensor


def score(rollouts: Rollouts, runs: int) -> Score:
    """Measure dialogues."""
    table, kinds = tables(), rollouts.kinds()
    count = {name: x.sum(1).double() for name, x in kinds.items()}
    calls = rollouts.call.sum(1).double()
    solved, needed = count["needed"], table.length[table.kind[rollouts.task]]

    def mean(x: Tensor) -> Tensor:
        return x.view(runs, len(table.names), -1).mean(-1)

    wrong, made = mean(count["wrong"]), mean(calls)
    return Score(
        mean(2 * solved / (calls + needed)),
        mean(rollouts.rewards("outcome").sum(1)),
        mean(count["repeated"] + count["unneeded"]),
        torch.where(made > 0, wrong / made.clamp(min=1e-12), 0),
    )


@dataclass(frozen=True)
class Trained:
    """What training did.

    Attributes:
        curve: solve-F1 of the dialogues of each update, in the mean over kinds ``[U, R]``.
        final: of the trained policies.
    """

    curve: Tensor
    final: Score


def train(
    setting: Setting, rates: Tensor, updates: int, seed: int, groups: int = 1, group_size: int = 8
) -> Trained:
    """Train one policy per learning rate, all from the uniform policy.

    Args:
        setting: how turns are rewarded and credited.
        rates: learning rate of Adam for each run ``[R]``.
        updates: number of updates U, each of ``groups x group_size`` dialogues a kind.
        seed: of all runs together; run r has the same luck in every setting.
        groups: tasks of each kind in an update.
        group_size: dialogues of a task.
    """
    table = tables()
    generator = torch.Generator().manual_seed(seed)
    runs = len(rates)
    absent = ~table.there[None, :, None, :]
    weight = torch.zeros(runs, len(table.names), SETS, CHOICES, dtype=torch.float64)
    # Adam's step does not depend on the gradient's size: steps of one, scaled, are steps of `rate`.
    adam = torch.optim.Adam([weight], lr=1.0, maximize=True)
    scale = rates.double().view(-1, 1, 1, 1)
    curve = []

    def policy() -> Tensor:
        return torch.softmax((scale * weight).masked_fill(absent, -torch.inf), -1)

    for _ in range(updates):
        now = policy()
        rollouts = roll_out(now, groups, group_size, generator)
        weight.grad = gradient(rollouts, credit(rollouts, setting, runs, group_size), now)
        adam.step()
        curve.append(score(rollouts, runs).f1.mean(1))
    final = score(roll_out(policy(), 4, 16, torch.Generator().manual_seed(seed + 1)), runs)
    return Trained(torch.stack(curve), final)


def half_trained(runs: int) -> Tensor:
    """A policy that has learned a little, by a rule that favours no estimator ``[R, K, M, A]``.

    Calls that would give something new are as likely as eight others, and so is to answer when the
    answer is known.
    """
    table = tables()
    known = torch.arange(SETS)[None, :, None]
    able = (table.needs[:, None] & ~known) == 0
    new = able & (table.gives[:, None] & ~known > 0)
    new[..., ANSWER] = table.answer == 1
    weight = (1.0 + 7.0 * new.double()) * table.there[:, None]
    return (weight / weight.sum(-1, keepdim=True)).expand(runs, -1, -1, -1)
