r"""Policy gradients in the tabular world: many runs side by side, one estimator call for all.

A run rolls out its dialogues, credits their turns by an estimator of :mod:`normkit.rl.advantage`
and takes one Adam step along the mean over turns (MAPO's token mean, all replies being as long)::

    g = (1 / n) sum_{i,t} A_{i,t} grad log pi(a_{i,t} | c_{i,t})

Nothing loops over runs, prompts or dialogues: only over turns and updates.

Shapes: R runs; C situations; A replies; D dialogues of all runs; N turns (flat rows); F features.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from normkit.errors import InputError
from normkit.rl.advantage import estimate, get_estimator
from normkit.rl.environments.tabular import TabularWorld
from normkit.rl.returns import monte_carlo_returns

_CRITIC_GAMMA = 0.99
"""MAPO's scripts discount by this in their PPO baseline, as our estimator does by default."""


@dataclass(frozen=True)
class Rows:
    """Turns of all runs, dialogue by dialogue.

    Attributes:
        run: ``[N]``.
        dialogue: ``[N]``; runs do not share numbers.
        turn: ``[N]``.
        group: dialogues of one run that started alike ``[N]``.
        state: state before the reply ``[N]``.
        reply: ``[N]``.
        reward: distance closed ``[N]``, float32.
        gain: return of each run's dialogues, in the mean ``[R]``.
        success: share of each run's dialogues that met all needs ``[R]``.
    """

    run: Tensor
    dialogue: Tensor
    turn: Tensor
    group: Tensor
    state: Tensor
    reply: Tensor
    reward: Tensor
    gain: Tensor
    success: Tensor


@dataclass(frozen=True)
class History:
    """What training did.

    Attributes:
        gain: mean return of the dialogues of each update ``[U, R]``.
        success: share of them that succeeded ``[U, R]``.
        grad_norm: norm of the estimated gradient of each update ``[U, R]``.
        policy: probabilities of the replies at the end ``[R, C, A]``.
    """

    gain: Tensor
    success: Tensor
    grad_norm: Tensor
    policy: Tensor


def roll_out(
    world: TabularWorld,
    policy: Tensor,
    prompts: int,
    group_size: int,
    generator: torch.Generator,
) -> Rows:
    """Play ``prompts x group_size`` dialogues per run.

    Args:
        world: the world.
        policy: probabilities of the replies ``[R, C, A]``.
        prompts: starting points per run.
        group_size: dialogues from each.
        generator: of all random numbers. As many are drawn whatever the policy, so that runs of
            different estimators by the same seed share starting points and luck.
    """
    runs, _, replies = policy.shape
    size = runs * prompts * group_size
    below = policy.cumsum(-1)[..., :-1].flatten(0, 1).float()
    dialogue = torch.arange(size)
    run = dialogue // (prompts * group_size)
    edge = world.start.cumsum(0)
    draw = torch.rand(runs * prompts, dtype=torch.float64, generator=generator)
    begin = torch.searchsorted(edge, draw * edge[-1], right=True).clamp(max=world.states - 1)
    state = begin.repeat_interleave(group_size)
    states, chosen = [state], []
    for _ in range(world.horizon):
        luck = torch.rand(2, size, generator=generator)
        line = below[run * world.situations + world.situation[state]]
        reply = (luck[0, :, None] >= line).sum(-1)
        cell = state * replies + reply
        missed = luck[1] >= world.landing.view(-1)[cell]
        state = world.next.view(-1)[2 * cell + missed]
        chosen.append(reply)
        states.append(state)
    path = torch.stack(states, 1)
    row, turn = (~world.met[path[:, :-1]]).nonzero(as_tuple=True)
    distance = world.distance[path].float()
    closed = (distance[:, 0] - distance[:, -1]).view(runs, -1)
    return Rows(
        run=run[row],
        dialogue=row,
        turn=turn,
        group=row // group_size,
        state=path[row, turn],
        reply=torch.stack(chosen, 1)[row, turn],
        reward=distance[row, turn] - distance[row, turn + 1],
        gain=closed.mean(1),
        success=world.met[path[:, -1]].view(runs, -1).float().mean(1),
    )


