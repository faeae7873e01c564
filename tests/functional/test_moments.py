"""Moments: agreement with float64 NumPy, exact zeros, gradients, compile and vmap."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from normkit.errors import InputError
from normkit.functional.moments import (
    KINDS,
    moments,
    normalize,
    segment_moments,
    segment_normalize,
)
from tests.reference.moments import group_moments

values = st.floats(-1e3, 1e3, width=32)
rows = st.lists(st.tuples(values, st.integers(0, 4), st.booleans()), min_size=1, max_size=40)


def _segments(data):
    x = torch.tensor([r[0] for r in data], dtype=torch.float64)
    ids = torch.tensor([r[1] for r in data])
    mask = torch.tensor([r[2] for r in data])
    return x, ids, mask


@settings(deadline=None, max_examples=60)
@given(rows, st.sampled_from(KINDS), st.integers(0, 2))
def test_segments_agree_with_numpy(data, kind, ddof):
    x, ids, mask = _segments(data)
    center, scale, count = segment_moments(x, ids, 5, mask, kind, ddof)
    for s in range(5):
        members = x[(ids == s) & mask].numpy()
        expected = group_moments(members, kind, ddof)
        assert count[s] == len(members)
        np.testing.assert_allclose(
            [center[s].item(), scale[s].item()], expected, rtol=1e-9, atol=1e-9
        )


@settings(deadline=None, max_examples=60)
@given(rows, st.sampled_from(KINDS), st.integers(0, 2))
def test_dense_and_ragged_are_twins(data, kind, ddof):
    x, ids, mask = _segments(data)
    member = (ids[None] == torch.arange(5)[:, None]) & mask
    dense = moments(x.expand(5, -1), 1, member, kind, ddof)
    ragged = segment_moments(x, ids, 5, mask, kind, ddof)
    for a, b in zip(dense, ragged, strict=True):
        torch.testing.assert_close(a.squeeze(1), b, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dim", [0, -1, (0, 2), (1, 2), (0, 1, 2)])
def test_dense_agrees_with_numpy(kind, dim):
    x = torch.randn(3, 4, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    center, scale, count = moments(x, dim, kind=kind, ddof=1)
    dims = tuple(d % 3 for d in ((dim,) if isinstance(dim, int) else dim))
    kept = [d for d in range(3) if d not in dims]
    groups = x.permute(*kept, *dims).reshape(center.numel(), -1).numpy()
    expected = np.array([group_moments(group, kind, 1) for group in groups])
    np.testing.assert_allclose(center.flatten().numpy(), expected[:, 0], atol=1e-12)
    np.testing.assert_allclose(scale.flatten().numpy(), expected[:, 1], rtol=1e-12)
    assert (count == groups.shape[1]).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("value", [1e4, 0.1, -3.3e-5, 65000.0])
@pytest.mark.parametrize("n", [1, 2, 3, 7, 1000])
def test_a_constant_group_is_exactly_zero(dtype, value, n):
    x = torch.full((2, n), value, dtype=dtype)
    for kind in ("std", "l1"):
        center, scale, _ = moments(x, 1, kind=kind)
        assert (scale == 0).all()
        assert (center == x[:, :1].to(center.dtype)).all()
        assert (normalize(x, 1, kind=kind) == 0).all()
        ids = torch.zeros(2 * n, dtype=torch.int64)
        assert (segment_moments(x.flatten(), ids, 1, kind=kind).scale == 0).all()
        assert (segment_normalize(x.flatten(), ids, 1, kind=kind) == 0).all()
        assert (normalize(x, 1, kind=kind, eps=0) == 0).all()
        assert (segment_normalize(x.flatten(), ids, 1, kind=kind, eps=0) == 0).all()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_accumulated_in_float32(dtype, kind):
    x = torch.full((4096,), 0.01, dtype=dtype)
    x[::2] = 0.03
    ids = torch.zeros(4096, dtype=torch.int64)
    expected = group_moments(x.double().numpy(), kind)
    for center, scale, n in (moments(x, 0, kind=kind), segment_moments(x, ids, 1, kind=kind)):
        assert center.dtype == scale.dtype == n.dtype == torch.float32
        np.testing.assert_allclose([center.item(), scale.item()], expected, rtol=1e-5)
    assert normalize(x, 0).dtype == segment_normalize(x, ids, 1).dtype == dtype


@pytest.mark.parametrize("kind", KINDS)
def test_a_large_segment_is_as_exact_as_a_dense_group(kind):
    x = 3 + torch.rand(300_000, generator=torch.Generator().manual_seed(0))
    ids = torch.zeros(len(x), dtype=torch.int64)
    expected = group_moments(x.double().numpy(), kind)
    for center, scale, _ in (moments(x, 0, kind=kind), segment_moments(x, ids, 1, kind=kind)):
        np.testing.assert_allclose([center.item(), scale.item()], expected, rtol=1e-6)


def test_a_large_offset_loses_no_variance():
    noise = torch.randn(512, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x = (1e4 + noise).float()
    ids = torch.zeros(512, dtype=torch.int64)
    expected = normalize(x.double(), 0)
    for scale, out in (
        (moments(x, 0).scale, normalize(x, 0)),
        (segment_moments(x, ids, 1).scale, segment_normalize(x, ids, 1)),
    ):
        assert scale.item() == pytest.approx(x.double().std(correction=0).item(), rel=1e-6)
        # The center itself is rounded to 1e-3 at this offset; the deviations from it are not.
        torch.testing.assert_close(out.double(), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_masked_values_have_no_influence_even_if_nan(kind):
    x = torch.tensor([1.0, 2.0, torch.nan, 4.0, torch.inf], requires_grad=True)
    mask = torch.tensor([True, True, False, True, False])
    ids = torch.zeros(5, dtype=torch.int64)
    plain = normalize(torch.tensor([1.0, 2.0, 4.0]), 0, kind=kind)
    for out in (normalize(x, 0, mask, kind), segment_normalize(x, ids, 1, mask, kind)):
        torch.testing.assert_close(out[mask], plain)
        assert (out[~mask] == 0).all()
        (grad,) = torch.autograd.grad(out.pow(3).sum(), x)
        assert torch.isfinite(grad).all()
        assert (grad[~mask] == 0).all()


def test_one_nan_spoils_only_its_own_group():
    x = torch.tensor([1.0, torch.nan, 3.0, 5.0])
    ids = torch.tensor([0, 0, 1, 1])
    out = segment_normalize(x, ids, 2)
    assert torch.isnan(out[:2]).all()
    torch.testing.assert_close(out[2:], torch.tensor([-1.0, 1.0]))
    assert torch.isnan(normalize(x.reshape(2, 2), 1)[0]).all()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("ddof", [0, 1])
def test_gradients(kind, ddof):
    x = torch.randn(3, 6, dtype=torch.float64, requires_grad=True)
    mask = torch.ones(3, 6, dtype=torch.bool)
    mask[0, 2] = mask[2, 0] = False
    ids = torch.tensor([0, 1, 1])
    assert torch.autograd.gradcheck(lambda t: normalize(t, 1, mask, kind, ddof), (x,))
    assert torch.autograd.gradcheck(lambda t: moments(t, (0, 1), mask, kind, ddof)[:2], (x,))
    assert torch.autograd.gradcheck(lambda t: segment_normalize(t, ids, 2, None, kind, 0), (x,))


def test_the_gradient_of_a_constant_group_is_finite():
    x = torch.full((2, 3), 1e4, requires_grad=True)
    (normalize(x, 1).sum() + moments(x, 1).scale.sum()).backward()
    assert torch.isfinite(x.grad).all()


@settings(deadline=None, max_examples=60)
@given(rows, st.sampled_from(KINDS), st.integers(0, 2), st.sampled_from([0.0, 1e-8, 1.0]))
def test_normalizing_agrees_with_numpy(data, kind, ddof, eps):
    x, ids, mask = _segments(data)
    got = segment_normalize(x, ids, 5, mask, kind, ddof, eps)
    for i in range(len(x)):
        center, scale = group_moments(x[(ids == ids[i]) & mask].numpy(), kind, ddof)
        scale = (scale**0.5 if kind == "quadratic" else scale) + eps
        if not mask[i]:
            assert got[i] == 0
        elif scale > 1e-6:
            assert got[i].item() == pytest.approx((x[i].item() - center) / scale, abs=1e-6)


def test_the_gradient_of_a_group_with_one_constant_feature_is_finite_without_eps():
    x = torch.tensor([[1.0, 5.0], [2.0, 5.0], [4.0, 5.0]], requires_grad=True)
    for out in (normalize(x, 0, eps=0), segment_normalize(x, torch.zeros(3).long(), 1, eps=0)):
        (grad,) = torch.autograd.grad(out.pow(3).sum(), x)
        assert torch.isfinite(grad).all()


def test_empty_groups_and_groups_of_one():
    ids = torch.tensor([0, 2, 2])
    result = segment_moments(torch.tensor([7.0, 1.0, 3.0]), ids, 4, ddof=1)
    assert result.n.tolist() == [1, 0, 2, 0]
    assert result.scale.tolist() == [0, 0, pytest.approx(2**0.5), 0]
    assert result.center.tolist() == [7, 0, 2, 0]
    assert moments(torch.empty(0, 3), 0).center.shape == (1, 3)
    assert segment_normalize(torch.empty(0), torch.empty(0, dtype=torch.int64), 0).shape == (0,)


def test_trailing_features_have_their_own_statistics():
    x = torch.randn(7, 2, 3, dtype=torch.float64)
    ids = torch.tensor([0, 1, 0, 1, 2, 2, 2])
    whole = segment_normalize(x, ids, 3)
    for i in range(2):
        for j in range(3):
            torch.testing.assert_close(whole[:, i, j], segment_normalize(x[:, i, j], ids, 3))


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_compiles_without_a_graph_break(kind):
    x = torch.randn(4, 8)
    mask = torch.rand(4, 8) > 0.3
    ids = torch.tensor([0, 1, 1, 2])

    def both(x, mask, ids):
        return normalize(x, 1, mask, kind), segment_normalize(x, ids, 3, kind=kind)

    for fast, slow in zip(
        torch.compile(both, fullgraph=True)(x, mask, ids), both(x, mask, ids), strict=True
    ):
        torch.testing.assert_close(fast, slow)


@pytest.mark.parametrize("kind", KINDS)
def test_vmap(kind):
    x = torch.randn(5, 6)
    mask = torch.rand(5, 6) > 0.3
    ids = torch.tensor([0, 1, 1, 0, 2, 2])
    torch.testing.assert_close(
        torch.vmap(lambda t, m: normalize(t, 0, m, kind))(x, mask), normalize(x, 1, mask, kind)
    )
    torch.testing.assert_close(
        torch.vmap(lambda t: segment_normalize(t, ids, 3, kind=kind))(x),
        segment_normalize(x.T, ids, 3, kind=kind).T,
    )


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda x: moments(x.long(), 0), "x must be floating point"),
        (lambda x: moments(x, 2), "dim 2 is out of range"),
        (lambda x: moments(x, ()), "dim must name"),
        (lambda x: moments(x, (0, 0)), "each once"),
        (lambda x: moments(x, 0, kind="median"), "kind must be one of"),
        (lambda x: moments(x, 0, ddof=-1), "ddof"),
        (lambda x: moments(x, 0, torch.ones(5, dtype=torch.bool)), "mask of shape"),
        (lambda x: moments(x, 0, torch.ones(2, 3)), "mask must be bool"),
        (lambda x: segment_moments(x, torch.zeros(3, dtype=torch.int64), 1), "segment_ids"),
        (lambda x: segment_moments(x, torch.zeros(2), 1), "int64"),
        (lambda x: segment_moments(x, torch.zeros(2, dtype=torch.int64), -1), "num_segments"),
    ],
)
def test_bad_input_is_named(call, words):
    with pytest.raises(InputError, match=words):
        call(torch.zeros(2, 3))
