"""The rows that estimators work on: what is checked, what is filled in, how rows are compared."""

from __future__ import annotations

import pytest
import torch

from normkit.errors import InputError
from normkit.rl.returns import Segments
from normkit.rl.turns import Turns, batch_normalize, normalize_rows, turn_normalize
from tests.rl.rows import flat

NAN = float("nan")


def test_unknown_rewards_are_filled_in_and_marked():
    turns = Turns.from_rows(*flat([[1.0, NAN, 3], [NAN]], dtype=torch.float32))
    assert turns.reward.tolist() == [1, 2, 3, 0]
    assert turns.reward.dtype == torch.float64
    assert turns.known.tolist() == [True, False, True, False]
    assert Turns.from_rows(*flat([[1.0], [2]])).known is None


def test_dialogues_are_summed_and_their_groups_kept():
    rewards = [[1.0, 2], [4], [NAN, NAN], [NAN, 3]]
    reward, dialogue, turn, group = flat(rewards, [0, 1, 1, 0])
    row, total, known, (pool, groups) = Turns.from_rows(reward, dialogue, turn, group).episodes()
    assert total[row].tolist() == [3, 3, 4, 0, 0, 6, 6]
    assert known[row].tolist() == [True, True, True, False, False, True, True]
    assert pool[row].tolist() == group.tolist()
    assert groups == 2


def test_a_number_without_a_dialogue_is_no_dialogue():
    reward, dialogue, turn, group = flat([[5.0], [7]])
    turns = Turns.from_rows(reward, 3 * dialogue, turn, group)
    assert turns.episodes().known.tolist() == [True, False, False, True]


def test_agents_share_no_dialogue_no_group_and_no_batch():
    reward, dialogue, turn, group = flat([[1.0, 2, 3, 4], [5, 6, 7, 8]])
    agent = turn % 2
    turns = Turns.from_rows(reward, dialogue, turn, group, agent)
    assert turns.returns(1.0).tolist() == [4, 6, 3, 4, 12, 14, 7, 8]
    for segments in (turns.pool, turns.whole, turns.cell):
        owners = {}
        for segment, who in zip(segments.ids.tolist(), agent.tolist(), strict=True):
            assert owners.setdefault(segment, who) == who


def test_agents_may_speak_at_the_same_turn():
    one, zero = torch.ones(2), torch.zeros(2, dtype=torch.int64)
    turns = Turns.from_rows(one, zero, zero, zero, agent=torch.tensor([0, 1]))
    assert turns.returns(1.0).tolist() == [1, 1]
    with pytest.raises(InputError, match="given twice"):
        Turns.from_rows(one, zero, zero, zero)


@pytest.mark.parametrize("baseline", ["mean", "loo"])
@pytest.mark.parametrize("scale", [True, False])
@pytest.mark.parametrize("eps", [0.0, 1e-8])
@pytest.mark.parametrize("ddof", [0, 1])
def test_constant_and_lone_rows_are_zero(baseline, scale, eps, ddof):
    value = torch.tensor([7.0, 7, 7, 3, 1, 2], dtype=torch.float64)
    segments = Segments(torch.tensor([0, 0, 0, 2, 3, 3]), 5)
    got = normalize_rows(value, segments, None, ddof, eps, baseline, scale)
    assert got[:4].tolist() == [0, 0, 0, 0]
    size = (
        (1 if scale else 0.5) * (2 if baseline == "loo" else 1) / (2**0.5 if scale and ddof else 1)
    )
    assert got[4:].tolist() == pytest.approx([-size, size])


def test_rows_that_are_not_known_stay_out():
    value = torch.tensor([1.0, 3, 1e9], dtype=torch.float64)
    segments = Segments(torch.zeros(3, dtype=torch.int64), 1)
    got = normalize_rows(value, segments, torch.tensor([True, True, False]), scale=False)
    assert got[:2].tolist() == [-1, 1]


def test_the_pieces_compare_with_cell_and_pool():
    turns = Turns.from_rows(*flat([[1.0, 0], [3, 8], [5]], [0, 0, 1]))
    assert turn_normalize(turns.reward, turns, scale=False).tolist() == [-1, -4, 1, 4, 0]
    assert batch_normalize(turns.reward, turns, scale=False).tolist() == [-2, -3, 0, 5, 0]
    got = batch_normalize(turns.reward, turns, "batch", scale=False)
    assert got.tolist() == pytest.approx([-2.4, -3.4, -0.4, 4.6, 1.6])


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"reward": torch.ones(2, 1)}, r"reward must be floating point of shape \(N,\)"),
        ({"dialogue": torch.tensor([0.0, 1.0])}, "dialogue must be int64"),
        ({"turn": torch.tensor([0, -3])}, "turn must not be negative, got -3"),
        ({"dialogue": torch.tensor([4, 4])}, r"\(4, 0\) is given twice"),
        (
            {"dialogue": torch.tensor([4, 4]), "group": torch.tensor([1, 2])},
            "dialogue 4 stands in two groups",
        ),
        ({"group": torch.tensor([6, 6]), "batch": torch.tensor([0, 1])}, "group 6 stands in two b"),
    ],
)
def test_bad_rows_are_named(change, words):
    rows = {
        "reward": torch.ones(2),
        "dialogue": torch.tensor([0, 1]),
        "turn": torch.tensor([0, 0]),
        "group": torch.tensor([0, 0]),
    }
    with pytest.raises(InputError, match=words):
        Turns.from_rows(**{**rows, **change})
