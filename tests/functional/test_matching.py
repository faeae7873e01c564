"""Matchings against brute force and loops, transport against its marginals, the card's numbers."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays
from scipy.optimize import linear_sum_assignment

from normkit.errors import InputError
from normkit.functional.matching import METHODS, greedy, hungarian, match, sinkhorn
from tests.reference import matchtir as oracle

CARD = [[1.0, 0.5], [0.6, 0.0]]
REDUNDANT = [[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]]


def tensor(rows):
    return torch.tensor(rows, dtype=torch.float64)


def scores(side=6, elements=None):
    """Score matrices with many ties and zeros."""
    if elements is None:
        elements = st.sampled_from([0.0, 0.25, 0.5, 0.583333, 0.75, 1.0])
    shapes = array_shapes(min_dims=2, max_dims=2, max_side=side)
    return shapes.flatmap(lambda shape: arrays(np.float64, shape, elements=elements))


# ---------------------------------------------------------------------- worked numbers


def test_greedy_can_lose():
    assert greedy(tensor(CARD)).tolist() == [0, -1]
    assert hungarian(tensor(CARD)).tolist() == [1, 0]
    assert match(tensor(CARD)).reward.tolist() == [0.5, 0.6]
    assert match(tensor(CARD), "greedy").reward.tolist() == [1.0, 0.0]


def test_worked_transport():
    plan = sinkhorn(tensor(CARD), 0.1)
    np.testing.assert_allclose(plan, [[0.18877, 0.31123], [0.31123, 0.18877]], atol=1e-5)
    for reg, expected in ((0.1, [0.344385, 0.186738]), (0.01, [0.2517, 0.2980])):
        paid = match(tensor(CARD), "ot", reg=reg).reward
        np.testing.assert_allclose(paid, expected, atol=5e-5)
    np.testing.assert_allclose(match(tensor(CARD), "ot", reg=1e-3).reward, [0.25, 0.30], atol=1e-6)


def test_soft_matching_pays_the_copy_of_a_call():
    assert match(tensor(REDUNDANT)).reward.tolist() == [1, 0, 1]
    soft = match(tensor(REDUNDANT), "ot").reward
    np.testing.assert_allclose(soft, [0.25, 0.25, 1 / 3], atol=1e-4)


def test_three_perfect_calls_earn_a_third_each():
    paid = match(torch.eye(3, dtype=torch.float64), "ot").reward
    np.testing.assert_allclose(paid, [0.333303] * 3, atol=1e-6)
    whole = match(torch.eye(3, dtype=torch.float64), "ot", rescale=True).reward
    np.testing.assert_allclose(whole, [0.999909] * 3, atol=1e-6)


@pytest.mark.parametrize("copies", [2, 3, 5])
def test_copies_of_one_call(copies):
    same = torch.ones(copies, 1, dtype=torch.float64)
    assert match(same).reward.tolist() == [1] + [0] * (copies - 1)
    np.testing.assert_allclose(match(same, "ot").reward, [1 / copies] * copies, atol=1e-12)


# ---------------------------------------------------------------------- hard matching


@settings(deadline=None, max_examples=200)
@given(scores())
def test_hungarian_is_the_best_of_all_matchings(matrix):
    assignment = hungarian(torch.from_numpy(matrix))
    paid = match(torch.from_numpy(matrix)).reward
    assert float(paid.sum()) == pytest.approx(oracle.best_sum(matrix), abs=1e-9)
    taken = assignment[assignment >= 0].tolist()
    assert len(set(taken)) == len(taken)
    assert float(paid.sum()) >= float(match(torch.from_numpy(matrix), "greedy").reward.sum()) - 1e-9
    assert float(paid.sum()) <= min(matrix.shape)


@pytest.mark.parametrize("shape", [(6, 4), (4, 6), (5, 5)])
def test_problems_solved_together_are_each_the_best(shape):
    """Ties are frequent; in some problems a best row has to be moved, some go to SciPy."""
    generator = torch.Generator().manual_seed(shape[0])
    values = torch.tensor([0, 0, 0.4, 0.6, 0.6, 1], dtype=torch.float64)
    batch = values[torch.randint(6, (150, *shape), generator=generator)]
    found = match(batch)
    for matrix, reward, assignment in zip(batch, found.reward, found.assignment, strict=True):
        assert float(reward.sum()) == pytest.approx(oracle.best_sum(matrix.tolist()), abs=1e-12)
        taken = assignment[assignment >= 0].tolist()
        assert len(set(taken)) == len(taken)
        assert (reward[assignment >= 0] > 0).all()


@pytest.mark.parametrize("places", [14, 15, 16, 31, 32, 63, 64])
@pytest.mark.parametrize("turned", [False, True])
def test_as_many_places_as_the_bits_of_a_number(places, turned):
    """Beside SciPy's matchings; the padding, which holds anything, is cut off for it."""
    generator = torch.Generator().manual_seed(places)
    batch = torch.randint(9, (60, places, 3), generator=generator) / 8.0
    rows = torch.rand(60, places, generator=generator) < 0.2
    rows[0] = True
    batch[~rows] = torch.inf
    batch[:, :, 0].masked_fill_(~rows, torch.nan)
    masks = {"rows": rows}
    if turned:
        batch, masks = batch.mT, {"columns": rows}
    found = match(batch, **masks)
    for matrix, kept, reward in zip(batch, rows, found.reward, strict=True):
        matrix = (matrix[:, kept] if turned else matrix[kept]).numpy()  # noqa: PLW2901
        best = matrix[linear_sum_assignment(matrix, maximize=True)].sum()
        assert float(reward.sum()) == pytest.approx(best, abs=1e-5)


