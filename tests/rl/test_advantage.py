"""Advantage estimators: the card's tables, the laws of MAPO, oracles for all, bad input.

What every estimator must keep to is tested in ``tests/testing/test_advantage.py``.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from normkit.errors import InputError
from normkit.rl.advantage import (
    ESTIMATORS,
    diagnose,
    estimate,
    get_estimator,
    to_tokens,
)
from normkit.testing import check_advantage
from tests.reference import mapo as oracle
from tests.reference import mars as mars_oracle
from tests.rl.rows import flat, ragged

NAN, INF = float("nan"), float("inf")
ORACLES = {**oracle.ESTIMATORS, "mars": mars_oracle.mars}
CARD = [[1.0, 0, 2], [3, -1, 1]]
RAGGED = [[1.0, 0, 2], [3, -1], [0, 2, 1]]
OPTIONS = {
    "gamma": st.sampled_from([0.0, 0.5, 0.85, 1.0]) | st.floats(0, 1),
    "alpha": st.floats(-1, 2),
    "beta": st.none() | st.floats(-1, 2),
    "batch_scope": st.sampled_from(["group", "batch"]),
    "baseline": st.sampled_from(["mean", "loo"]),
    "ddof": st.integers(0, 1),
    "eps": st.sampled_from([1e-8, 1e-6, 0.1]),
    "scale": st.booleans(),
    "reset_at_user": st.booleans(),
    "weight": st.floats(-1, 2),
    "singleton": st.sampled_from(["zero", "raw"]),
    "lam": st.floats(0, 1),
    "whiten": st.booleans(),
}


def run(name, rewards, groups=None, **options):
    return estimate(name, *flat(rewards, groups), **options)


@pytest.mark.parametrize(
    ("rewards", "gamma", "expected"),
    [
        (CARD, 1.0, [0, 0.112702, 0.887298, 0.774597, -1.274597, -0.5]),
        (CARD, 0.9, [-0.5, 0.112702, 0.887298, 1.274597, -1.274597, -0.5]),
        (
            RAGGED,
            1.0,
            [0.353553, -0.212132, 0.908248, 0.10939, -1.502903, -0.054695, 0.898539, -0.5],
        ),
    ],
)
@pytest.mark.parametrize("name", ["mapo", "mica"])
def test_the_tables_of_the_card(name, rewards, gamma, expected):
    assert run(name, rewards, gamma=gamma).tolist() == pytest.approx(expected, abs=1e-6)


def test_the_halves_of_the_card():
    turn = run("turn", CARD, gamma=1.0)
    assert turn.tolist() == pytest.approx([0, 1, 1, 0, -1, -1], abs=1e-6)
    turn = run("turn", CARD, gamma=0.9)
    assert turn.tolist() == pytest.approx([-1, 1, 1, 1, -1, -1], abs=1e-6)
    pooled = run("batch", CARD)
    expected = [0, -0.774597, 0.774597, 1.549193, -1.549193, 0]
    assert pooled.tolist() == pytest.approx(expected, abs=1e-6)


# ---------------------------------------------------------------------- oracles


def test_every_estimator_has_an_oracle():
    assert set(ORACLES) == set(ESTIMATORS)


@pytest.mark.parametrize("name", ESTIMATORS)
@settings(deadline=None, max_examples=60)
@given(st.data())
def test_estimators_are_their_oracles(name, data):
    rewards, groups = data.draw(ragged(unknown=True))
    known = get_estimator(name).options
    options = {
        n: data.draw(s, n) for n, s in OPTIONS.items() if n in known and data.draw(st.booleans())
    }
    given_, count = dict(options), sum(len(row) for row in rewards)
    numbers = {"value": st.integers(-3, 3), "anchor": st.integers(0, 3)}
    if data.draw(st.booleans(), "whitens"):
        numbers["tokens"] = st.integers(1, 5)
    for column in numbers.keys() & set(known):
        drawn = data.draw(st.lists(numbers[column], min_size=count, max_size=count), column)
        options[column] = drawn
        given_[column] = torch.tensor(
            drawn, dtype=torch.float64 if column == "value" else torch.int64
        )
    got = run(name, rewards, groups, **given_)
    expected = ORACLES[name](rewards, groups, **options)
    np.testing.assert_allclose(got.numpy(), expected, atol=2e-6)


@pytest.mark.parametrize("name", ["mapo", "grpo", "reinforce++", "gigpo"])
@settings(deadline=None, max_examples=30)
@given(data=ragged())
def test_single_precision_gives_the_same(name, data):
    reward, *index = flat(*data)
    double = estimate(name, reward, *index)
    torch.testing.assert_close(estimate(name, reward.float(), *index), double.float())


def test_rounding_in_single_precision_is_no_difference():
    """In float32, .1 + .3 + .4 in two orders differ in the last bit, eps is ten times smaller."""
    reward, *index = flat([[0.1, 0.3, 0.4], [0.4, 0.3, 0.1]], dtype=torch.float32)
    assert reward[0] + reward[1] + reward[2] != reward[3] + reward[4] + reward[5]
    assert estimate("grpo", reward, *index, eps=1e-8).abs().max() < 1e-6


# ---------------------------------------------------------------------- laws of MAPO


def test_the_weights_select_the_halves():
    turn, batch = run("turn", RAGGED), run("batch", RAGGED)
    torch.testing.assert_close(run("mapo", RAGGED, alpha=1.0), turn)
    torch.testing.assert_close(run("mapo", RAGGED, alpha=0.0), batch)
    torch.testing.assert_close(run("mapo", RAGGED, alpha=0.4, beta=0.9), 0.4 * turn + 0.9 * batch)


@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
def test_one_turn_is_grpo_for_any_weight(alpha):
    rewards, groups = [[1.0], [2], [5], [0], [3]], [0, 0, 0, 1, 1]
    got = run("mapo", rewards, groups, alpha=alpha, ddof=1, eps=1e-6)
    torch.testing.assert_close(got, run("grpo", rewards, groups))


def test_a_constant_per_turn_leaves_the_turn_term_alone_where_lengths_are_equal():
    def shifted(rewards):
        return [[r + c for r, c in zip(row, (5, -3, 11), strict=False)] for row in rewards]

    torch.testing.assert_close(run("turn", shifted(CARD)), run("turn", CARD))
    assert (run("turn", shifted(RAGGED)) - run("turn", RAGGED)).abs().max() > 0.1


@pytest.mark.parametrize(
    "name", ["mapo", "turn", "batch", "batch-returns", "grpo", "gigpo", "reinforce++"]
)
@settings(deadline=None, max_examples=30)
@given(st.floats(0.1, 1e4))
def test_scaling_all_rewards_changes_nothing(name, factor):
    scaled = [[factor * r for r in row] for row in RAGGED]
    got, expected = run(name, scaled, eps=1e-12), run(name, RAGGED, eps=1e-12)
    torch.testing.assert_close(got, expected, atol=1e-9, rtol=1e-9)


@settings(deadline=None)
@given(ragged())
def test_means_are_zero(data):
    reward, dialogue, turn, group = flat(*data)
    by_turn = estimate("turn", reward, dialogue, turn, group)
    by_batch = estimate("batch", reward, dialogue, turn, group)
    for g in group.unique():
        assert abs(by_batch[group == g].mean()) < 1e-7
        for t in turn[group == g].unique():
            assert abs(by_turn[(group == g) & (turn == t)].mean()) < 1e-7


def test_a_lone_survivor_has_no_turn_term_and_two_have_no_size():
    for gap in (1e-3, 1e3):
        got = run("turn", [[0.0, 0, 5], [0, gap], [0]], gamma=0.0)
        assert got[2] == 0
        assert got[[1, 4]].tolist() == pytest.approx([-1, 1], abs=1e-4)


def test_a_late_reward_credits_the_first_turn():
    late = [[0.0, 0, 1], [0, 0, 0], [0, 0, 0.5]]
    assert run("turn", late)[0] > 0
    assert run("batch", late)[0] < 0


def test_the_pool_is_the_group_or_the_batch():
    rewards, groups = [[0.0, 1], [10, 12]], [0, 1]
    assert run("batch", rewards, groups).tolist() == pytest.approx([-1, 1, -1, 1], abs=1e-6)
    got = run("batch", rewards, groups, batch_scope="batch")
    assert (got[:2] < 0).all()
    assert (got[2:] > 0).all()


def test_reset_at_user_reproduces_the_old_defect():
    """A reward at the last turn then reaches no earlier turn (docs/papers/mapo.md)."""
    late = [[0.0, 0, 1], [0, 0, 0]]
    good = run("reinforce++", late)
    assert good[:3].tolist() == pytest.approx([1, 1, 1], abs=1e-6)
    crippled = run("reinforce++", late, reset_at_user=True)
    assert (crippled[:2] == crippled[3:5]).all()
    torch.testing.assert_close(crippled, run("batch", late, batch_scope="batch"))


@settings(deadline=None)
@given(ragged(), st.floats(0, 1), st.floats(0, 1))
def test_mapo_is_quasi_hyperbolic_discounting(data, gamma, alpha):
    """Centered only, MAPO is r_t + alpha sum_{s>t} gamma^(s-t) r_s less a number per cell."""
    rewards, groups = data
    later = [
        r[t] + alpha * sum(gamma ** (s - t) * r[s] for s in range(t + 1, len(r)))
        for r in rewards
        for t in range(len(r))
    ]
    got = run("mapo", rewards, groups, gamma=gamma, alpha=alpha, scale=False)
    baseline = (torch.tensor(later, dtype=torch.float64) - got).tolist()
    _, _, turn, group = flat(rewards, groups)
    cells = {}
    for cell, number in zip(zip(group.tolist(), turn.tolist(), strict=True), baseline, strict=True):
        assert cells.setdefault(cell, number) == pytest.approx(number, abs=1e-12)


# ---------------------------------------------------------------------- bias, in closed form

ALIVE = oracle.GO ** np.arange(4)  # probability that a dialogue reaches turn t


def stop_go(name, size, **options):
    """Exact expected gradient on the stop/go chain, and what rewards give it."""
    groups = oracle.stop_go_groups(size)
    rewards = [r for _, dialogues in groups for _, r in dialogues]
    ids = [g for g in range(len(groups)) for _ in range(size)]
    return oracle.stop_go_gradient(groups, run(name, rewards, ids, **options).tolist())


def test_the_chain_has_the_gradients_of_the_card():
    true, myopic = oracle.true_gradient(), oracle.myopic_gradient()
    np.testing.assert_allclose(true, [0.149568, -0.090432, 0.053568, 0.010368], atol=1e-12)
    np.testing.assert_allclose(myopic, [0.24, -0.144, 0.0432, 0.010368], atol=1e-12)
    np.testing.assert_allclose(stop_go("reinforce", 1), true, atol=1e-12)
    np.testing.assert_allclose(stop_go("reinforce", 1, gamma=0.0), myopic, atol=1e-12)


@pytest.mark.parametrize("size", [2, 3, 4])
def test_a_turns_own_mean_keeps_the_direction_and_shrinks_late_turns(size):
    shrink = 1 - (1 - (1 - ALIVE) ** size) / (size * ALIVE)  # 1 - P(n >= 1) / E[n]
    if size == 4:
        np.testing.assert_allclose(shrink, [0.75, 0.594, 0.4221, 0.2799], atol=5e-5)
    got = stop_go("turn", size, gamma=1.0, scale=False)
    np.testing.assert_allclose(got, shrink * oracle.true_gradient(), atol=1e-12)


@pytest.mark.parametrize("size", [2, 3, 4])
def test_the_mean_of_the_others_shrinks_less(size):
    kept = 1 - (1 - ALIVE) ** (size - 1)  # 1 - P(n = 1) / E[n]
    if size == 4:
        np.testing.assert_allclose(kept, [1, 0.936, 0.7379, 0.5181], atol=5e-5)
    got = stop_go("turn", size, gamma=1.0, scale=False, baseline="loo")
    np.testing.assert_allclose(got, kept * oracle.true_gradient(), atol=1e-12)


def test_rewards_centered_first_and_summed_afterwards_are_myopic():
    """The defect raised in verl-project/verl#7244: every future value becomes zero."""
    groups = oracle.stop_go_groups(4)
    rewards = [r for _, dialogues in groups for _, r in dialogues]
    ids = [g for g in range(len(groups)) for _ in range(4)]
    reward, dialogue, turn, group = flat(rewards, ids)
    for baseline, kept in (
        ("mean", 1 - (1 - (1 - ALIVE) ** 4) / (4 * ALIVE)),
        ("loo", 1 - (1 - ALIVE) ** 3),
    ):
        centered = estimate(
            "turn", reward, dialogue, turn, group, gamma=0.0, scale=False, baseline=baseline
        )
        summed = estimate("reinforce", centered, dialogue, turn, group)
        got = oracle.stop_go_gradient(groups, summed.tolist())
        np.testing.assert_allclose(got, kept * oracle.myopic_gradient(), atol=1e-12)


