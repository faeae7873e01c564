"""Turns on a grid of tokens: sums survive, rows are those of a loop, and tokens get them back."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from normkit.errors import InputError
from normkit.rl.advantage import to_tokens
from normkit.rl.token_grid import grid_turns, turns_of_mask
from tests.rl.grids import grids, looped_rows, rows_of


def test_turns_are_the_runs_of_the_mask():
    mask = torch.tensor([[1, 1, 0, 0, 1, 0], [0, 1, 1, 0, 0, 0], [0, 0, 0, 0, 0, 0]])
    expected = [[0, 0, -1, -1, 1, -1], [-1, 0, 0, -1, -1, -1], [-1] * 6]
    assert turns_of_mask(mask).tolist() == expected
    assert turns_of_mask(mask.bool()).tolist() == expected


def test_a_reward_after_a_turn_is_that_turns_and_one_before_the_first_is_the_firsts():
    mask = torch.tensor([[0, 1, 0, 1, 0, 0]])
    reward = torch.tensor([[1.0, 2.0, 4.0, 8.0, 16.0, 32.0]])
    turns = grid_turns(reward, mask)
    assert turns.reward.tolist() == [7.0, 56.0]
    assert turns.turn_row.tolist() == [[-1, 0, -1, 1, -1, -1]]


def test_explicit_turns_split_a_run_and_join_what_was_masked_out():
    reward = torch.tensor([[1.0, 2.0, 4.0, 8.0], [1.0, 2.0, 4.0, 8.0]])
    mask = torch.tensor([[1, 1, 1, 1], [1, 0, 1, 1]])
    turn = torch.tensor([[0, 0, 2, 2], [0, 5, 0, 1]])
    turns = grid_turns(reward, mask, turn)
    assert turns.reward.tolist() == [3.0, 12.0, 7.0, 8.0]
    assert turns.dialogue.tolist() == [0, 0, 1, 1]
    assert turns.turn.tolist() == [0, 2, 0, 1]
    assert turns.turn_row.tolist() == [[0, 0, 1, 1], [2, -1, 2, 3]]


@given(grids(), st.booleans())
@settings(max_examples=150, deadline=None)
def test_rows_are_those_of_a_loop_and_tokens_get_them_back(grid, explicit):
    reward, mask, turn = grid
    turns = grid_turns(reward, mask, turn if explicit else None)
    numbers = turn if explicit else turns_of_mask(mask)
    assert rows_of(turns) == looped_rows(reward, mask, numbers)
    number = to_tokens(turns.turn.double() + 1, turns.turn_row) - 1
    assert torch.equal(number, numbers.masked_fill(~mask, -1).double())
    home = to_tokens(turns.dialogue.double(), turns.turn_row)
    assert torch.equal(home[mask], torch.nonzero(mask)[:, 0].double())
    spoken = mask.any(1)
    assert float(turns.reward.sum()) == float(reward[spoken].double().sum())


def test_numbers_of_turns_may_be_as_large_as_they_like():
    reward, mask = torch.tensor([[1.0, 2.0, 4.0], [8.0, 16.0, 32.0]]), torch.ones(2, 3)
    turns = grid_turns(reward, mask, torch.tensor([[3, 10**15, 10**15], [0, 3, 2**62]]))
    assert turns.reward.tolist() == [1, 6, 8, 16, 32]
    assert turns.turn.tolist() == [3, 10**15, 0, 3, 2**62]
    assert turns.turn_row.tolist() == [[0, 1, 1], [2, 3, 4]]


def test_an_unknown_reward_makes_its_turn_unknown_and_no_other():
    reward = torch.tensor([[0.0, math.nan, 0.0, 1.0]])
    turns = grid_turns(reward, torch.tensor([[1, 1, 0, 1]]))
    assert torch.isfinite(turns.reward).tolist() == [False, True]


@pytest.mark.parametrize("shape", [(0, 0), (0, 4), (3, 0), (3, 4)])
def test_grids_without_turns_have_no_rows(shape):
    turns = grid_turns(torch.zeros(shape), torch.zeros(shape))
    assert turns.reward.shape == turns.turn.shape == (0,)
    assert turns.turn_row.shape == shape
    assert bool((turns.turn_row == -1).all())


@pytest.mark.parametrize(
    ("reward", "mask", "turn", "message"),
    [
        (torch.zeros(2, 3), torch.ones(2, 4), None, "same shape"),
        (torch.zeros(3), torch.ones(3), None, r"shape \(B, L\)"),
        (torch.zeros(2, 3), torch.ones(2, 3), torch.zeros(2, 2), "same shape"),
        (torch.zeros(1, 2), torch.ones(1, 2), torch.tensor([[1, 0]]), "never fall"),
        (torch.zeros(1, 2), torch.ones(1, 2), torch.tensor([[-1, 0]]), "at least 0"),
    ],
)
def test_bad_grids_are_refused(reward, mask, turn, message):
    with pytest.raises(InputError, match=message):
        grid_turns(reward, mask, turn)