@settings(deadline=None, max_examples=200)
@given(scores())
def test_greedy_is_the_authors_loop(matrix):
    assert greedy(torch.from_numpy(matrix)).tolist() == oracle.greedy(matrix.tolist())


@settings(deadline=None)
@given(scores(5, st.floats(0, 1)), st.randoms(use_true_random=False))
def test_permuting_rows_permutes_rewards_and_permuting_columns_changes_nothing(matrix, random):
    # Distinct scores: of equal optima any may be returned.
    matrix = matrix + np.arange(matrix.size).reshape(matrix.shape) * 1e-3 * np.sqrt(2)
    i = random.sample(range(matrix.shape[0]), matrix.shape[0])
    j = random.sample(range(matrix.shape[1]), matrix.shape[1])
    for method in METHODS:
        plain = match(torch.from_numpy(matrix), method).reward
        moved = match(torch.from_numpy(matrix[np.ix_(i, j)]), method).reward
        if method == "hungarian":
            assert float(moved.sum()) == pytest.approx(float(plain.sum()), abs=1e-9)
        else:
            np.testing.assert_allclose(moved, plain[i], atol=1e-6)


def test_the_rewards_of_a_unique_optimum_are_permuted():
    matrix = tensor([[0.9, 0.8, 0.1], [0.7, 0.2, 0.3], [0.6, 0.5, 0.45], [0.1, 0.15, 0.05]])
    plain = match(matrix).reward
    assert plain.tolist() == [0.8, 0.7, 0.45, 0]
    for i in itertools.permutations(range(4)):
        for j in itertools.permutations(range(3)):
            assert match(matrix[list(i)][:, list(j)]).reward.tolist() == plain[list(i)].tolist()


def test_rows_without_a_match_earn_the_penalty():
    matrix = tensor([[1.0], [0.9], [0.0]])
    for method in ("hungarian", "greedy"):
        assert match(matrix, method, unmatched=-0.5).reward.tolist() == [1, -0.5, -0.5]


def test_of_equal_rows_the_first_is_paid():
    for m, n in itertools.product(range(1, 5), repeat=2):
        same = torch.full((m, n), 0.5)
        count = min(m, n)
        for method in ("hungarian", "greedy"):
            assert match(same, method).reward.tolist() == [0.5] * count + [0.0] * (m - count)


# ---------------------------------------------------------------------- transport


@settings(deadline=None, max_examples=60)
@given(scores(6, st.floats(0, 1)), st.sampled_from([0.01, 0.05, 0.1, 0.5]))
def test_the_plan_has_its_marginals_whatever_the_scores(matrix, reg):
    plan = sinkhorn(torch.from_numpy(matrix), reg)
    m, n = matrix.shape
    np.testing.assert_allclose(plan.sum(1), np.full(m, 1 / m), atol=1e-12)
    np.testing.assert_allclose(plan.sum(0), np.full(n, 1 / n), atol=1e-6)
    shifted = sinkhorn(torch.from_numpy(matrix) - 3, reg)
    np.testing.assert_allclose(shifted, plan, atol=1e-6)


@settings(deadline=None, max_examples=30)
@given(scores(5, st.floats(0, 1)), st.sampled_from([0.3, 1.0]))
def test_the_plan_is_that_of_plain_scaling(matrix, reg):
    plan = sinkhorn(torch.from_numpy(matrix), reg)
    np.testing.assert_allclose(plan, oracle.transport(matrix, reg, 2000), atol=1e-8)


