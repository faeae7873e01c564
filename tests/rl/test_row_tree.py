"""Trees of rows beside the set of their beginnings."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from normkit.rl.row_tree import RowTree, count_nodes

ROWS = st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=7), min_size=1, max_size=6)


def test_a_worked_tree():
    rows = [torch.tensor(row) for row in ([5, 6, 7], [5, 9], [5, 6, 8, 8])]
    tree = RowTree.of(rows)
    # Nodes are numbered in the order of their tokens: 5 6 7, then 8 8 after 5 6, then 9 after 5.
    assert tree.node.tolist() == [[0, 1, 2, 0], [0, 5, 0, 0], [0, 1, 3, 4]]
    assert tree.place.tolist() == [0, 1, 2, 10, 11, 5]
    assert tree.position.tolist() == [0, 1, 2, 2, 3, 1]


@given(ROWS)
def test_a_node_is_a_distinct_beginning(rows):
    tensors = [torch.tensor(row) for row in rows]
    tree = RowTree.of(tensors)
    known = {}
    for i, row in enumerate(rows):
        for j in range(len(row)):
            # Equal beginnings have one node, and a node has one beginning.
            beginning = tuple(row[: j + 1])
            assert known.setdefault(beginning, int(tree.node[i, j])) == tree.node[i, j]
    assert sorted(known.values()) == list(range(len(tree.place)))
    assert count_nodes(tensors) == len(known)


@given(ROWS)
def test_folding_keeps_what_unfolding_restores(rows):
    tensors = [torch.tensor(row) for row in rows]
    tree = RowTree.of(tensors)
    padded = torch.nn.utils.rnn.pad_sequence(tensors, batch_first=True)
    nodes = tree.fold(padded)
    assert nodes.shape == (1, len(tree.place))
    for found, row in zip(tree.unfold(nodes), tensors, strict=True):
        assert torch.equal(found[: len(row)], row)
    for row, length in zip(tree.unfold(tree.position[None]), map(len, rows), strict=True):
        assert row[:length].tolist() == list(range(length))
