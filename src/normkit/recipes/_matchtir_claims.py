"""What MatchTIR states exactly, as checks (part of the recipe :mod:`normkit.recipes.matchtir`)."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from normkit.functional.matching import METHODS, match, sinkhorn
from normkit.recipes.base import Claim, Finding, within
from normkit.rl.advantage import estimate
from normkit.rl.environments.tool_tasks import make_tasks
from normkit.rl.environments.toolbox import Toolbox
from normkit.rl.tool_calls import Parsed, ToolCall
from normkit.rl.tool_rewards import Trace, turn_rewards
from normkit.rl.tool_similarity import tool_similarity

_RAGGED = ((1.0, 0.0, 0.5), (0.0, 1.0), (0.5, 0.5, 1.0, 0.3))
_LOSING = [[1.0, 0.5], [0.6, 0.0]]
_REDUNDANT = [[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]]


def _tensor(x: Any) -> Tensor:
    return torch.tensor(x, dtype=torch.float64)


def _gap(got: Tensor, expected: Any) -> float:
    return float((got - _tensor(expected)).abs().max())


def _advantage(
    rewards: Sequence[Sequence[float]], name: str = "matchtir", **options: Any
) -> Tensor:
    rows = [(r, i, t) for i, row in enumerate(rewards) for t, r in enumerate(row)]
    index = torch.tensor([row[1:] for row in rows])
    reward, group = _tensor([row[0] for row in rows]), torch.zeros(len(rows), dtype=torch.int64)
    return estimate(name, reward, index[:, 0], index[:, 1], group, **options)


def _worked_similarity() -> Finding:
    gold = ToolCall("weather", {"city": "Paris", "unit": "C"})
    predicted = ToolCall("weather", {"city": "Paris", "days": 3})
    found = [tool_similarity(p, gold) for p in (predicted, gold, ToolCall("other"))]
    return within(_gap(_tensor(found), [0.5833333333, 1, 0]), 1e-9)


def _brute_force() -> Finding:
    generator = torch.Generator().manual_seed(0)
    error = 0.0
    for m, n in itertools.product(range(1, 6), repeat=2):
        score = torch.rand(20, m, n, generator=generator, dtype=torch.float64).mul(4).round() / 4
        wide = score if m <= n else score.mT
        ways = list(itertools.permutations(range(max(m, n)), min(m, n)))
        best = wide[:, torch.arange(min(m, n)), torch.tensor(ways)].sum(-1).amax(1)
        error = max(error, float((match(score).reward.sum(1) - best).abs().max()))
        greedy = match(score, "greedy").reward.sum(1)
        error = max(error, float((greedy - best).max()))
    return within(error, 1e-12)


def _worked_matchings() -> Finding:
    errors = [
        _gap(match(_tensor(_LOSING)).reward, [0.5, 0.6]),
        _gap(match(_tensor(_LOSING), "greedy").reward, [1, 0]),
        _gap(match(_tensor(_LOSING), "ot").reward, [0.344385, 0.186738]),
        _gap(match(_tensor(_REDUNDANT)).reward, [1, 0, 1]),
        _gap(match(_tensor(_REDUNDANT), "ot").reward, [0.25, 0.25, 0.333333]),
    ]
    return within(max(errors), 5e-5)


def _marginals() -> Finding:
    score = torch.rand(200, 6, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    plan = sinkhorn(score.round(decimals=1))
    rows, columns = (plan.sum(2) - 1 / 6).abs(), (plan.sum(1) - 1 / 4).abs()
    return within(float(max(rows.max(), columns.max())), 1e-6)


def _hard_limit() -> Finding:
    soft = match(_tensor(_LOSING), "ot", reg=1e-3).reward
    return within(_gap(soft, [0.25, 0.30]), 1e-6)


def _permutations() -> Finding:
    """Of predictions and of references, for scores without ties."""
    generator = torch.Generator().manual_seed(0)
    error = 0.0
    for method in METHODS:
        score = torch.rand(5, 4, generator=generator, dtype=torch.float64)
        plain = match(score, method).reward
        for _ in range(20):
            i, j = (torch.randperm(n, generator=generator) for n in score.shape)
            moved = match(score[i][:, j], method).reward
            error = max(error, float((moved - plain[i]).abs().max()))
    return within(error, 1e-8)


def _perfect_traces() -> Finding:
    box, short, failed = Toolbox(), 0, 0
    tasks = [*make_tasks("train"), *make_tasks("heldout")]
    traces = [Trace([Parsed([call], []) for call in task.gold], task.gold) for task in tasks]
    for task, paid in zip(tasks, turn_rewards(traces), strict=True):
        short += paid.turns != [1.0] * len(task.gold)
        failed += [box.run(call).text for call in task.gold] != list(task.results)
    return Finding(
        "contradicted" if short or failed else "holds",
        f"{len(tasks)} tasks: {short} earn less, {failed} give other results",
    )


def _worked_advantages() -> Finding:
    expected = [-0.097464, -0.562763, -0.429802, -0.946549, -0.483454]
    expected += [1.044013, 1.046217, 0.887297, 0.533744]
    zero, raw = _advantage(_RAGGED), _advantage(_RAGGED, singleton="raw")
    return within(
        max(_gap(zero, expected), _gap(raw, [*expected[:-1], 0.683744])),
        1e-6,
    )


def _one_turn() -> Finding:
    rewards = [[1.0], [0.5], [0.0], [0.25]]
    return within(float((_advantage(rewards) - _advantage(rewards, "grpo")).abs().max()), 1e-12)


def _equal_sums() -> Finding:
    """The sums are equal, the order of the rewards is not."""
    rewards = [[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0]]
    outcome, dual = _advantage(rewards, "grpo"), _advantage(rewards)
    size = float(dual.abs().min())
    return Finding(
        "holds" if float(outcome.abs().max()) == 0 and size > 0 else "contradicted",
        f"trajectory term 0, smallest dual advantage {size:.2f}",
    )


def _no_more_rollouts() -> Finding:
    task = make_tasks("train")[0]
    trace = Trace([Parsed([call], []) for call in task.gold], task.gold)
    found = turn_rewards([trace])[0].similarity
    return Finding(
        "holds" if found.numel() == len(task.gold) ** 2 else "contradicted",
        f"{found.numel()} similarities for {len(task.gold)} x {len(task.gold)} calls, 0 models",
    )


_EXACT = tuple(
    Claim(name, statement, "identity", "exact", check)
    for name, statement, check in (
        ("worked-similarity", "similarities are those worked out by hand", _worked_similarity),
        (
            "hungarian-is-optimal",
            "hard matching is the best of all matchings, and never below greedy",
            _brute_force,
        ),
        ("worked-matchings", "the card's hard, greedy and soft rewards", _worked_matchings),
        ("marginals", "the transport plan has uniform marginals", _marginals),
        ("hard-limit", "soft rewards tend to hard ones over m as reg vanishes", _hard_limit),
        (
            "permutations",
            "permuting calls permutes rewards, permuting references changes nothing",
            _permutations,
        ),
        (
            "perfect-traces",
            "every reference trace of the tool world earns 1 a turn and does what it says",
            _perfect_traces,
        ),
        ("worked-advantages", "dual-level advantages of ragged dialogues", _worked_advantages),
        ("one-turn-is-grpo", "with one turn a dialogue the estimator is GRPO", _one_turn),
        (
            "equal-sums",
            "where all sums are equal the turn level still trains",
            _equal_sums,
        ),
    )
)
CLAIMS: tuple[Claim, ...] = (
    *_EXACT,
    Claim(
        "no-reward-model",
        "rewards take m x n similarities: no reward model, no further rollouts",
        "O(m n)",
        "structural",
        _no_more_rollouts,
    ),
)