def test_ties_do_not_slow_it_down():
    """Turns alone are at (4e-6, 1.3e-4) after 2,000 of them; the diagonal is exp(-10) / 2."""
    plan = sinkhorn(tensor([[0.0, 1.0], [1.0, 1.0]]), 0.05, iterations=40)
    np.testing.assert_allclose(
        plan.diagonal(), [np.exp(-10) / 2 / (1 + np.exp(-10))] * 2, rtol=1e-4
    )


def test_a_small_reg_does_not_underflow():
    plan = sinkhorn(tensor([[1.0, 0.0], [0.0, 1.0]]), 1e-4)
    np.testing.assert_allclose(plan, [[0.5, 0], [0, 0.5]], atol=1e-12)


def test_a_plan_that_does_not_settle_is_announced():
    with pytest.warns(RuntimeWarning, match="had not settled after 2 iterations"):
        plan = sinkhorn(tensor(CARD), 0.1, iterations=2)
    np.testing.assert_allclose(plan.sum(1), [0.5, 0.5], atol=1e-12)


# ---------------------------------------------------------------------- batches, gradients, edges


@pytest.mark.parametrize("method", METHODS)
def test_a_padded_batch_is_its_problems_one_by_one(method):
    generator = torch.Generator().manual_seed(0)
    shapes = [(1, 1), (3, 2), (2, 4), (4, 4), (5, 0), (0, 3)]
    padded = torch.full((2, 3, 5, 4), torch.nan, dtype=torch.float64)
    rows, columns = torch.zeros(2, 3, 5, dtype=torch.bool), torch.zeros(2, 3, 4, dtype=torch.bool)
    alone = []
    for k, (m, n) in enumerate(shapes):
        place = divmod(k, 3)
        matrix = torch.rand(m, n, generator=generator, dtype=torch.float64)
        padded[place][:m, :n] = matrix
        rows[place][:m] = True
        columns[place][:n] = True
        alone.append(match(matrix, method))
    # What stands in the padding is not looked at.
    together = match(padded, method, rows=rows, columns=columns)
    for k, (m, n) in enumerate(shapes):
        place = divmod(k, 3)
        np.testing.assert_allclose(together.reward[place][:m], alone[k].reward, atol=1e-8)
        assert (together.reward[place][m:] == 0).all()
        if method == "ot":
            np.testing.assert_allclose(together.plan[place][:m, :n], alone[k].plan, atol=1e-8)
        else:
            assert together.assignment[place][:m].tolist() == alone[k].assignment.tolist()
            assert (together.assignment[place][m:] == -1).all()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("shape", [(0, 0), (0, 3), (3, 0), (2, 0, 3), (0, 2, 2)])
def test_nothing_to_match(method, shape):
    paid = match(torch.zeros(shape), method, unmatched=-0.5).reward
    assert paid.shape == shape[:-1]
    assert paid.tolist() == torch.full(shape[:-1], 0.0 if method == "ot" else -0.5).tolist()


def test_gradients():
    matrix = tensor([[0.9, 0.5], [0.6, 0.1], [0.2, 0.3]]).requires_grad_()
    for method in ("hungarian", "greedy"):
        assert torch.autograd.gradcheck(lambda s, m=method: match(s, m).reward, matrix)
    assert torch.autograd.gradcheck(lambda s: match(s, "ot", reg=0.2).reward, matrix)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dtypes_are_kept(dtype):
    for method in METHODS:
        assert match(torch.rand(4, 3, dtype=dtype), method).reward.dtype == dtype


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"score": torch.ones(3)}, r"score must be .* \(\*, m, n\)"),
        ({"score": torch.ones(2, 2, dtype=torch.int64)}, "score must be floating"),
        ({"score": -torch.ones(2, 2)}, "not negative"),
        ({"score": torch.full((2, 2), torch.nan)}, "finite"),
        ({"score": torch.ones(2, 2), "method": "auction"}, "method must be one of hungarian"),
        ({"score": torch.ones(2, 2), "method": "ot", "reg": 0.0}, "reg must be above 0"),
        ({"score": torch.ones(2, 2), "rows": torch.ones(3, dtype=torch.bool)}, "rows must be bool"),
        ({"score": torch.ones(2, 2), "columns": torch.ones(2)}, "columns must be bool"),
    ],
)
def test_bad_input(arguments, message):
    with pytest.raises(InputError, match=message):
        match(**arguments)