class Critic:
    """A value for every turn: ridge regression of returns on turn, user and needs.

    The features are one-hot tables (turn, user, need on each of three axes); older batches count
    less by a factor per batch. The fit is exact, so the critic has no learning rate to get wrong.

    Args:
        world: the world.
        runs: number of runs, each with a critic of its own.
        memory: weight that a batch keeps when the next one comes.
        ridge: penalty, in turns.
    """

    def __init__(
        self, world: TabularWorld, runs: int, memory: float = 0.8, ridge: float = 1.0
    ) -> None:
        widths = torch.tensor([0, world.horizon, 3, *(world.top + 1,) * 3]).cumsum(0)
        self._world, self._memory, self._offset = world, memory, widths[:-1]
        self._ridge = ridge * torch.eye(int(widths[-1]), dtype=torch.float64)
        shape = (runs, *self._ridge.shape)
        self._square = torch.zeros(shape, dtype=torch.float64)
        self._cross = torch.zeros(shape[:2], dtype=torch.float64)
        self._weight = torch.zeros_like(self._cross)

    def value(self, rows: Rows) -> Tensor:
        """Value before every turn ``[N]``; zero until the first fit."""
        return self._weight.flatten()[self._features(rows)].sum(1)

    def fit(self, rows: Rows) -> None:
        """Learn from the returns of a batch."""
        target = monte_carlo_returns(rows.reward.double(), rows.dialogue, rows.turn, _CRITIC_GAMMA)
        feature = self._features(rows)
        width = self._ridge.shape[0]
        pairs = feature[:, :, None] * width + (feature % width)[:, None]
        counts = torch.bincount(pairs.flatten(), minlength=self._square.numel())
        sums = torch.zeros_like(self._cross).view(-1)
        sums.index_add_(0, feature.flatten(), target.repeat_interleave(feature.shape[1]))
        self._square = self._memory * self._square + counts.view_as(self._square)
        self._cross = self._memory * self._cross + sums.view_as(self._cross)
        self._weight = torch.linalg.solve(self._square + self._ridge, self._cross)

    def _features(self, rows: Rows) -> Tensor:
        user, needs = self._world.persona[rows.state], self._world.deficits[rows.state]
        local = torch.cat([rows.turn[:, None], user[:, None], needs], 1) + self._offset
        return rows.run[:, None] * self._ridge.shape[0] + local


def credit(name: str, rows: Rows, critic: Critic | None = None, **options: Any) -> Tensor:
    """Advantage of every turn ``[N]``; each run is a batch of its own.

    Estimators that compare anchor states get the states, those that need values get the critic's.

    Raises:
        InputError: for an unknown estimator or option, or one that needs a critic without one.
    """
    estimator = get_estimator(name)
    if "anchor" in estimator.options:
        options["anchor"] = rows.state
    if "value" in estimator.needs:
        if critic is None:
            raise InputError(f"critic: {name} needs one")
        options["value"] = critic.value(rows)
    index = (rows.dialogue, rows.turn, rows.group)
    return estimate(name, rows.reward, *index, batch=rows.run, **options)


def policy_gradient(world: TabularWorld, rows: Rows, advantage: Tensor, policy: Tensor) -> Tensor:
    """Mean over a run's turns of ``A grad log pi``, by the logits ``[R, C, A]``."""
    runs, situations, replies = policy.shape
    place = (rows.run * situations + world.situation[rows.state]) * replies + rows.reply
    total = torch.bincount(place, advantage.double(), runs * situations * replies)
    total = total.view_as(policy)
    turns = torch.bincount(rows.run, minlength=runs).clamp(min=1)
    return (total - policy * total.sum(-1, keepdim=True)) / turns[:, None, None]