@pytest.mark.parametrize("size", [2, 3, 4])
def test_the_pooled_reward_is_myopic(size):
    """But for a dialogue's own part in the mean of its pool: one over the group's size."""
    gap = np.abs(stop_go("batch", size, scale=False) - oracle.myopic_gradient()).max()
    assert gap * size == pytest.approx(0.0625, abs=0.0005)


def test_mapo_mixes_the_two_gradients():
    mixed = stop_go("mapo", 3, gamma=1.0, alpha=0.3, scale=False)
    turn = stop_go("turn", 3, gamma=1.0, scale=False)
    batch = stop_go("batch", 3, scale=False)
    np.testing.assert_allclose(mixed, 0.3 * turn + 0.7 * batch, atol=1e-12)


# ---------------------------------------------------------------------- the others, by hand


def test_rloo_by_hand():
    assert run("rloo", [[1.0, 1], [4], [0, 0]]).tolist() == [0, 0, 3, -3, -3]


def test_gigpo_compares_turns_that_started_from_the_same_state():
    rewards = [[0.0, 1], [0, 0]]
    anchor = torch.tensor([7, 3, 3, 9])
    got = run("gigpo", rewards, anchor=anchor, gamma=1.0, eps=0.0)
    episode = np.array([1, 1, -1, -1]) / np.sqrt(2)
    step = np.array([0, 1, -1, 0]) / np.sqrt(2)
    assert got.tolist() == pytest.approx((episode + step).tolist())
    got = run("gigpo", rewards, gamma=1.0, eps=0.0, weight=0.0)
    assert got.tolist() == pytest.approx(episode.tolist())


