r"""What the sampled tokens of a batch are credited with: advantages, and returns for the critic.

Statistics are those of all processes' rows.

Shapes: N turns, M sampled tokens of this process.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from normkit.rl.advantage import estimate
from normkit.rl.dialogue import PackedRow, TurnTable
from normkit.rl.engine import Engine
from normkit.rl.returns import impute_rewards, joint_segments, turn_gae
from normkit.rl.turns import normalize_rows


class SampledTokens:
    """The sampled tokens of packed rows in one line, row by row.

    Args:
        rows: the rows.

    Attributes:
        turn: row of the turn table of each token ``[M]``.
        first: True on the first token of each turn ``[M]``.
        rows: numbers of the rows that have any.
    """

    def __init__(self, rows: Sequence[PackedRow]) -> None:
        sampled = [row.turn_row[row.turn_row >= 0] for row in rows]
        self.turn = torch.cat([*sampled, torch.zeros(0, dtype=torch.int64)])
        self.first = torch.ones(len(self.turn), dtype=torch.bool)
        self.first[1:] = self.turn[1:] != self.turn[:-1]
        self.rows = [i for i, turns in enumerate(sampled) if len(turns)]
        lengths = [len(turns) for turns in sampled]
        self._places = torch.split(torch.arange(len(self.turn)), lengths)

    def places(self, rows: Iterable[int]) -> Tensor:
        """Places in the line of the tokens of some rows, row by row ``[m]``."""
        return torch.cat([*(self._places[i] for i in rows), torch.zeros(0, dtype=torch.int64)])


class Credit(NamedTuple):
    """Credit of each sampled token by a critic ``[M]``.

    Attributes:
        advantage: what its log-probability is weighted with.
        target: return that the value before it is drawn to.
        valued: True where there is such a return.
    """

    advantage: Tensor
    target: Tensor
    valued: Tensor


def turn_advantage(
    table: TurnTable,
    engine: Engine,
    estimator: str,
    options: Mapping[str, Any],
    value: Tensor | None = None,
) -> Tensor:
    """Advantages ``[N]`` of our turns.

    Args:
        table: our turns.
        engine: what the processes do together.
        estimator: name of the estimator.
        options: its options.
        value: the critic's value before each turn ``[N]``, where the estimator needs it.
    """
    fields = [table.reward, table.dialogue, table.turn, table.group, table.agent]
    fields += [] if value is None else [value]
    rows, source = engine.gather_rows(torch.stack([f.double() for f in fields], 1))
    # A reward that is not finite says that the turn was not judged: no mask is needed.
    reward, *index = rows[:, :5].unbind(1)
    dialogue, turn, group, agent = (x.long() for x in index)
    whole = estimate(
        estimator,
        reward,
        # Dialogues are numbered within their process.
        dialogue * engine.world + source,
        turn,
        group,
        agent=agent,
        **options,
        **({} if value is None else {"value": rows[:, 5]}),
    )
    return whole[source == engine.rank]


def turn_credit(
    table: TurnTable,
    tokens: SampledTokens,
    engine: Engine,
    estimator: str,
    options: Mapping[str, Any],
    value: Tensor,
) -> Credit:
    """Credit by turns: all tokens of a turn share its advantage, and its first state its return.

    Args:
        table: our turns.
        tokens: our tokens.
        engine: what the processes do together.
        estimator: name of an estimator that needs values.
        options: its options.
        value: the critic's value before each token ``[M]``.
    """
    before = torch.zeros_like(table.reward)
    before[tokens.turn[tokens.first]] = value[tokens.first].double()
    advantage = turn_advantage(table, engine, estimator, options, before)
    plain = {**options, "whiten": False}
    target = before + turn_advantage(table, engine, estimator, plain, before)
    valued = tokens.first & table.mask[tokens.turn]
    return Credit(advantage[tokens.turn], target[tokens.turn], valued)


def token_credit(
    table: TurnTable,
    tokens: SampledTokens,
    engine: Engine,
    value: Tensor,
    gamma: float = 0.99,
    lam: float = 0.95,
    whiten: bool = True,
) -> Credit:
    """Credit by tokens: GAE with a step a token (:func:`normkit.rl.returns.token_gae` on rows).

    A turn's reward is that of its last token. Tokens of the user and the world are no steps.

    Args:
        table: our turns.
        tokens: our tokens.
        engine: what the processes do together.
        value: the critic's value before each token ``[M]``.
        gamma: discount per token.
        lam: weight of longer returns.
        whiten: center and scale over the batch, each agent by itself.
    """
    last = torch.cat([tokens.first[1:], tokens.first.new_ones(min(1, len(tokens.first)))])
    dialogue = table.dialogue[tokens.turn]
    reward = impute_rewards(table.reward, table.dialogue)[tokens.turn] * last
    place = torch.arange(len(dialogue))  # of use as the number of a step: it rises by one
    raw = turn_gae(reward, value.double(), dialogue, place, gamma, lam)
    known = table.mask[tokens.turn]
    advantage = _whitened(raw, table.agent[tokens.turn], known, engine) if whiten else raw
    return Credit(advantage * known, raw + value, known)


def _whitened(x: Tensor, agent: Tensor, known: Tensor, engine: Engine) -> Tensor:
    """Center and scale ``x [M]`` over the known rows of all processes, agent by agent."""
    rows, source = engine.gather_rows(torch.stack([x, agent.double(), known.double()], 1))
    values, agents, there = rows.unbind(1)
    whole = normalize_rows(values, joint_segments(agents.long()), there.bool())
    return whole[source == engine.rank]