def train(
    world: TabularWorld,
    name: str,
    rates: Tensor,
    updates: int,
    group_size: int,
    seed: int,
    episodes: int = 64,
    options: Mapping[str, Any] | None = None,
) -> History:
    """Train one policy per learning rate, all from the uniform policy.

    Args:
        world: the world.
        name: of the estimator.
        rates: learning rate of Adam for each run ``[R]``.
        updates: number of updates, U.
        group_size: dialogues from the same start.
        seed: of all runs together; run r is the same for every estimator.
        episodes: dialogues per update and run.
        options: of the estimator.

    Raises:
        InputError: for groups that do not divide the episodes.
    """
    if group_size < 1 or episodes % group_size:
        raise InputError(f"group_size must divide {episodes} episodes, got {group_size}")
    generator = torch.Generator().manual_seed(seed)
    runs = rates.numel()
    # Adam's step does not depend on the gradient's size: steps of one, scaled, are steps of `rate`.
    weight = torch.zeros(runs, world.situations, world.replies, dtype=torch.float64)
    scale = rates.double()[:, None, None]
    adam = torch.optim.Adam([weight], lr=1.0, maximize=True)
    critic = Critic(world, runs) if "value" in get_estimator(name).needs else None
    history: list[tuple[Tensor, Tensor, Tensor]] = []
    for _ in range(updates):
        policy = torch.softmax(scale * weight, -1)
        rows = roll_out(world, policy, episodes // group_size, group_size, generator)
        advantage = credit(name, rows, critic, **(options or {}))
        weight.grad = policy_gradient(world, rows, advantage, policy)
        adam.step()
        if critic is not None:
            critic.fit(rows)
        history.append((rows.gain, rows.success, weight.grad.flatten(1).norm(dim=1)))
    gain, success, norm = (torch.stack(x) for x in zip(*history, strict=True))
    return History(gain, success, norm, torch.softmax(scale * weight, -1))


def ascend(world: TabularWorld, share: float, rate: float = 0.1, limit: int = 500) -> Tensor:
    """Policy part of the way to the optimum, found by exact gradients that favour no estimator.

    Args:
        world: the world.
        share: of the way from the uniform policy's value to the optimum, 0..1.
        rate: learning rate of Adam.
        limit: number of updates at most.

    Returns:
        Probabilities of the replies ``[C, A]``, at the first update at or past that value.
    """
    weight = torch.zeros(world.situations, world.replies, dtype=torch.float64)
    adam = torch.optim.Adam([weight], lr=rate, maximize=True)
    best, goal = float(world.start @ world.plan()), None
    for _ in range(limit):
        policy = torch.softmax(weight, -1)
        found = world.exact(policy)
        goal = found.value + share * (best - found.value) if goal is None else goal
        if found.value >= goal:
            break
        weight.grad = found.gradient
        adam.step()
    return torch.softmax(weight, -1)


@dataclass(frozen=True)
class Probe:
    """How good one batch's estimates are.

    Attributes:
        correlation: of the estimated with the exact advantage over the turns of a run ``[R]``.
        cosine: of the estimated with the exact policy gradient ``[R]``.
        survivors: mean number of a group's dialogues alive at each turn ``[T]``.
    """

    correlation: Tensor
    cosine: Tensor
    survivors: Tensor


def probe(
    world: TabularWorld,
    policy: Tensor,
    names: Sequence[str],
    runs: int,
    group_size: int,
    seed: int,
    episodes: int = 64,
    options: Mapping[str, Mapping[str, Any]] | None = None,
) -> dict[str, Probe]:
    """Compare estimates with the truth at one policy, all estimators on the same dialogues.

    Critics learn from four earlier batches of the same size.

    Args:
        world: the world.
        policy: probabilities of the replies ``[C, A]``.
        names: of the estimators.
        runs: batches, R.
        group_size: dialogues from the same start.
        seed: of the dialogues.
        episodes: dialogues per batch.
        options: of each estimator.
    """
    generator = torch.Generator().manual_seed(seed)
    every = policy.double().expand(runs, -1, -1)
    prompts = episodes // group_size
    critic = Critic(world, runs, memory=1.0)
    for _ in range(4):
        critic.fit(roll_out(world, every, prompts, group_size, generator))
    rows = roll_out(world, every, prompts, group_size, generator)
    exact = world.exact(policy)
    truth = exact.advantage[rows.turn, rows.state, rows.reply]
    survivors = torch.bincount(rows.turn, minlength=world.horizon) / (runs * prompts)
    found = {}
    for name in names:
        advantage = credit(name, rows, critic, **(options or {}).get(name, {})).double()
        gradient = policy_gradient(world, rows, advantage, every).flatten(1)
        cosine = torch.cosine_similarity(gradient, exact.gradient.view(1, -1), dim=1)
        found[name] = Probe(_correlation(advantage, truth, rows.run, runs), cosine, survivors)
    return found


def _correlation(x: Tensor, y: Tensor, run: Tensor, runs: int) -> Tensor:
    """Pearson correlation within each run ``[R]``; 0 where one side is constant."""

    def mean(value: Tensor) -> Tensor:
        return torch.bincount(run, value, runs) / torch.bincount(run, minlength=runs).clamp(min=1)

    x, y = x - mean(x)[run], y - mean(y)[run]
    scale = (mean(x * x) * mean(y * y)).sqrt()
    return torch.where(scale > 0, mean(x * y) / scale, 0)