def test_an_agent_is_credited_by_its_own_rewards():
    """Two seats speak in turn; the second earns nothing by what the first is given."""
    reward, dialogue, turn, group = flat([[1.0, 0, 1, 0], [0, 0, 0, 0]])
    got = estimate("grpo", reward, dialogue, turn, group, agent=turn % 2, eps=0.0)
    assert got[turn % 2 == 1].tolist() == [0, 0, 0, 0]
    assert got[turn % 2 == 0].tolist() == pytest.approx(np.array([1, 1, -1, -1]) / np.sqrt(2))


# ---------------------------------------------------------------------- MARS

GAME = [
    [0.1, 0, 1],
    [0, -1],
    [0, 0, -1],
    [0.1, 1],
]  # the card's four trajectories, seats 0, 1, 0, 1
RETURNS = [1.1, 1, 1, -1, -1, -1, -1, -1, 1.1, 1]


def seats(rewards, of=(0, 1, 0, 1)):
    """Seat of each turn, from the seat of each trajectory."""
    return torch.tensor([of[i] for i, row in enumerate(rewards) for _ in row])


@pytest.mark.parametrize("name", ["mars", "marshal"])
def test_the_seats_of_the_card(name):
    got = run(name, GAME, agent=seats(GAME)).tolist()
    expected = [1.083333, 0.983333, 0.983333, -1.025, -1.025]
    assert got == pytest.approx([*expected, *[-1.016667] * 3, 1.075, 0.975], abs=1e-6)
    got = run(name, GAME, agent=seats(GAME), scale=True).tolist()
    expected = [0.972208, 0.882466, 0.882466, -0.86551, -0.86551]
    assert got == pytest.approx([*expected, *[-0.91238] * 3, 0.90773, 0.82329], abs=1e-5)


