r"""A small world of supportive dialogues in which everything can be computed.

The world is modelled on EMPA (arXiv 2603.00552), the world of MAPO (arXiv 2603.06194): the state
holds the unmet need on three axes, a reply moves it by points of EMPA's rubric, and a turn earns
the distance it closed. Here the needs are whole points d on a lattice, counted from the box within
which a need is met, and a reply either lands or misses::

    d' = clamp(d - v, 0, top)        v: points of the reply, by whether it landed
    r = |d| - |d'|                   incremental distance reward

A reply that goes deep mostly misses while a need that this user puts before it is open: what pays
at once and what pays in the end differ. A dialogue ends when all needs are met, or at the horizon.
Initial needs follow the published statistics of EMPA's scenarios, scaled to the horizon so that
short dialogues can succeed too.

Policies are tables over *situations*: who the user is, and whether each need is met, small or
large. They do not see the turn. The optimum knows state and turn.

Differences from EMPA: needs neither overshoot nor grow beyond the lattice, the user is one of
three, success needs no minimum of turns, there is no failure, and the judge never errs.

Shapes: S states; C situations; A replies; T turns; R policies.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from normkit.errors import InputError
from normkit.rl.environments.epm import increment
from normkit.rl.rubric import AxisLevels, Progress

Triple = tuple[int, int, int]


class Reply(NamedTuple):
    """A type of reply.

    Attributes:
        name: its name.
        aim: axis (0 cognitive, 1 affective, 2 proactive) whose earlier needs decide how it lands.
        deep: whether it needs them to be small.
        lands: level of the rubric per axis when it lands, -2..2; negative is a setback.
        misses: the same when it misses.
    """

    name: str
    aim: int
    deep: bool
    lands: Triple
    misses: Triple


REPLIES: tuple[Reply, ...] = (
    Reply("asks about the facts", 0, False, (1, 0, 0), (0, 0, 0)),
    Reply("says what it means to them", 0, True, (2, 0, 0), (-1, 0, 0)),
    Reply("accepts the feeling", 1, False, (0, 1, 0), (0, 0, 0)),
    Reply("names the feeling and its reason", 1, True, (0, 2, 0), (0, -1, 0)),
    Reply("affirms an effort", 2, False, (0, 0, 1), (0, 0, 0)),
    Reply("finds a step of their own", 2, True, (0, 0, 2), (0, 0, -1)),
    Reply("ties facts to feeling", 1, True, (1, 1, 0), (0, -1, 0)),
    Reply("ties feeling to strength", 2, True, (0, 1, 1), (0, -1, 0)),
    Reply("cheers up", 1, False, (0, 1, 0), (0, -2, 0)),
    Reply("advises", 2, True, (1, 0, 2), (-1, -1, -1)),
)


class Persona(NamedTuple):
    """A kind of user: the order in which needs want to be met, and a reply that mostly misses."""

    order: Triple
    dislikes: int


PERSONAS: tuple[Persona, ...] = (
    Persona((0, 1, 2), 8),
    Persona((1, 0, 2), 0),
    Persona((2, 0, 1), 3),
)

_LANDS = {(False, True): 0.9, (False, False): 0.6, (True, True): 0.8, (True, False): 0.2}
"""Probability of landing by (deep, the user is ready for it)."""
_DISLIKED = 0.2
_START = ((17.17, 3.00, 7, 21), (19.11, 4.39, 3, 27), (19.02, 3.89, 7, 27))
"""Mean, deviation, least and largest initial need per axis, in points, of dialogues of 50 turns."""
_START_TURNS = 50


@dataclass(frozen=True)
class Exact:
    """What a policy is worth, exactly.

    Attributes:
        occupancy: probability of being in a state with the dialogue going on ``[T, S]``.
        q: expected return after a reply ``[T, S, A]``.
        advantage: ``q`` minus its mean under the policy ``[T, S, A]``.
        value: expected return of a whole dialogue.
        gradient: derivative by the logits of ``sum_t E[q_t]``, the occupancy held fixed ``[C, A]``;
            for the plain return this is the policy gradient.
    """

    occupancy: Tensor
    q: Tensor
    advantage: Tensor
    value: float
    gradient: Tensor


class TabularWorld:
    """The world at one horizon; all tables are float64.

    Args:
        horizon: turns at most, T, 1..50.

    Attributes:
        next: state after the reply landed and after it missed ``[S, A, 2]``.
        landing: probability that it lands ``[S, A]``.
        distance: distance still to go ``[S]``.
        reward: expected reward ``[S, A]``.
        met: whether all needs are met, which ends the dialogue ``[S]``.
        deficits: needs per axis ``[S, 3]``.
        persona: the user ``[S]``.
        situation: what a policy sees of a state ``[S]``.
        start: probability of starting there ``[S]``.
    """

    def __init__(self, horizon: int) -> None:
        if not 1 <= horizon <= _START_TURNS:
            raise InputError(f"horizon must be in 1..{_START_TURNS}, got {horizon}")
        self.horizon = horizon
        scale = horizon / _START_TURNS
        self.top = round(scale * max(most for *_, most in _START)) + 1
        # At short horizons all needs are small: there "ready" means met.
        self.small = horizon // 10
        side = torch.arange(self.top + 1)
        users = torch.arange(len(PERSONAS))
        grid = torch.cartesian_prod(users, side, side, side)
        self.persona, self.deficits = grid[:, 0], grid[:, 1:]
        self.distance = self.deficits.double().norm(dim=1)
        self.met = self.distance == 0
        bins = (self.deficits > 0).long() + (self.deficits > self.small)
        self.situation = self._number(self.persona, bins, 3)
        self.start = self._start(scale)
        self.next, self.landing = self._transitions()
        self.reward = self.distance[:, None] - self._expected(self.distance)

    @property
    def states(self) -> int:
        """Number of states, S."""
        return self.persona.numel()

    @property
    def replies(self) -> int:
        """Number of types of reply, A."""
        return len(REPLIES)

    @property
    def situations(self) -> int:
        """Number of situations, C."""
        return len(PERSONAS) * 27

    def plan(self, myopic: bool = False) -> Tensor:
        """Expected return of the best replies from each state, by dynamic programming.

        Args:
            myopic: take the reply with the largest expected reward of its own turn instead.

        Returns:
            ``[S]``; averaged by :attr:`start` it is the optimal (or the myopic) return.
        """
        value = torch.zeros_like(self.distance)
        greedy = self.reward.argmax(1, keepdim=True)
        for _ in range(self.horizon):
            q = self.reward + self._expected(value)
            value = q.gather(1, greedy)[:, 0] if myopic else q.amax(1)
        return value

    def outcome(self, policy: Tensor) -> tuple[Tensor, Tensor]:
        """Expected return and probability of success of whole dialogues.

        Since rewards are differences of distance, both follow from where dialogues end.

        Args:
            policy: probabilities of the replies ``[R, C, A]``.

        Returns:
            Return ``[R]`` and probability that all needs are met within the horizon ``[R]``.
        """
        chosen = policy.double().permute(2, 1, 0)[:, self.situation].contiguous()
        there = self.start[:, None].expand(-1, policy.shape[0])
        for _ in range(self.horizon):
            there = self._moved(there, chosen)
        return self.start @ self.distance - self.distance @ there, there[self.met].sum(0)

    def exact(self, policy: Tensor, gamma: float = 1.0, alpha: float = 1.0) -> Exact:
        r"""Value, advantage and gradient of one policy, for quasi-hyperbolic discounting.

        ``q_t = r_t + alpha sum_{s>t} gamma^(s-t) r_s``; with the defaults, the plain return.

        Args:
            policy: probabilities of the replies ``[C, A]``.
            gamma: discount per turn.
            alpha: weight of all that comes after the turn.
        """
        chosen = policy.double()[self.situation]
        occupancy, q = [self.start * ~self.met], []
        value = torch.zeros_like(self.distance)
        for _ in range(self.horizon):
            later = gamma * self._expected(value)
            q.append(self.reward + alpha * later)
            value = (chosen * (self.reward + later)).sum(1)
            moved = self._moved(occupancy[-1][:, None], chosen.t()[..., None])
            occupancy.append(moved[:, 0] * ~self.met)
        visits, ahead = torch.stack(occupancy[:-1]), torch.stack(q[::-1])
        advantage = ahead - (chosen * ahead).sum(-1, keepdim=True)
        flow = (visits[..., None] * chosen * advantage).sum(0)
        gradient = flow.new_zeros(policy.shape).index_add(0, self.situation, flow)
        first = (chosen * ahead[0]).sum(1)
        return Exact(visits, ahead, advantage, float(self.start @ first), gradient)

    def _expected(self, value: Tensor) -> Tensor:
        """Mean of ``value`` ``[S]`` over the next state of every state and reply ``[S, A]``."""
        landed, missed = value[self.next].unbind(-1)
        return missed + self.landing * (landed - missed)

    def _moved(self, there: Tensor, chosen: Tensor) -> Tensor:
        """Mass ``[S, R]`` a turn later, from mass ``[S, R]`` and reply probabilities ``[A, S, R]``.

        One reply at a time stays within the cache: ten times as fast as all of them at once.
        """
        out = torch.zeros_like(there)
        for i, share in enumerate(chosen):
            sent = there * share
            landed = sent * self.landing[:, i, None]
            out.index_add_(0, self.next[:, i, 0], landed)
            out.index_add_(0, self.next[:, i, 1], sent - landed)
        return out

    @staticmethod
    def _number(persona: Tensor, levels: Tensor, base: int) -> Tensor:
        return ((persona * base + levels[:, 0]) * base + levels[:, 1]) * base + levels[:, 2]

    def _start(self, scale: float) -> Tensor:
        """Normal distributions per axis, cut to their range, scaled and rounded to the lattice."""
        chance = torch.full((self.states,), 1 / len(PERSONAS), dtype=torch.float64)
        for axis, (mean, deviation, least, most) in enumerate(_START):
            edges = ((torch.arange(self.top + 2) - 0.5) / scale).double()
            z = (edges.clamp(least, most) - mean) / (deviation * math.sqrt(2))
            mass = torch.erf(z).diff()
            chance *= (mass / mass.sum())[self.deficits[:, axis]]
        # A user without any need does not come.
        chance[self.met] = 0
        return chance / chance.sum()

    def _transitions(self) -> tuple[Tensor, Tensor]:
        small = self.deficits <= self.small
        after = torch.empty(self.states, len(REPLIES), 2, dtype=torch.int64)
        landing = torch.empty(self.states, len(REPLIES), dtype=torch.float64)
        for i, reply in enumerate(REPLIES):
            for k, levels in enumerate((reply.lands, reply.misses)):
                moved = (self.deficits - torch.tensor(points(levels))).clamp(0, self.top)
                after[:, i, k] = self._number(self.persona, moved, self.top + 1)
            for j, persona in enumerate(PERSONAS):
                earlier = persona.order[: persona.order.index(reply.aim)]
                ready = small[:, list(earlier)].all(1)
                likely, unlikely = _LANDS[reply.deep, True], _LANDS[reply.deep, False]
                if persona.dislikes == i:
                    likely = unlikely = _DISLIKED
                here = self.persona == j
                landing[here & ready, i] = likely
                landing[here & ~ready, i] = unlikely
        stay = torch.arange(self.states)[:, None, None]
        return torch.where(self.met[:, None, None], stay, after), landing


def points(levels: Triple) -> Triple:
    """Points of a reply from its levels per axis, by EMPA's rubric."""
    axes = [AxisLevels(progress=max(level, 0), setback=min(level, 0)) for level in levels]
    c, a, p = increment(Progress(*axes))
    return int(c), int(a), int(p)
