r"""A chain of hops in which the true advantage of every token is known.

A question needs ``HOPS`` facts, one after the other. A turn is either one token, the answer, which
ends the dialogue, or a query of ``LENGTH`` tokens. Every hop has a right query; one with m wrong
tokens finds the fact with probability ``0.95 * 0.5^m``. An answer after h facts is right with
probability ``GUESS[h]`` and pays 1 (exact match); without an answer in ``TURNS`` turns nothing is
paid. Answering early pays something at once, which is what holds learners back.

A *cell* is what the policy sees before a token: facts found, position in the turn, wrong tokens so
far. The turn's number is hidden from the policy, not from values, which are exact by dynamic
programming over turns and tokens. Tables are float64.

Shapes: R runs; C cells; V tokens; T turns; L tokens of a query; E dialogues a run.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

HOPS = 2
LENGTH = 3
VOCABULARY = 4
TURNS = 5
GUESS = (0.1, 0.4, 1.0)
CELLS = (HOPS + 1) * LENGTH * LENGTH
ANSWER = 0
"""The answer, as the first token of a turn; elsewhere a wrong token like others."""

_GUESS = torch.tensor(GUESS, dtype=torch.float64)
_HOP = torch.arange(CELLS) // LENGTH**2
_RIGHT = 1 + (_HOP + torch.arange(CELLS) // LENGTH) % (VOCABULARY - 1)
_MISSED = (_RIGHT[:, None] != torch.arange(VOCABULARY)).long()
"""Whether a token is wrong in a cell ``[C, V]``."""


def cell(hop: Tensor, place: int, wrong: Tensor) -> Tensor:
    """Number of a cell; more than ``LENGTH - 1`` wrong tokens do not fit into one."""
    return (hop * LENGTH + place) * LENGTH + wrong.clamp(max=LENGTH - 1)


def found(wrong: Tensor) -> Tensor:
    """Probability that a query with so many wrong tokens finds the fact."""
    return 0.95 * 0.5 ** wrong.double()


class _Place(NamedTuple):
    """The cells at one position of a turn, and where their tokens lead.

    Attributes:
        here: the cells ``[C / L]``.
        hop: their facts ``[C / L, V]``.
        wrong: wrong tokens after each token ``[C / L, V]``.
        following: cell of the next position ``[C / L, V]``.
    """

    here: Tensor
    hop: Tensor
    wrong: Tensor
    following: Tensor


def _place(j: int) -> _Place:
    here = torch.arange(CELLS).view(HOPS + 1, LENGTH, LENGTH)[:, j].flatten()
    wrong = here[:, None] % LENGTH + _MISSED[here]
    hop = _HOP[here, None].expand_as(wrong)
    return _Place(here, hop, wrong, cell(hop, min(j + 1, LENGTH - 1), wrong))


_PLACES = [_place(j) for j in range(LENGTH)]
_BEGIN = cell(torch.arange(HOPS + 1), 0, torch.zeros(HOPS + 1, dtype=torch.int64))
"""Cells at the beginning of a turn, by facts found."""


class Truth(NamedTuple):
    """What a policy is worth, exactly.

    Attributes:
        q: expected reward after a token ``[R, T, C, V]``.
        value: before it ``[R, T, C]``.
        gradient: of the expected reward, by the logits ``[R, C, V]``.
    """

    q: Tensor
    value: Tensor
    gradient: Tensor

    @property
    def start(self) -> Tensor:
        """Expected reward of a dialogue ``[R]``."""
        return self.value[:, 0, 0]


def truth(policy: Tensor) -> Truth:
    """Evaluate policies exactly.

    Args:
        policy: probabilities of the tokens ``[R, C, V]``, float64.
    """
    runs = len(policy)
    q = policy.new_zeros(runs, TURNS, CELLS, VOCABULARY)
    value = policy.new_zeros(runs, TURNS, CELLS)
    after = policy.new_zeros(runs, HOPS + 1)
    for t in reversed(range(TURNS)):
        for j, (here, hop, wrong, following) in reversed(list(enumerate(_PLACES))):
            if j == LENGTH - 1:
                lucky = found(wrong)
                moved = after[:, (hop + 1).clamp(max=HOPS)]
                q[:, t, here] = lucky * moved + (1 - lucky) * after[:, hop]
            else:
                q[:, t, here] = value[:, t][:, following]
            if j == 0:
                q[:, t, here, ANSWER] = _GUESS[_HOP[here]]
            value[:, t, here] = (policy[:, here] * q[:, t, here]).sum(-1)
        after = value[:, t, _BEGIN]
    flow = occupancy(policy)[..., None] * policy[:, None] * (q - value[..., None])
    return Truth(q, value, flow.sum(1))


def occupancy(policy: Tensor) -> Tensor:
    """Probability that a dialogue comes to a cell in a turn ``[R, T, C]``."""
    visits = policy.new_zeros(len(policy), TURNS, CELLS)
    begin = policy.new_zeros(len(policy), HOPS + 1)
    begin[:, 0] = 1
    for t in range(TURNS):
        visits[:, t, _BEGIN] = begin
        begin = torch.zeros_like(begin)
        for j, (here, hop, wrong, following) in enumerate(_PLACES):
            sent = visits[:, t, here, None] * policy[:, here]
            if j == 0:
                sent[..., ANSWER] = 0
            if j < LENGTH - 1:
                visits[:, t].index_add_(1, following.flatten(), sent.flatten(1))
                continue
            lucky = sent * found(wrong)
            begin.index_add_(1, (hop + 1).clamp(max=HOPS).flatten(), lucky.flatten(1))
            begin.index_add_(1, hop.flatten(), (sent - lucky).flatten(1))
    return visits


@dataclass(frozen=True)
class Rollouts:
    """Dialogues of all runs; steps are turns times places.

    Attributes:
        cell: before each token ``[R, E, T, L]``.
        token: ``[R, E, T, L]``.
        live: whether the token was written ``[R, E, T, L]``.
        reward: of the dialogue, 0 or 1 ``[R, E]``.
    """

    cell: Tensor
    token: Tensor
    live: Tensor
    reward: Tensor

    def part(self, begin: int, end: int) -> Rollouts:
        """Some dialogues of every run."""
        taken = slice(begin, end)
        return Rollouts(
            self.cell[:, taken], self.token[:, taken], self.live[:, taken], self.reward[:, taken]
        )


def roll_out(policy: Tensor, dialogues: int, generator: torch.Generator) -> Rollouts:
    """Play dialogues of every run.

    Args:
        policy: ``[R, C, V]``.
        dialogues: of each run, E.
        generator: of all random numbers; as many are drawn whatever the policy.
    """
    runs = len(policy)
    edges = policy.cumsum(-1)[..., :-1].flatten(0, 1).float()
    offset = CELLS * torch.arange(runs)[:, None]
    hop = torch.zeros(runs, dialogues, dtype=torch.int64)
    alive = torch.ones(runs, dialogues, dtype=torch.bool)
    reward = torch.zeros(runs, dialogues, dtype=torch.float64)
    steps: list[tuple[Tensor, Tensor, Tensor]] = []
    for _ in range(TURNS):
        wrong = torch.zeros_like(hop)
        luck = torch.rand(LENGTH + 1, runs, dialogues, generator=generator)
        for j in range(LENGTH):
            here = cell(hop, j, wrong)
            token = (luck[j, ..., None] >= edges[offset + here]).sum(-1)
            steps.append((here, token, alive))
            if j == 0:
                answered = alive & (token == ANSWER)
                reward += answered * (luck[LENGTH] < _GUESS[hop])
                alive = alive & ~answered
            wrong = wrong + _MISSED[here, token]
        lands = alive & (luck[LENGTH] < found(wrong))
        hop = (hop + lands.long()).clamp(max=HOPS)
    shape = (runs, dialogues, TURNS, LENGTH)
    cells, tokens, live = (torch.stack(x, -1).view(shape) for x in zip(*steps, strict=True))
    return Rollouts(cells, tokens, live, reward)
