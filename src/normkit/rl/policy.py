"""Log-probabilities of sampled replies: one forward pass over packed dialogues.

Shapes: B rows, L tokens of the longest row, M sampled tokens of the batch, D width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from normkit.errors import InputError
from normkit.rl.dialogue import PackedRow

_CHUNK = 512
"""Positions whose logits exist at once; bounds memory at ``_CHUNK x V``."""


@dataclass(frozen=True)
class TokenBatch:
    """Packed rows, right-padded, and the flat list of their sampled tokens.

    Attributes:
        input_ids: ``[B, L]``.
        attention_mask: ``[B, L]``, 1 on tokens and 0 on padding.
        row: row of each sampled token ``[M]``.
        position: position of each sampled token in its row ``[M]``; always at least 1.
        turn_row: row of the turn table each token belongs to ``[M]``.
        logprob: log-probability at sampling ``[M]``.
    """

    input_ids: Tensor
    attention_mask: Tensor
    row: Tensor
    position: Tensor
    turn_row: Tensor
    logprob: Tensor

    @property
    def target(self) -> Tensor:
        """The sampled tokens ``[M]``."""
        return self.input_ids[self.row, self.position]


def collate(rows: Sequence[PackedRow], device: torch.device | str = "cpu") -> TokenBatch:
    """Right-pad rows into one batch (the padding token is irrelevant: it is masked everywhere)."""
    pad = nn.utils.rnn.pad_sequence
    input_ids = pad([row.token_ids for row in rows], batch_first=True)
    turn_row = pad([row.turn_row for row in rows], batch_first=True, padding_value=-1)
    logprob = pad([row.logprob for row in rows], batch_first=True)
    lengths = torch.tensor([len(row.token_ids) for row in rows])
    attention_mask = (torch.arange(input_ids.shape[1]) < lengths[:, None]).long()
    at = torch.nonzero(turn_row >= 0)
    row, position = at[:, 0], at[:, 1]
    if (position == 0).any():
        raise InputError("rows: a sampled token cannot be the first token of its row")
    return TokenBatch(
        input_ids=input_ids.to(device),
        attention_mask=attention_mask.to(device),
        row=row.to(device),
        position=position.to(device),
        turn_row=turn_row[row, position].to(device),
        logprob=logprob[row, position].to(device),
    )


def token_logprobs(
    model: nn.Module, batch: TokenBatch, temperature: float = 1.0, entropy: bool = False
) -> tuple[Tensor, Tensor | None]:
    r"""Log-probability of every sampled token, with logits only where replies are.

    ``log softmax(z / temperature)[token]`` where z are the logits one position earlier. The hidden
    states of the M sampled positions are gathered before the vocabulary projection, whatever the
    architecture, and logits are made and dropped in chunks, forward and backward.

    Args:
        model: a causal language model of transformers, wrapped or not.
        batch: the packed rows.
        temperature: temperature the replies were sampled at.
        entropy: also return the entropy of each token's distribution.

    Returns:
        Log-probabilities ``[M]`` in float32, in the order of ``batch``, and the entropies ``[M]``
        in nats or None.
    """
    with _hidden_states_only(model) as head:
        hidden = model(
            input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False
        ).logits
    hidden = hidden[batch.row, batch.position - 1]
    target = batch.target
    logprobs, entropies = [], []
    for start in range(0, len(target), _CHUNK):
        part = slice(start, start + _CHUNK)
        arguments = (head, hidden[part], target[part], temperature, entropy)
        if torch.is_grad_enabled() and hidden.requires_grad and len(target) > _CHUNK:
            logprob, spread = checkpoint(_score, *arguments, use_reentrant=False)
        else:
            logprob, spread = _score(*arguments)
        logprobs.append(logprob)
        entropies.append(spread)
    if not logprobs:
        empty = hidden.new_zeros(0, dtype=torch.float32)
        return empty, empty if entropy else None
    return torch.cat(logprobs), torch.cat(entropies) if entropy else None


def _score(
    head: Any, hidden: Tensor, target: Tensor, temperature: float, entropy: bool
) -> tuple[Tensor, Tensor]:
    logits = head(hidden).float() / temperature
    normalizer = logits.logsumexp(-1)
    logprob = logits.gather(-1, target[:, None])[:, 0] - normalizer
    if not entropy:
        return logprob, logprob.new_zeros(0)
    expected = (torch.softmax(logits, -1) * logits).sum(-1)
    return logprob, normalizer - expected


@contextmanager
def _hidden_states_only(model: nn.Module) -> Iterator[Any]:
    """Let the model return what its vocabulary projection is given; yield the projection.

    Replacing the projection for one call leaves every wrapper (PEFT, DDP) and its hooks in place,
    where calling the inner decoder would go around them.
    """
    inner: Any = getattr(model, "module", model)
    if hasattr(inner, "get_base_model"):
        inner = inner.get_base_model()
    config = inner.config
    for name in ("final_logit_softcapping", "logits_scaling", "logit_scale"):
        if getattr(config, name, None) not in (None, 1, 1.0):
            raise InputError(
                f"model: {type(inner).__name__} rescales its logits ({name}); "
                "normkit gathers hidden states before the projection and cannot do that"
            )
    head = inner.get_output_embeddings()
    if head is None:
        raise InputError(f"model: {type(inner).__name__} has no vocabulary projection")
    with_identity = nn.Identity()
    inner.set_output_embeddings(with_identity)
    try:
        yield head
    finally:
        inner.set_output_embeddings(head)
