"""Attention over rows of different length: a KV cache without holes, its masks, its attention.

Every row of the cache starts at position 0 and has its own length, so a token's place in the cache
is its position in the dialogue. New tokens of all rows come in packed, without padding, as one
sequence of T tokens; the attention function unpacks them against their own row. Masks come from the
mask function that the model itself asks for (causal, sliding window, chunked ...), evaluated at
the true positions. It plugs into transformers' attention and mask registries under
:data:`ATTENTION`, so the code of the model stays what it is.

Shapes: B rows of a step, T new tokens of all rows, q most new tokens of one row, S length of the
longest row, R rows of the cache, C places of a row, H query heads, K key-value heads, G = H / K,
D width of a head.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from normkit.errors import MissingDependencyError

try:
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.cache_utils import Cache
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    from transformers.masking_utils import causal_mask_function, sdpa_mask
except ImportError:
    raise MissingDependencyError("transformers", "rl") from None

ATTENTION = "normkit_ragged"
"""Name of the attention implementation in transformers' registries."""

_UNSUPPORTED = ("softcap", "s_aux", "position_bias", "head_mask")
"""Features of other attention functions that change the result and are not computed here."""

_BLOCK = 64
"""Places of a row are allocated in multiples of this."""


class RaggedStep:
    """One forward pass: which rows it extends, by how many tokens, from which positions.

    Args:
        rows: first and last-plus-one row of the cache.
        offsets: length of each row before the step ``[B]``.
        counts: new tokens of each row ``[B]``, each at least 1.
        device: where the index tensors live.

    Attributes:
        positions: position of each new token in its row ``[T]``.
        last: place of each row's last new token among the T ``[B]``.
        kv_length: S after the step.
        q_length: q.
    """

    def __init__(
        self,
        rows: tuple[int, int],
        offsets: Sequence[int],
        counts: Sequence[int],
        device: torch.device,
    ) -> None:
        self.rows = rows
        self.size = rows[1] - rows[0]
        self.device = device
        self.q_length = max(counts)
        self.kv_length = max(o + c for o, c in zip(offsets, counts, strict=True))
        self.past_length = max(offsets)
        self.offsets = torch.tensor(offsets, device=device)
        self.uniform = min(counts) == self.q_length
        count = torch.tensor(counts, device=device)
        local = torch.arange(self.q_length, device=device).expand(self.size, -1)
        row = torch.arange(self.size, device=device)
        if self.uniform:
            self._row, within = row.repeat_interleave(self.q_length), local.reshape(-1)
        else:
            valid = local < count[:, None]
            self._row, within = valid.nonzero(as_tuple=True)
            starts = count.cumsum(0) - count
            # Padding queries repeat a row's last token; their outputs are never read.
            self._unpack = (starts[:, None] + torch.minimum(local, count[:, None] - 1)).reshape(-1)
            self._pack = self._row * self.q_length + within
        self.positions = self.offsets[self._row] + within
        self.last = count.cumsum(0) - 1
        self._places: dict[tuple[int, int], Tensor] = {}
        self._masks: dict[int, tuple[Tensor, Tensor]] = {}

    def places(self, heads: int, capacity: int) -> Tensor:
        """Flat index of each new key in a buffer ``[R, K, C]``, head by head ``[K * T]``."""
        if (heads, capacity) not in self._places:
            head = torch.arange(heads, device=self.device)[:, None]
            row = self._row + self.rows[0]
            self._places[heads, capacity] = (
                (row * heads + head) * capacity + self.positions
            ).reshape(-1)
        return self._places[heads, capacity]

    def unpack(self, query: Tensor, groups: int) -> Tensor:
        """Bring packed queries ``[1, H, T, D]`` to their rows ``[B, K, G * q, D]``.

        The heads that share a key head become further query rows of it, so that keys and values
        are never repeated.
        """
        heads, width = query.shape[1], query.shape[3]
        packed = query[0] if self.uniform else query[0].index_select(1, self._unpack)
        by_row = packed.reshape(heads // groups, groups, self.size, self.q_length, width)
        return by_row.permute(2, 0, 1, 3, 4).reshape(
            self.size, heads // groups, groups * self.q_length, width
        )

    def pack(self, output: Tensor, groups: int) -> Tensor:
        """Bring outputs ``[B, K, G * q, D]`` back to ``[1, T, H, D]``."""
        width = output.shape[3]
        by_token = (
            output.reshape(self.size, -1, self.q_length, width)
            .transpose(1, 2)
            .reshape(self.size * self.q_length, -1, width)
        )
        return (by_token if self.uniform else by_token.index_select(0, self._pack))[None]

    def grouped_mask(self, mask: Tensor, groups: int) -> Tensor:
        """Repeat a mask ``[B, 1, q, S]`` for G heads as query rows ``[B, 1, G * q, S]``, once."""
        if self.q_length == 1 or groups == 1:
            return mask
        known = self._masks.get(id(mask))
        if known is None:
            known = mask, mask.repeat(1, 1, groups, 1)
            self._masks[id(mask)] = known
        return known[1]


_STEP: ContextVar[RaggedStep | None] = ContextVar("normkit_ragged_step", default=None)


class RaggedCache(Cache):  # type: ignore[misc]
    """Keys and values of rows of different length, each from place 0, in preallocated buffers.

    Args:
        device: where the buffers live.
    """

    def __init__(self, device: torch.device) -> None:
        super().__init__(layers=[])
        self.device = device
        self.lengths: list[int] = []
        self._buffers: dict[int, tuple[Tensor, Tensor]] = {}
        self._capacity = 0
        self._step: RaggedStep | None = None

    @contextmanager
    def step(self, rows: tuple[int, int], counts: Sequence[int]) -> Iterator[RaggedStep]:
        """Open a forward pass that appends ``counts`` tokens to the rows ``rows[0]:rows[1]``.

        The lengths grow when the block ends well.
        """
        offsets = self.lengths[slice(*rows)]
        step = RaggedStep(rows, offsets, counts, self.device)
        self._reserve(step.kv_length)
        self._step = step
        token = _STEP.set(step)
        try:
            yield step
        finally:
            _STEP.reset(token)
            self._step = None
        for row, count in zip(range(*rows), counts, strict=True):
            self.lengths[row] += count

    def resize(self, rows: int) -> None:
        """Give the cache ``rows`` rows; new ones are empty, surplus ones are forgotten."""
        self.lengths = (self.lengths + [0] * rows)[:rows]
        held = next((keys.shape[0] for keys, _ in self._buffers.values()), 0)
        if held < rows or held > 2 * rows:
            self._reallocate(rows)

    def swap(self, i: int, j: int) -> None:
        """Exchange two rows."""
        length = max(self.lengths[i], self.lengths[j])
        for pair in self._buffers.values():
            for buffer in pair:
                row = buffer[i, :, :length].clone()
                buffer[i, :, :length] = buffer[j, :, :length]
                buffer[j, :, :length] = row
        self.lengths[i], self.lengths[j] = self.lengths[j], self.lengths[i]

    def copy_row(self, source: int, target: int) -> None:
        """Make row ``target`` a copy of row ``source``."""
        length = self.lengths[source]
        for pair in self._buffers.values():
            for buffer in pair:
                buffer[target, :, :length] = buffer[source, :, :length]
        self.lengths[target] = length

    # ------------------------------------------------------------------ transformers' interface

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Store the new keys and values ``[1, K, T, D]``; return those of the step's rows.

        Returns:
            Views ``[B, K, S, D]`` of the buffers.
        """
        step = self._current()
        if layer_idx not in self._buffers:
            self._buffers[layer_idx] = (self._new(key_states), self._new(value_states))
        views = []
        for buffer, new in zip(self._buffers[layer_idx], (key_states, value_states), strict=True):
            heads, width = buffer.shape[1], buffer.shape[3]
            buffer.view(-1, width).index_copy_(
                0, step.places(heads, self._capacity), new[0].reshape(-1, width)
            )
            views.append(buffer[step.rows[0] : step.rows[1], :, : step.kv_length])
        return views[0], views[1]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Length of the longest row of the step, before it."""
        return self._step.past_length if self._step is not None else max(self.lengths, default=0)

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        """Length and offset of the keys that :meth:`update` returns."""
        return self._current().kv_length, 0

    # ------------------------------------------------------------------ buffers

    def _current(self) -> RaggedStep:
        if self._step is None:
            raise RuntimeError("RaggedCache is used outside of RaggedCache.step")
        return self._step

    def _new(self, like: Tensor) -> Tensor:
        # Zeros, since masked places are still multiplied, and a stray NaN would spread.
        shape = (len(self.lengths), like.shape[1], self._capacity, like.shape[3])
        return torch.zeros(shape, dtype=like.dtype, device=like.device)

    def _reserve(self, length: int) -> None:
        if length > self._capacity:
            wanted = max(length, self._capacity + self._capacity // 2)
            self._capacity = -(-wanted // _BLOCK) * _BLOCK
            self._reallocate(len(self.lengths))

    def _reallocate(self, rows: int) -> None:
        longest = max(self.lengths, default=0)
        for layer, pair in self._buffers.items():
            moved = []
            for buffer in pair:
                larger = buffer.new_zeros(rows, buffer.shape[1], self._capacity, buffer.shape[3])
                kept = min(rows, buffer.shape[0])
                larger[:kept, :, :longest] = buffer[:kept, :, :longest]
                moved.append(larger)
            self._buffers[layer] = (moved[0], moved[1])


def ragged_mask(
    *args: Any,
    mask_function: Callable[..., Tensor] = causal_mask_function,
    dtype: torch.dtype = torch.float32,
    **kwargs: Any,
) -> Tensor | None:
    """Additive mask of the current step ``[B, 1, q, S]``: 0 where a query sees a key, else -inf.

    Outside of a step this is transformers' ``sdpa_mask``.

    Args:
        *args: sizes, known from the step.
        mask_function: ``(row, head, query position, key position) -> visible``.
        dtype: dtype of the mask.
        **kwargs: what other attention implementations need.
    """
    step = _STEP.get()
    if step is None:
        mask: Tensor | None = sdpa_mask(*args, mask_function=mask_function, dtype=dtype, **kwargs)
        return mask
    row = torch.arange(step.size, device=step.device)[:, None, None, None]
    head = torch.zeros(1, dtype=torch.int64, device=step.device)[:, None, None]
    within = torch.arange(step.q_length, device=step.device)
    query = (step.offsets[:, None] + within)[:, None, :, None]
    key = torch.arange(step.kv_length, device=step.device)[None, None, None, :]
    visible = mask_function(row, head, query, key)
    visible = visible.expand(step.size, 1, step.q_length, step.kv_length)
    additive = torch.zeros(visible.shape, dtype=dtype, device=step.device)
    return additive.masked_fill_(~visible, -torch.inf)


def ragged_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention of packed new tokens, each over its own row.

    Outside of a step this is transformers' ``sdpa_attention_forward``.

    Args:
        module: the attention layer.
        query: new queries of all rows ``[1, H, T, D]``.
        key: keys of the step's rows ``[B, K, S, D]``.
        value: values of the step's rows ``[B, K, S, D]``.
        attention_mask: :func:`ragged_mask` ``[B, 1, q, S]``.
        dropout: unused inside a step, which only ever infers.
        scaling: factor of the scores; ``D ** -0.5`` if None.
        **kwargs: further features of the model.

    Returns:
        Outputs ``[1, T, H, D]``, and None for the attention weights.

    Raises:
        NotImplementedError: when the model uses a feature that would change the result.
    """
    step = _STEP.get()
    if step is None:
        plain: tuple[Tensor, None] = sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
        return plain
    used = [name for name in _UNSUPPORTED if kwargs.get(name) is not None]
    if used or attention_mask is None:
        raise NotImplementedError(f"ragged attention does not compute {used or 'unmasked scores'}")
    groups = query.shape[1] // key.shape[1]
    output = F.scaled_dot_product_attention(
        step.unpack(query, groups),
        key,
        value,
        attn_mask=step.grouped_mask(attention_mask, groups),
        scale=scaling,
    )
    return step.pack(output, groups), None


AttentionInterface.register(ATTENTION, ragged_attention)
AttentionMaskInterface.register(ATTENTION, ragged_mask)