def test_seats_pooled_by_leaving_the_agent_out():
    got = run("mars", GAME).tolist()
    assert got == pytest.approx([r - 0.02 for r in RETURNS], abs=1e-12)


def test_the_seat_may_as_well_be_part_of_the_group():
    whole = run("mars", GAME, agent=seats(GAME))
    torch.testing.assert_close(run("mars", GAME, [0, 1, 0, 1]), whole, atol=1e-12, rtol=0)


def test_a_seat_is_pooled_over_games_by_the_batch():
    got = run("mars", GAME, [0, 0, 1, 1], agent=seats(GAME), batch_scope="batch")
    torch.testing.assert_close(got, run("mars", GAME, agent=seats(GAME)), atol=1e-12, rtol=0)


def test_one_turn_is_grpo_without_and_with_the_deviation():
    rewards, groups = [[1.0], [2], [5], [0], [3]], [0, 0, 0, 1, 1]
    for scale in (False, True):
        got = run("mars", rewards, groups, scale=scale)
        torch.testing.assert_close(got, run("grpo", rewards, groups, scale=scale))


def test_a_gift_at_the_end_changes_nothing_and_one_at_every_turn_does():
    """Sum first: what every trajectory of a seat gets once is in every return of it."""
    plain = run("mars", GAME, agent=seats(GAME))
    last = [[*row[:-1], row[-1] + 7 * (i % 2)] for i, row in enumerate(GAME)]
    torch.testing.assert_close(run("mars", last, agent=seats(GAME)), plain, atol=1e-12, rtol=0)
    drift = run("mars", [[r + 7 for r in row] for row in GAME], agent=seats(GAME)) - plain
    assert drift[:3].tolist() == pytest.approx([7, 0, -7], abs=1e-12)


