r"""Small recurrent policies with critics in the search world, many runs side by side.

A policy is a GRU over the tokens that it sees (Cho et al., 2014) with a layer that says the next
one. The critic is a head on the policy's states, through which nothing flows back, so that it
leaves the gradient of the policy to what is compared. All runs begin as the same policy, which has
learned from a teacher that errs often: it writes turns that can be read, and knows a little of the
task, as a language model does before it is trained by reinforcement.

Shapes: R runs; E dialogues a run; S steps; H units; M tokens that policies said (flat, all runs).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, one_hot

from normkit.optim import correction_factor
from normkit.recipes._st_ppo_arms import (
    ARMS,
    GROUP,
    Arm,
    Coefficients,
    Tokens,
    coefficients,
    group_advantage,
    limited,
)
from normkit.recipes._st_ppo_search import (
    LENGTH,
    SEEN,
    TURNS,
    VOCABULARY,
    Dialogues,
    Say,
    hops,
    play,
    teacher,
)
from normkit.recipes._st_ppo_tabular import Schedule

UNITS = 24
_CRITIC_UNITS = 16
_CRITIC_RATE = 0.01
_NOISE = 0.2
"""Tokens of the first teacher that are any token; it is right in a fifth of the dialogues."""
EVERY = 32
"""Updates between evaluations."""

Weights = list[Tensor]
"""Of a policy: seen tokens to gates ``[R, SEEN, 3H]``, states to gates ``[R, H, 3H]``, their bias
``[R, 1, 3H]``, and the layer that speaks ``[R, H, V]`` with its bias ``[R, 1, V]``; of a critic:
two layers with their biases."""


def _initial(shapes: Sequence[tuple[int, ...]], seed: int) -> Weights:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(s, generator=generator) * (s[0] ** -0.5 if s[0] > 1 else 0) for s in shapes]


_POLICY = (
    (SEEN, 3 * UNITS),
    (UNITS, 3 * UNITS),
    (1, 3 * UNITS),
    (UNITS, VOCABULARY),
    (1, VOCABULARY),
)
_CRITIC = ((UNITS, _CRITIC_UNITS), (1, _CRITIC_UNITS), (_CRITIC_UNITS, 1), (1, 1))


def advance(state: Tensor, given: Tensor, weights: Weights) -> Tensor:
    """States ``[R, E, H]`` one token later, from what it gives to the gates ``[R, E, 3H]``."""
    r, z, n = (given[..., i * UNITS : (i + 1) * UNITS] for i in range(3))
    gates = torch.baddbmm(weights[2], state, weights[1])
    a, b, c = (gates[..., i * UNITS : (i + 1) * UNITS] for i in range(3))
    new = torch.tanh(n + torch.sigmoid(r + a) * c)
    return torch.lerp(new, state, torch.sigmoid(z + b))


def states(seen: Tensor, weights: Weights) -> Tensor:
    """States after each token: ``[R, E, S]`` to ``[R, E, S, H]``."""
    runs, dialogues, steps = seen.shape
    tokens = one_hot(seen.transpose(1, 2), SEEN).float().view(runs, -1, SEEN)
    given = torch.bmm(tokens, weights[0]).view(runs, steps, dialogues, -1).unbind(1)
    found = [seen.new_zeros(runs, dialogues, UNITS, dtype=torch.float32)]
    for x in given:
        found.append(advance(found[-1], x, weights))
    return torch.stack(found[1:], 2)


def speak(state: Tensor, weights: Weights) -> Tensor:
    """Log-probabilities of the next token: ``[R, *, H]`` to ``[R, *, V]``."""
    flat = state.flatten(1, -2)
    said = torch.baddbmm(weights[4], flat, weights[3]).log_softmax(-1)
    return said.view(*state.shape[:-1], VOCABULARY)


def judge(state: Tensor, critic: Weights) -> Tensor:
    """Values of states: ``[R, M, H]`` to ``[R, M]``."""
    hidden = torch.tanh(torch.baddbmm(critic[1], state, critic[0]))
    return torch.baddbmm(critic[3], hidden, critic[2])[..., 0]


def player(weights: Weights, critic: Weights, luck: torch.Generator, seeds: int, size: int) -> Say:
    """Policies that speak and judge; notes are log-probability and value.

    Args:
        weights: of the policies; runs of the same seed stand ``seeds`` apart and share their luck.
        critic: of the critics.
        luck: of the tokens.
        seeds: number of seeds.
        size: dialogues of each run.
    """
    runs = len(weights[0])
    state = torch.zeros(runs, size, UNITS)
    run = torch.arange(runs)[:, None]

    def say(token: Tensor) -> tuple[Tensor, Tensor]:
        nonlocal state
        state = advance(state, weights[0][run, token.view(runs, size)], weights)
        chance = speak(state, weights)
        draw = torch.rand(1, seeds, size, 1, generator=luck)
        draw = draw.expand(runs // seeds, -1, -1, -1).reshape(runs, size, 1)
        said = (draw >= chance.exp().cumsum(-1)[..., :-1]).sum(-1, keepdim=True)
        note = torch.stack([chance.gather(-1, said)[..., 0], judge(state, critic)])
        return said.flatten(), note.flatten(1)

    return say


@cache
def beginner(updates: int = 300) -> Weights:
    """Weights of the policy that all runs begin with, ``R = 1``."""
    weights = [x[None].requires_grad_() for x in _initial(_POLICY, 0)]
    adam = torch.optim.Adam(weights, lr=0.01)
    luck = torch.Generator().manual_seed(0)
    question = torch.arange(len(hops("train")))
    for _ in range(updates):
        shown = play("train", question, teacher("train", question, _NOISE, luck))
        chance = speak(states(shown.seen[None, :, :-1], weights), weights)[0]
        loss = cross_entropy(chance[shown.live], shown.seen[:, 1:][shown.live])
        adam.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        adam.step()
    return [x.detach() for x in weights]


@dataclass(frozen=True)
class Curves:
    """What a training did, by run.

    Attributes:
        match: exact match on held-out questions, by evaluation ``[1 + U / 32, R]``.
        clipped: share of the tokens that are clipped, by update ``[U, R]``, and so what follows.
        gradient: norm of the gradient, before correction.
        bias: norm of the clipping bias C.
        reward: exact match in training, of the dialogues of the update.
    """

    match: Tensor
    clipped: Tensor
    gradient: Tensor
    bias: Tensor
    reward: Tensor


def train(
    names: Sequence[str], rates: Sequence[float], seeds: int, schedule: Schedule, seed: int
) -> Curves:
    """Train policies by several methods, each from the same beginner.

    Args:
        names: of the methods, one for every ``seeds`` runs.
        rates: learning rate of Adam, as many.
        seeds: runs of each.
        schedule: how much is sampled and updated.
        seed: of all runs together; the i-th of each method have the same questions and luck.
    """
    runs = len(names) * seeds
    arms = [ARMS[name] for name in names for _ in range(seeds)]
    luck = torch.Generator().manual_seed(seed)
    begin = [x.expand(runs, *x.shape[1:]) for x in beginner()]
    # Adam's step does not depend on the gradient's size: steps of one, scaled, are steps of `rate`.
    moved = [torch.zeros_like(x, memory_format=torch.contiguous_format) for x in begin]
    adam = torch.optim.Adam(moved, lr=1.0, maximize=True)
    scale = torch.tensor(rates).repeat_interleave(seeds)[:, None, None]
    critic = [x.expand(runs, -1, -1).clone().requires_grad_() for x in _initial(_CRITIC, 1)]
    critics = torch.optim.Adam(critic, lr=_CRITIC_RATE)
    match, rows = [], []
    for update in range(schedule.updates):
        weights = [(a + scale * b).requires_grad_() for a, b in zip(begin, moved, strict=True)]
        if update % EVERY == 0:
            match.append(_evaluate(weights, critic, seeds, seed))
        part = update % schedule.staleness
        if part == 0:
            sampled = _sample(weights, critic, seeds, schedule, luck)
        batch = _Batch(sampled.part(_rows(runs, schedule, part)), runs, arms)
        hidden = states(batch.seen, weights)
        logprob = speak(hidden, weights).gather(-1, batch.following)[..., 0].view(-1)[batch.place]
        found = batch.coefficients(logprob)
        kept = _backward(logprob, found.kept, weights)
        lost = _backward(logprob, found.lost, weights) if found.clipped.any() else 0 * kept
        size, bias = kept.norm(dim=1), lost.norm(dim=1)
        rows.append((batch.mean(found.clipped), size, bias, batch.reward))
        factor = [
            correction_factor(g, c, arm.correction)
            for g, c, arm in zip(size, bias, arms, strict=True)
        ]
        given = limited(kept * torch.stack(factor)[:, None])
        for x, g in zip(moved, _unflatten(given, moved), strict=True):
            x.grad = g
        adam.step()
        value = judge(hidden.detach().flatten(1, 2), critic).flatten()[batch.place]
        errors = batch.tokens.weight * (value - batch.goal).square()
        for x, g in zip(critic, torch.autograd.grad(errors.sum(), critic), strict=True):
            x.grad = g
        critics.step()
    weights = [a + scale * b for a, b in zip(begin, moved, strict=True)]
    match.append(_evaluate(weights, critic, seeds, seed))
    return Curves(torch.stack(match), *(torch.stack(x) for x in zip(*rows, strict=True)))


class _Batch:
    """The dialogues of an update, and their tokens, flat."""

    def __init__(self, dialogues: Dialogues, runs: int, arms: Sequence[Arm]) -> None:
        size = len(dialogues.reward) // runs
        live = dialogues.live
        self.seen = dialogues.seen[:, :-1].view(runs, size, -1)
        self.following = dialogues.seen[:, 1:].clamp(max=VOCABULARY - 1).view(runs, size, -1, 1)
        self.place = live.flatten().nonzero().squeeze(1)
        dialogue, step = live.nonzero(as_tuple=True)
        self.run, self._runs, self._arms = dialogue // size, runs, arms
        old, value = (x[live] for x in dialogues.said)
        weight = 1 / (live.sum(1) * size).float()[dialogue]
        self.tokens = Tokens(old, dialogue * TURNS + step // (LENGTH + 1), dialogue, weight)
        self.goal = dialogues.reward[dialogue].float()
        self.reward = dialogues.reward.view(runs, size).mean(1)
        compared = group_advantage(dialogues.reward, GROUP)[dialogue].float()
        gain = self.goal - value
        centred = gain - self.mean(gain)[self.run]
        whitened = centred / (self.mean(centred.square())[self.run].sqrt() + 1e-8)
        by_critic = torch.tensor([arm.critic for arm in arms])[self.run]
        self.advantage = torch.where(by_critic, whitened, compared)

    def mean(self, x: Tensor) -> Tensor:
        """Mean over the tokens of each run ``[R]``."""
        count = torch.bincount(self.run, minlength=self._runs)
        return (torch.bincount(self.run, x.double(), self._runs) / count).float()

    def coefficients(self, logprob: Tensor) -> Coefficients:
        """Those of each run's own method."""
        kept, lost = torch.zeros_like(logprob), torch.zeros_like(logprob)
        clipped = torch.zeros_like(logprob, dtype=torch.bool)
        for ratio in sorted({arm.ratio for arm in self._arms}):
            rows = torch.tensor([arm.ratio == ratio for arm in self._arms])[self.run]
            tokens = Tokens(*(x[rows] for x in self.tokens))
            found = coefficients(logprob[rows], self.advantage[rows], tokens, ratio)
            kept[rows], lost[rows], clipped[rows] = found
        return Coefficients(kept.detach(), lost.detach(), clipped)


