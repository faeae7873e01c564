"""Rows of tokens as a tree: what several rows begin with is there once.

Rows that share a beginning share all that a causal model computes over it. In the order of their
tokens a row shares most with its neighbours, so one pass over neighbours finds the whole tree.

Shapes: B rows, L tokens of the longest row, T nodes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class RowTree:
    """The distinct tokens of a batch of rows; tokens with the same tokens before them are one.

    Attributes:
        node: node of each token of the padded rows ``[B, L]``; the first on padding.
        place: where each node is first met, in the flattened padded rows ``[T]``.
    """

    node: Tensor
    place: Tensor

    @classmethod
    def of(cls, rows: Sequence[Tensor], device: torch.device | str = "cpu") -> RowTree:
        """Find the tree of rows of token ids."""
        longest = max(map(len, rows))
        node = torch.zeros(len(rows), longest, dtype=torch.int64)
        places = []
        above = count = 0
        for i, shared in _neighbours(rows):
            length = len(rows[i])
            node[i, :shared] = node[above, :shared]
            node[i, shared:length] = torch.arange(count, count + length - shared)
            places.append(torch.arange(shared, length) + i * longest)
            count += length - shared
            above = i
        return cls(node.to(device), torch.cat(places).to(device))

    @property
    def position(self) -> Tensor:
        """Position of each node in its rows ``[T]``."""
        return self.place % self.node.shape[1]

    def fold(self, states: Tensor) -> Tensor:
        """States of the nodes ``[1, T, ...]`` out of those of padded rows ``[B, L, ...]``."""
        return states.flatten(0, 1).index_select(0, self.place)[None]

    def unfold(self, states: Tensor) -> Tensor:
        """States of padded rows ``[B, L, ...]`` out of those of the nodes ``[1, T, ...]``."""
        flat = states[0].index_select(0, self.node.flatten())
        return flat.view(*self.node.shape, *states.shape[2:])


def count_nodes(rows: Sequence[Tensor]) -> int:
    """Number of nodes T of the tree of rows of token ids."""
    return sum(len(rows[i]) - shared for i, shared in _neighbours(rows))


def _neighbours(rows: Sequence[Tensor]) -> Iterator[tuple[int, int]]:
    """Rows in the order of their tokens, and how long a beginning each shares with the last one."""
    above = torch.zeros(0)
    for i in sorted(range(len(rows)), key=[row.tolist() for row in rows].__getitem__):
        length = min(len(above), len(rows[i]))
        apart = torch.nonzero(above[:length] != rows[i][:length])
        yield i, int(apart[0]) if len(apart) else length
        above = rows[i]
