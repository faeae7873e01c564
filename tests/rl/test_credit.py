"""Credit by a critic, over turns and over tokens, beside loops and the grid of tokens."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from normkit.rl.advantage import estimate
from normkit.rl.credit import SampledTokens, token_credit, turn_credit
from normkit.rl.dialogue import PackedRow, TurnTable
from normkit.rl.engine import Engine
from normkit.rl.returns import token_gae
from tests.reference import mapo as oracle

# Three dialogues of 2, 3 and 1 turns; the second outgrew its context and has two rows.
LENGTHS = [[2, 3], [1, 2, 2], [4]]
ROWS = [[(0, 2), (1, 3)], [(2, 1), (3, 2)], [(4, 2)], [(5, 4)]]


def rows():
    """Rows of tokens with something of the user's before each reply."""
    packed = []
    for turns in ROWS:
        turn_row = [t for number, length in turns for t in (-1, -1, *[number] * length)]
        turn_row = torch.tensor([*turn_row, -1])
        packed.append(PackedRow(torch.zeros_like(turn_row), turn_row, torch.zeros(len(turn_row))))
    silent = torch.full((3,), -1)
    return [*packed[:1], PackedRow(silent, silent, torch.zeros(3)), *packed[1:]]


def table(reward):
    flat = torch.tensor([r for row in reward for r in row], dtype=torch.float64)
    dialogue = torch.tensor([0, 0, 1, 1, 1, 2])
    turn = torch.tensor([0, 1, 0, 1, 2, 0])
    none = torch.zeros_like(turn)
    return TurnTable(flat, dialogue, turn, none, none, torch.isfinite(flat))


REWARD = [[0.0, 1.0], [0.5, -1.0, 2.0], [0.25]]
TOKENS = SampledTokens(rows())
VALUE = torch.randn(14, generator=torch.Generator().manual_seed(0))


def test_sampled_tokens_stand_in_one_line():
    assert TOKENS.turn.tolist() == [0, 0, 1, 1, 1, 2, 3, 3, 4, 4, 5, 5, 5, 5]
    assert TOKENS.turn[TOKENS.first].tolist() == [0, 1, 2, 3, 4, 5]
    assert TOKENS.rows == [0, 2, 3, 4]
    assert TOKENS.places([4, 0]).tolist() == [10, 11, 12, 13, 0, 1, 2, 3, 4]
    assert TOKENS.places([]).tolist() == []


def lines(flat):
    """Numbers of all tokens, dialogue by dialogue."""
    sizes = [sum(lengths) for lengths in LENGTHS]
    return [part.tolist() for part in torch.split(torch.as_tensor(flat), sizes)]


def by_tokens(reward, gamma, lam):
    """GAE with a step a token, by the loop over turns; a turn pays at its last token."""
    paid = [
        [x for r, n in zip(row, lengths, strict=True) for x in (*[0.0] * (n - 1), r)]
        for row, lengths in zip(reward, LENGTHS, strict=True)
    ]
    gae = oracle.gae(paid, lines(VALUE.double()), gamma, lam)
    return np.array([a for row in gae for a in row])


@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 1.0), (0.9, 0.8)])
def test_tokens_are_credited_step_by_step(gamma, lam):
    raw = by_tokens(REWARD, gamma, lam)
    found = token_credit(table(REWARD), TOKENS, Engine(), VALUE, gamma, lam, whiten=False)
    np.testing.assert_allclose(found.advantage, raw, atol=1e-12)
    np.testing.assert_allclose(found.target, raw + VALUE.numpy(), atol=1e-12)
    assert found.valued.all()
    white = token_credit(table(REWARD), TOKENS, Engine(), VALUE, gamma, lam)
    np.testing.assert_allclose(white.advantage, (raw - raw.mean()) / raw.std(), atol=1e-6)
    torch.testing.assert_close(white.target, found.target)


