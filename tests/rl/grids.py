"""Random grids of tokens with ragged turns, and the loop that their rows are checked against."""

from __future__ import annotations

import torch
from hypothesis import strategies as st


@st.composite
def grids(draw, most=5):
    """Rewards ``[B, L]``, mask and explicit turns; turns may stand side by side or have holes."""
    dialogues, length = draw(st.integers(1, most)), draw(st.integers(1, 14))
    shape = st.lists(
        st.lists(st.integers(0, 5), min_size=length, max_size=length),
        min_size=dialogues,
        max_size=dialogues,
    )
    kinds = torch.tensor(draw(shape))
    reward = torch.tensor(draw(shape)) - 2
    mask = kinds > 1
    # A turn begins after a gap of at least one token in half of all cases, and inside runs too.
    begins = (kinds == 2) | (kinds == 0)
    turn = begins.cumsum(1) * draw(st.integers(1, 3))
    return reward.float(), mask, turn


def looped_rows(reward, mask, turn):
    """``(reward, dialogue, turn)`` of every turn, token by token."""
    rows = {}
    for b in range(len(mask)):
        numbers = [int(turn[b, k]) for k in range(mask.shape[1]) if mask[b, k]]
        if not numbers:
            continue
        current = numbers[0]
        for k in range(mask.shape[1]):
            if mask[b, k]:
                current = int(turn[b, k])
            rows[b, current] = rows.get((b, current), 0.0) + float(reward[b, k])
    return sorted((b, t, r) for (b, t), r in rows.items())


def rows_of(turns):
    return list(
        zip(turns.dialogue.tolist(), turns.turn.tolist(), turns.reward.tolist(), strict=True)
    )
