"""The data of multi-turn RL: turns, dialogues, and the batches that are made of them.

Shapes: N turns of a batch, B packed rows, L tokens of a row.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any


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


def _float(value: float | None) -> float:
    return float("nan") if value is None else float(value)