def test_it_is_the_estimation_on_the_grid():
    mask = torch.zeros(3, 8, dtype=torch.bool)
    for d, lengths in enumerate(LENGTHS):
        mask[d, 1 : 1 + sum(lengths)] = True
    reward, value = torch.zeros(2, 3, 8)
    value[mask] = VALUE
    for d, lengths in enumerate(LENGTHS):
        reward[d, torch.tensor(lengths).cumsum(0)] = torch.tensor(REWARD[d])
    found = token_credit(table(REWARD), TOKENS, Engine(), VALUE, 0.9, 0.8, whiten=False)
    expected = token_gae(reward, value, mask, 0.9, 0.8)[mask]
    torch.testing.assert_close(found.advantage.float(), expected)


def test_without_discount_the_return_is_what_is_still_to_come_whatever_the_values():
    found = token_credit(table(REWARD), TOKENS, Engine(), VALUE, 1.0, 1.0)
    assert found.target.tolist() == pytest.approx(
        [*[1.0] * 5, 1.5, *[1.0] * 2, *[2.0] * 2, *[0.25] * 4]
    )


def test_a_turn_that_was_not_judged_counts_as_its_dialogues_mean_and_trains_nothing():
    unknown, mean = [[0.0, 1.0], [0.5, float("nan"), 2.0], [0.25]], [[0, 1], [0.5, 1.25, 2], [0.25]]
    found = token_credit(table(unknown), TOKENS, Engine(), VALUE, 0.9, 0.8)
    known = TOKENS.turn != 3
    raw = by_tokens(mean, 0.9, 0.8)
    others = raw[known.numpy()]
    expected = np.where(known, (raw - others.mean()) / others.std(), 0)
    np.testing.assert_allclose(found.advantage, expected, atol=1e-6)
    assert torch.equal(found.valued, known)
    turns = turn_credit(table(unknown), TOKENS, Engine(), "ppo", {}, VALUE)
    assert torch.equal(turns.valued, known & TOKENS.first)


def test_agents_are_whitened_apart():
    both = table(REWARD)
    both.agent[5] = 1
    found = token_credit(both, TOKENS, Engine(), VALUE, 0.9, 0.8).advantage
    first = TOKENS.turn < 5
    for own in (first, ~first):
        assert found[own].mean().item() == pytest.approx(0, abs=1e-9)
        assert found[own].std(unbiased=False).item() == pytest.approx(1, abs=1e-6)


def test_turns_are_credited_by_the_estimator_with_the_values_before_them():
    options = {"gamma": 0.9, "lam": 0.7}
    rows = table(REWARD)
    before = VALUE[TOKENS.first].double()
    found = turn_credit(rows, TOKENS, Engine(), "ppo", options, VALUE)
    flat = (rows.reward, rows.dialogue, rows.turn, rows.group)
    advantage = estimate("ppo", *flat, value=before, **options)
    torch.testing.assert_close(found.advantage, advantage[TOKENS.turn])
    raw = oracle.gae(REWARD, [part.tolist() for part in before.split([2, 3, 1])], 0.9, 0.7)
    expected = torch.tensor([a for row in raw for a in row]) + before
    torch.testing.assert_close(found.target, expected[TOKENS.turn])
    assert torch.equal(found.valued, TOKENS.first)


def test_turns_of_one_token_make_both_levels_one():
    single = SampledTokens(
        [
            PackedRow(torch.zeros(4), torch.tensor([-1, 2 * d, -1, 2 * d + 1]), torch.zeros(4))
            for d in (0, 1)
        ]
    )
    flat = torch.tensor([1.0, 0.5, -1.0, 2.0], dtype=torch.float64)
    index = torch.tensor([0, 0, 1, 1]), torch.tensor([0, 1, 0, 1])
    none = torch.zeros(4, dtype=torch.int64)
    rows = TurnTable(flat, *index, none, none, none == 0)
    options = {"gamma": 0.9, "lam": 0.7}
    by_turn = turn_credit(rows, single, Engine(), "ppo", options, VALUE[:4])
    by_token = token_credit(rows, single, Engine(), VALUE[:4], **options)
    for a, b in zip(by_turn, by_token, strict=True):
        torch.testing.assert_close(a, b)
