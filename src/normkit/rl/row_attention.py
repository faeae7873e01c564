"""Causal attention of short rows by matrix products: training on a CPU.

On a CPU, the tiled attention of torch spends most of its time outside of matrix products where rows
have a few hundred tokens, in the backward pass above all. Here a block of queries meets the keys up
to its end in one batched product, the query heads that share a key head as further rows of it, so
that keys are not repeated and what the causal mask forbids is for the most part not computed.
Probabilities are kept for the backward pass, which is why long rows go to torch.

It plugs into transformers' registries under :data:`ROW_ATTENTION`, for models whose attention is
torch's ("sdpa"). The rows are padded on the right, where a causal model cannot look: the mask of
the padding is left out.

A model may also be given the nodes of a :class:`~normkit.rl.row_tree.RowTree` as one sequence: all
of it then computes each distinct token once, and only attention sees whole rows.

Shapes: B rows, L tokens of a row (padded), H query heads, K key-value heads, G = H / K, D width of
a head, b queries of a block, S keys up to its end.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn

from normkit.errors import MissingDependencyError
from normkit.rl.row_tree import RowTree

try:
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    from transformers.masking_utils import sdpa_mask
except ImportError:
    raise MissingDependencyError("transformers", "rl") from None

ROW_ATTENTION = "normkit_rows"
"""Name of the attention implementation in transformers' registries."""

_LONGEST = 512
"""Rows with more tokens go to torch, whose memory does not grow with the square of the length."""

_BLOCK = 64
"""Queries of one product."""

_PLAIN = ("softcap", "s_aux", "position_bias", "head_mask")
"""Features that change the result and are left to transformers."""

_TREE: ContextVar[RowTree | None] = ContextVar("normkit_row_tree", default=None)


class _ProductAttention(torch.autograd.Function):
    """``softmax(Q K^T * scale) V`` under the causal mask, block of queries by block of queries.

    With ``P`` the probabilities of a block and ``g`` the gradient of its output: ``dV = P^T g``,
    ``dS = P * (g V^T - rowsum(P * g V^T))``, ``dQ = dS K * scale``, ``dK = dS^T Q * scale``.
    """

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        """Attend with queries ``[B, K, G, L, D]`` to keys and values ``[B, K, L, D]``."""
        length = query.shape[3]
        scaled = query * scale
        output = torch.empty_like(query)
        chances = []
        for start in range(0, length, _BLOCK):
            end = min(start + _BLOCK, length)
            scores = _rows(scaled, start, end) @ key[:, :, :end].transpose(2, 3)
            ahead = scores.new_full((end - start, end - start), -torch.inf).triu_(1)
            _heads(scores, start, end)[..., start:] += ahead
            chance = torch.softmax(scores, -1)
            output[:, :, :, start:end] = _heads(chance @ value[:, :, :end], start, end)
            chances.append(chance)
        ctx.scale = scale
        ctx.save_for_backward(scaled, key, value, *chances)
        return output

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of queries, keys and values; sums over blocks are kept in float32."""
        scaled, key, value, *chances = ctx.saved_tensors
        length = scaled.shape[3]
        of_query = torch.empty_like(scaled)
        of_key = torch.zeros_like(key, dtype=torch.float32)
        of_value = torch.zeros_like(value, dtype=torch.float32)
        for start, chance in zip(range(0, length, _BLOCK), chances, strict=True):
            end = min(start + _BLOCK, length)
            slope = _rows(gradient, start, end)
            of_value[:, :, :end] += chance.transpose(2, 3) @ slope
            of_chance = slope @ value[:, :, :end].transpose(2, 3)
            of_scores = torch._softmax_backward_data(of_chance, chance, -1, chance.dtype)
            of_query[:, :, :, start:end] = _heads(of_scores @ key[:, :, :end], start, end)
            of_key[:, :, :end] += of_scores.transpose(2, 3) @ _rows(scaled, start, end)
        return of_query.mul_(ctx.scale), of_key.to(key.dtype), of_value.to(value.dtype), None


def _rows(heads: Tensor, start: int, end: int) -> Tensor:
    """Queries of a block ``[B, K, G * b, D]`` out of ``[B, K, G, L, D]``."""
    return heads[:, :, :, start:end].flatten(2, 3)


def _heads(rows: Tensor, start: int, end: int) -> Tensor:
    """The same ``[B, K, G, b, D]`` as a view of ``[B, K, G * b, D]``."""
    return rows.view(*rows.shape[:2], -1, end - start, rows.shape[3])


def row_mask(*args: Any, attention_mask: Tensor | None = None, **kwargs: Any) -> Tensor | None:
    """Mask of rows that are padded on the right: None where it is causal and no more."""
    tree = _TREE.get()
    if tree is not None:
        rows, length = tree.node.shape
        kwargs.update(batch_size=rows, q_length=length, kv_length=length)
    mask: Tensor | None = sdpa_mask(*args, attention_mask=None, **kwargs)
    return mask


def row_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention of whole rows, which come padded or as the nodes of their tree (B = 1, L = T).

    Args:
        module: the attention layer.
        query: ``[B, H, L, D]``.
        key: ``[B, K, L, D]``.
        value: ``[B, K, L, D]``.
        attention_mask: :func:`row_mask`.
        **kwargs: further features of the model.

    Returns:
        Outputs ``[B, L, H, D]``, and None for the attention weights.
    """
    tree = _TREE.get()
    if tree is None:
        return _attend(module, query, key, value, attention_mask, **kwargs)
    query, key, value = (
        tree.unfold(states.transpose(1, 2)).transpose(1, 2) for states in (query, key, value)
    )
    output, _ = _attend(module, query, key, value, attention_mask, **kwargs)
    return tree.fold(output), None


def _attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention of padded rows; what does not suit the products goes to transformers."""
    batch, heads, length, width = query.shape
    suits = (
        query.device.type == "cpu"
        and attention_mask is None
        and dropout == 0.0
        and length == key.shape[2] <= _LONGEST
        and key.shape[3] == value.shape[3] == width
        and all(kwargs.get(name) is None for name in (*_PLAIN, "is_causal"))
        and getattr(module, "is_causal", True)
    )
    if not suits:
        plain: tuple[Tensor, None] = sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
        return plain
    if torch.is_autocast_enabled("cpu"):
        dtype = torch.get_autocast_dtype("cpu")
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    with torch.autocast("cpu", enabled=False):
        grouped = query.view(batch, key.shape[1], -1, length, width)
        scale = width**-0.5 if scaling is None else scaling
        apply: Callable[..., Tensor] = _ProductAttention.apply
        output = apply(grouped, key, value, scale)
    return output.reshape(batch, heads, length, width).transpose(1, 2).contiguous(), None


@contextmanager
def rows_attend(model: Any, tree: RowTree | None = None) -> Iterator[None]:
    """Let a transformers model attend by :func:`row_attention` where its attention is torch's.

    Args:
        model: the model.
        tree: the rows whose nodes the model is going to be given; None where it gets padded rows.
    """
    config = model.config.get_text_config()
    original = config._attn_implementation
    if original == "sdpa":
        config._attn_implementation = ROW_ATTENTION
    token = _TREE.set(tree)
    try:
        yield
    finally:
        _TREE.reset(token)
        config._attn_implementation = original


AttentionInterface.register(ROW_ATTENTION, row_attention)
AttentionMaskInterface.register(ROW_ATTENTION, row_mask)