def _rows(runs: int, schedule: Schedule, part: int) -> Tensor:
    whole = torch.arange(runs * schedule.staleness * schedule.dialogues)
    return whole.view(runs, schedule.staleness, schedule.dialogues)[:, part].flatten()


@torch.no_grad()
def _sample(
    weights: Weights, critic: Weights, seeds: int, schedule: Schedule, luck: torch.Generator
) -> Dialogues:
    runs, size = len(weights[0]), schedule.staleness * schedule.dialogues
    draw = torch.randint(len(hops("train")), (seeds, size // GROUP), generator=luck)
    question = draw.repeat_interleave(GROUP, 1).repeat(runs // seeds, 1).flatten()
    return play("train", question, player(weights, critic, luck, seeds, size))


@torch.no_grad()
def _evaluate(weights: Weights, critic: Weights, seeds: int, seed: int) -> Tensor:
    """Exact match of sampled dialogues, two for each held-out question ``[R]``."""
    runs, questions = len(weights[0]), torch.arange(len(hops("heldout"))).repeat(2)
    luck = torch.Generator().manual_seed(seed + 1)
    say = player(weights, critic, luck, seeds, len(questions))
    return play("heldout", questions.repeat(runs), say).reward.view(runs, -1).mean(1)


def _backward(logprob: Tensor, coefficient: Tensor, weights: Weights) -> Tensor:
    """Sum of coefficients times scores, a row for each run ``[R, P]``."""
    parts = torch.autograd.grad(logprob, weights, coefficient, retain_graph=True)
    return torch.cat([x.flatten(1) for x in parts], 1)


def _unflatten(rows: Tensor, like: Weights) -> Weights:
    parts = torch.split(rows, [x[0].numel() for x in like], 1)
    return [part.view_as(x) for part, x in zip(parts, like, strict=True)]