def test_seats_of_equal_returns_may_be_pooled():
    rewards = [[0.0, 1], [0, 1], [0, -1], [0, -1]]
    got = run("mars", rewards, agent=seats(rewards))
    torch.testing.assert_close(got, run("mars", rewards), atol=1e-12, rtol=0)


def test_where_one_seat_mostly_wins_only_its_upsets_count_for_much():
    rewards = [[1.0], [-1]] * 9 + [[-1.0], [1]]
    pooled = run("mars", rewards)
    assert pooled.tolist() == [1, -1] * 9 + [-1, 1]
    got = run("mars", rewards, agent=torch.arange(20) % 2)
    assert got.tolist() == pytest.approx([0.2, -0.2] * 9 + [-1.8, 1.8])


@settings(deadline=None, max_examples=40)
@given(ragged(), st.integers(2, 4), st.floats(0.1, 100))
def test_the_games_and_seats_of_mars(data, players, chips):
    """Any number of seats: means are 0, labels are names, games know nothing of each other."""
    reward, dialogue, turn, group = flat(*data)
    agent = dialogue % players
    got = estimate("mars", reward, dialogue, turn, group, agent=agent)
    for pair in set(zip(group.tolist(), agent.tolist(), strict=True)):
        assert abs(got[(group == pair[0]) & (agent == pair[1])].mean()) < 1e-9
    swapped = estimate("mars", reward, dialogue, turn, group, agent=players - 1 - agent)
    torch.testing.assert_close(swapped, got)
    first = group == group[0]
    scaled = torch.where(first, chips * reward, reward)
    other = estimate("mars", scaled, dialogue, turn, group, agent=agent)
    torch.testing.assert_close(other[~first], got[~first], atol=1e-12, rtol=0)
    torch.testing.assert_close(other[first], chips * got[first], atol=1e-9, rtol=1e-9)


@settings(deadline=None, max_examples=40)
@given(st.lists(st.tuples(st.integers(1, 5), st.integers(-2, 2)), min_size=1, max_size=8))
def test_a_reward_at_the_end_credits_all_turns_alike(games):
    rewards = [[0.0] * (n - 1) + [float(r)] for n, r in games]
    got, dialogue = run("mars", rewards), flat(rewards)[1]
    for i in range(len(games)):
        own = got[dialogue == i]
        assert (own - own[0]).abs().max() < 1e-12


def test_whitened_over_tokens_it_keeps_the_contract_but_for_groups():
    check_advantage(
        "mars",
        options=lambda rows: {"tokens": 1 + rows["turn"] % 3},
        skip={"groups": "it whitens over the batch"},
    )


def test_centered_first_and_summed_afterwards_is_not_mars():
    """The card's drift: a mean for every turn that is left."""
    expected = [1.05, 0.966667, 0.983333, -1.05, -1.025]
    expected += [-1.05, -1.033333, -1.016667, 1.05, 0.975]
    got = mars_oracle.normalize_then_sum(GAME, [0, 1, 0, 1])
    assert got == pytest.approx(expected, abs=1e-6)
    mars = run("mars", GAME, agent=seats(GAME))
    drift = np.array(got) - mars.numpy()
    assert drift[:3].tolist() == pytest.approx([-2 / 60, -1 / 60, 0], abs=1e-12)


