"""The data of multi-turn RL: turns, dialogues, and the batches that are made of them.

Shapes: N turns of a batch, B packed rows, L tokens of a row.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from normkit.rl.row_tree import count_nodes


@dataclass
class Turn:
    """One exchange: the user's message and the policy's reply to it.

    Attributes:
        message: what the user said.
        reply: the policy's text, without special tokens.
        token_ids: the sampled tokens, the end-of-turn token included where it was sampled.
        logprobs: log-probability of each sampled token under the sampling policy.
        truncated: True where the reply was cut at the length limit.
        reward: reward of the turn; NaN where it is unknown.
        info: JSON-ready facts from the world (rubric, state, work).
    """

    message: str
    reply: str
    token_ids: list[int]
    logprobs: list[float]
    truncated: bool
    reward: float
    info: Mapping[str, Any] = field(default_factory=dict)


@dataclass
class Segment:
    """A stretch of dialogue that the policy saw as one context.

    A dialogue is one segment unless it outgrew the context: then its oldest turns were dropped and
    a new segment began. Every sampled token is a policy token in exactly one segment.

    Attributes:
        token_ids: all tokens of the context, prompts and replies.
        spans: ``(turn, start, stop)``: ``start:stop`` hold the sampled tokens of ``turn``.
    """

    token_ids: list[int]
    spans: list[tuple[int, int, int]]


@dataclass
class Dialogue:
    """One finished session.

    Attributes:
        task: name of the task in its world.
        group: dialogues of the same group share task and step and are compared with one another.
        index: number of the dialogue in its batch.
        seed: seed of the session.
        system: system prompt.
        turns: the exchanges in order.
        segments: the token rows that the policy saw.
        end_reason: why it ended.
        scores: the world's metrics, ``"score"`` first among them.
        agent: who the policy was, where several play one session (the seat in a game).
    """

    task: str
    group: int
    index: int
    seed: int
    system: str
    turns: list[Turn]
    segments: list[Segment]
    end_reason: str
    scores: dict[str, float]
    agent: int = 0

    def to_json(self) -> dict[str, Any]:
        """Return the dialogue as JSON-ready values; :meth:`from_json` reads them back."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Dialogue:
        """Rebuild a dialogue from :meth:`to_json` (a null reward is read as NaN)."""
        fields = dict(data)
        fields["turns"] = [
            Turn(**{**turn, "reward": _float(turn["reward"])}) for turn in data["turns"]
        ]
        fields["segments"] = [
            Segment(list(s["token_ids"]), [(a, b, c) for a, b, c in s["spans"]])
            for s in data["segments"]
        ]
        return cls(**fields)


def settle(dialogue: Dialogue) -> None:
    """Give the turns of a finished dialogue their final rewards.

    A world whose later turns change what earlier ones are paid reports the rewards of all turns so
    far as ``info["turn_rewards"]``; the last report holds. A turn that it knows nothing of keeps
    its reward, and so do all where a world reports none.
    """
    if dialogue.turns:
        final = dialogue.turns[-1].info.get("turn_rewards", ())
        for turn, reward in zip(dialogue.turns, final, strict=False):
            turn.reward = reward


@dataclass(frozen=True)
class TurnTable:
    """All turns of a batch of dialogues as flat rows, dialogue by dialogue: what estimators take.

    Attributes:
        reward: reward of each turn ``[N]``, float64; NaN where it is unknown.
        dialogue: position of the row's dialogue in the batch ``[N]``.
        turn: index of the turn in its dialogue ``[N]``.
        group: group of the dialogue ``[N]``.
        agent: agent of the dialogue ``[N]``.
        mask: False where the reward is unknown ``[N]``.
    """

    reward: Tensor
    dialogue: Tensor
    turn: Tensor
    group: Tensor
    agent: Tensor
    mask: Tensor


def turn_table(dialogues: Sequence[Dialogue]) -> TurnTable:
    """Lay out the turns of ``dialogues`` as flat rows, in order."""
    rows = [
        (turn.reward, d, t, talk.group, talk.agent)
        for d, talk in enumerate(dialogues)
        for t, turn in enumerate(talk.turns)
    ]
    reward = torch.tensor([row[0] for row in rows], dtype=torch.float64)
    index = torch.tensor([row[1:] for row in rows], dtype=torch.int64).reshape(len(rows), 4)
    dialogue, turn, group, agent = index.unbind(1)
    return TurnTable(reward, dialogue, turn, group, agent, torch.isfinite(reward))


@dataclass(frozen=True)
class PackedRow:
    """One segment, ready for the forward pass.

    Attributes:
        token_ids: all tokens of the segment ``[L]``.
        turn_row: row of the :class:`TurnTable` that each token was sampled in ``[L]``; -1 for
            system, user and template tokens.
        logprob: log-probability at sampling ``[L]``; zero where ``turn_row`` is -1.
    """

    token_ids: Tensor
    turn_row: Tensor
    logprob: Tensor


def pack(dialogues: Sequence[Dialogue]) -> list[PackedRow]:
    """Lay out every segment of ``dialogues`` as one row: one forward pass trains all its turns."""
    packed = []
    first_row = 0
    for dialogue in dialogues:
        for segment in dialogue.segments:
            turn_row = torch.full((len(segment.token_ids),), -1, dtype=torch.int64)
            logprob = torch.zeros(len(segment.token_ids), dtype=torch.float32)
            for turn, start, stop in segment.spans:
                turn_row[start:stop] = first_row + turn
                logprob[start:stop] = torch.tensor(dialogue.turns[turn].logprobs)
            ids = torch.tensor(segment.token_ids, dtype=torch.int64)
            packed.append(PackedRow(ids, turn_row, logprob))
        first_row += len(dialogue.turns)
    return packed


def micro_batches(
    rows: Sequence[PackedRow],
    max_tokens: int,
    unit: Sequence[int] | None = None,
    trees: bool = False,
) -> list[list[int]]:
    """Split rows into batches of at most ``max_tokens`` tokens that are computed.

    Rows of similar length come together and count with their padding. As trees, rows that begin
    alike come together and count by their nodes, or by half of their padded size where that is
    more: attention sees them padded.

    Args:
        rows: packed rows.
        max_tokens: most tokens of a batch; a longer single unit is a batch of its own.
        unit: number of each row's unit, such as its dialogue; rows of the same unit are not
            separated. Each row by itself if None.
        trees: whether the model takes trees (:mod:`normkit.rl.row_tree`).

    Returns:
        Lists of row indices, each index once.
    """
    members: dict[int, list[int]] = {}
    for i in range(len(rows)):
        members.setdefault(i if unit is None else unit[i], []).append(i)

    def size(chosen: Sequence[int]) -> float:
        tokens = [rows[i].token_ids for i in chosen]
        padded = len(tokens) * max(map(len, tokens))
        return max(count_nodes(tokens), padded / 2) if trees else padded

    def place(key: int) -> tuple[Any, int]:
        first = members[key][0]
        length = max(len(rows[i].token_ids) for i in members[key])
        return (rows[first].token_ids.tolist() if trees else length), key

    batches: list[list[int]] = []
    for key in sorted(members, key=place, reverse=True):
        if not batches or size(batches[-1] + members[key]) > max_tokens:
            batches.append([])
        batches[-1] += members[key]
    return batches


def finite_mean(values: Sequence[float]) -> float:
    """Mean of the values that are finite; NaN where there is none."""
    known = [value for value in values if math.isfinite(value)]
    return sum(known) / len(known) if known else math.nan


def _float(value: float | None) -> float:
    return float("nan") if value is None else float(value)
