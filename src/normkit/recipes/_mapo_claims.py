"""What MAPO's paper states, as checks (part of the recipe :mod:`normkit.recipes.mapo`)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from normkit.recipes.base import Claim, Finding, within
from normkit.rl.advantage import ESTIMATORS, estimate, get_estimator
from normkit.rl.environment import Reply
from normkit.rl.environments.empathy import EmpathyConfig, EmpathyEnvironment
from normkit.rl.environments.epm import EPMConfig
from normkit.rl.environments.scenario import builtin_scenarios
from normkit.rl.judge import Failed, JudgeRequest
from normkit.rl.rubric import Progress

_CARD = ([1.0, 0, 2, 3, -1, 1], [0, 0, 0, 1, 1, 1], [0, 1, 2, 0, 1, 2])


def _estimate(name: str, rewards: Sequence[float], **options: Any) -> torch.Tensor:
    _, dialogue, turn = _CARD
    n = len(rewards)
    index = [torch.tensor(x[:n]) for x in (dialogue, turn, [0] * n)]
    return estimate(name, torch.tensor(rewards, dtype=torch.float64), *index, **options)


def _worked_numbers() -> Finding:
    expected = torch.tensor([0, 0.112702, 0.887298, 0.774597, -1.274597, -0.5], dtype=torch.float64)
    got = _estimate("mapo", _CARD[0], gamma=1.0)
    return within(float((got - expected).abs().max()), 1e-6)


def _reduces_to_grpo() -> Finding:
    reward = torch.tensor([1.0, 2, 5, 0, 3], dtype=torch.float64)
    dialogue, turn = torch.arange(5), torch.zeros(5, dtype=torch.int64)
    group = torch.zeros(5, dtype=torch.int64)
    grpo = estimate("grpo", reward, dialogue, turn, group)
    errors = [
        (estimate("mapo", reward, dialogue, turn, group, alpha=a, ddof=1, eps=1e-6) - grpo)
        .abs()
        .max()
        for a in (0.0, 0.3, 0.5, 1.0)
    ]
    return within(float(max(errors)), 1e-9)


def _single_levels() -> Finding:
    pairs = (("turn", 1.0), ("batch", 0.0))
    errors = [
        (_estimate("mapo", _CARD[0], alpha=a) - _estimate(name, _CARD[0])).abs().max()
        for name, a in pairs
    ]
    return within(float(max(errors)), 1e-12)


def _turn_shift() -> Finding:
    shifted = [r + c for r, c in zip(_CARD[0], (5, -3, 11, 5, -3, 11), strict=True)]
    difference = _estimate("turn", shifted) - _estimate("turn", _CARD[0])
    return within(float(difference.abs().max()), 1e-6)


def _no_critic() -> Finding:
    needs = get_estimator("mapo").needs
    others = [e.name for e in ESTIMATORS.values() if e.needs]
    return Finding(
        "contradicted" if needs else "holds",
        f"{len(needs)} inputs from a value network",
        {"needs": list(needs), "estimators_with_a_critic": others},
    )


class _Counting:
    """A judge that finds nothing and counts what it is asked."""

    name = "counting"
    asked = 0

    def judge(self, requests: Sequence[JudgeRequest]) -> list[Progress | Failed]:
        self.asked += len(requests)
        return [Progress() for _ in requests]


def _judge_calls() -> Finding:
    group_size, turns = 4, 5
    judge = _Counting()
    environment = EmpathyEnvironment(
        builtin_scenarios("train")[:1], [], judge, config=EmpathyConfig(EPMConfig(max_turns=turns))
    )
    task = environment.tasks("train")[0]
    sessions = [environment.start(task, seed) for seed in range(group_size)]
    for _ in range(turns):
        environment.step(sessions, [Reply("I hear you.")] * group_size)
    branching = sum(group_size**t for t in range(1, turns + 1))
    return Finding(
        "holds" if judge.asked == group_size * turns else "contradicted",
        f"{judge.asked} judgements for {group_size} dialogues of {turns} turns "
        f"(branching at every turn: {branching})",
        {"judgements": judge.asked, "dialogues": group_size, "turns": turns},
    )


CLAIMS: list[Claim] = [
    Claim(
        "worked-numbers",
        "the mixed advantage of two dialogues of three turns is the one worked out by hand",
        "identity",
        "exact",
        _worked_numbers,
    ),
    Claim(
        "one-turn-is-grpo",
        "with one turn a dialogue MAPO is GRPO, whatever alpha",
        "identity",
        "exact",
        _reduces_to_grpo,
    ),
    Claim(
        "single-levels",
        "alpha = 1 is turn-level normalization alone, alpha = 0 batch-level alone",
        "identity",
        "exact",
        _single_levels,
    ),
    Claim(
        "turn-shift",
        "a constant added to all rewards of a turn leaves the turn-level term as it was",
        "identity",
        "exact",
        _turn_shift,
    ),
    Claim(
        "no-critic", "no value network is trained", "0 extra parameters", "structural", _no_critic
    ),
    Claim(
        "judge-calls",
        "one judgement a turn and one rollout a dialogue, as for GRPO",
        "turns x G, not G^turns",
        "structural",
        _judge_calls,
    ),
]