def test_whitening_gives_each_turn_the_weight_of_its_tokens():
    tokens = torch.tensor([3, 1, 2, 5, 5, 1, 1, 1, 4, 2])
    got = run("mars", GAME, [0, 1, 0, 1], tokens=tokens)  # seats in the group: one batch
    spread_out = got.repeat_interleave(tokens)
    assert abs(spread_out.mean()) < 1e-12
    assert spread_out.var() == pytest.approx(1, abs=1e-6)
    by_agent = run("mars", GAME, agent=seats(GAME), tokens=tokens)
    for seat in (0, 1):
        own = seats(GAME) == seat
        assert by_agent[own].repeat_interleave(tokens[own]).var() == pytest.approx(1, abs=1e-6)


# ---------------------------------------------------------------------- tokens, diagnosis, errors


def test_tokens_take_the_advantage_of_their_turn():
    rows = torch.tensor([[-1, 0, 0, -1, 1], [2, -1, -1, -1, -1]])
    got = to_tokens(torch.tensor([1.0, 2, 3]), rows)
    assert got.tolist() == [[0, 1, 1, 0, 2], [3, 0, 0, 0, 0]]
    assert to_tokens(torch.zeros(0), torch.tensor([[-1, -1]])).tolist() == [[0, 0]]
    assert to_tokens(torch.ones(3), torch.zeros(2, 0, dtype=torch.int64)).shape == (2, 0)
    for row in (-2, 3):
        with pytest.raises(InputError, match=r"turn_row must be in -1\.\.2"):
            to_tokens(torch.zeros(3), torch.tensor([row]))


def test_diagnosis():
    found = diagnose(*flat([[1.0, 0, 2], [3, -1], [0]]))
    assert found.survivors == [3, 2, 1]
    assert found.zero_variance == pytest.approx(1 / 3)
    assert -1 <= found.correlation <= 1
    assert diagnose(*flat([[1.0], [2], [4]])).correlation == pytest.approx(1)


def test_diagnosis_of_a_batch_that_says_nothing():
    assert diagnose(*flat([])) == diagnose(*flat([[NAN, INF]]))
    found = diagnose(*flat([[1.0, 1], [1, 1]]))
    assert (found.zero_variance, found.ratio, found.correlation) == (1, 0, 0)
    reward, dialogue, turn, group = flat([[1.0, 0], [3, 7]])
    mask = turn == 0
    assert diagnose(reward, dialogue, turn, group, mask).survivors == [2]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"name": "nope"}, "estimator must be one of mapo"),
        ({"reward": torch.ones(2, dtype=torch.int64)}, "reward must be floating"),
        ({"turn": torch.tensor([0])}, "turn must be int64 of shape"),
        ({"agent": torch.zeros(2)}, "agent must be int64 of shape"),
        ({"group": torch.tensor([0, -1])}, "group must not be negative"),
        ({"dialogue": torch.tensor([0, 0]), "turn": torch.tensor([1, 1])}, "stand once; .0, 1. is"),
        ({"dialogue": torch.tensor([0, 0]), "group": torch.tensor([0, 1])}, "two groups"),
        ({"batch": torch.tensor([0, 1])}, "group 0 stands in two batches"),
        ({"mask": torch.ones(2)}, "mask must be bool"),
        ({"mask": torch.ones(3, dtype=torch.bool)}, "mask and reward must have the same shape"),
        ({"name": "ppo"}, "ppo needs value"),
        ({"name": "ppo", "value": torch.ones(3)}, "value must have the same shape"),
        ({"name": "ppo", "value": torch.tensor([0, NAN])}, "value must be finite"),
        ({"name": "gigpo", "anchor": torch.ones(2)}, "anchor must be int64"),
        ({"name": "mars", "tokens": torch.ones(2)}, "tokens must be int64"),
        ({"name": "mars", "batch_scope": "seat"}, "batch_scope must be group or batch"),
        ({"no_such_option": 1}, "mapo has no option 'no_such_option'; it has gamma"),
        ({"name": "rloo", "gamma": 1}, "rloo has no option 'gamma'; it has none"),
        ({"batch_scope": "world"}, "batch_scope must be group or batch"),
        ({"baseline": "median"}, "baseline must be mean or loo"),
        ({"gamma": 1.5}, "gamma must be in 0..1"),
    ],
)
def test_bad_input_is_named(change, words):
    arguments = {
        "name": "mapo",
        "reward": torch.ones(2),
        "dialogue": torch.tensor([0, 1]),
        "turn": torch.tensor([0, 1]),
        "group": torch.tensor([0, 0]),
    }
    with pytest.raises(InputError, match=words):
        estimate(**{**arguments, **change})
