"""UnifiedNorm against the oracle, and its laws."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from normkit.errors import InputError
from normkit.nn import UnifiedNorm
from normkit.nn.unified_norm import from_official
from tests.reference.unified_norm import UnifiedNorm as Oracle


def train(layer, x, grad):
    x = x.clone().requires_grad_()
    layer.zero_grad()
    out = layer(x)
    out.backward(grad)
    return out.detach(), x.grad, layer.weight.grad, layer.bias.grad


def pair(window, **options):
    layer = UnifiedNorm(3, window_size=window, dtype=torch.float64, **options)
    oracle = Oracle(3, window, options.get("warmup", 4000), options.get("filter_outliers", False))
    torch.manual_seed(0)
    torch.nn.init.normal_(layer.weight)
    torch.nn.init.normal_(layer.bias)
    oracle.weight = layer.weight.detach().numpy().copy()
    oracle.bias = layer.bias.detach().numpy().copy()
    return layer, oracle


def follow(layer, oracle, steps, scale=lambda i: 1.0):
    """Assert that layer and oracle agree in every number of every step."""
    generator = torch.Generator().manual_seed(5)
    for i in range(steps):
        x, grad = torch.randn(2, 7, 3, dtype=torch.float64, generator=generator)
        x = x * scale(i)
        found = train(layer, x, grad)
        expected = (oracle.forward(x.numpy()), *oracle.backward(grad.numpy()))
        for a, b in zip(found, expected, strict=True):
            np.testing.assert_allclose(a.numpy(), b, rtol=1e-9, atol=1e-12)
        for name in ("running_var", "running_grad", "window", "grad_window"):
            np.testing.assert_allclose(
                getattr(layer, name).numpy(), getattr(oracle, name), rtol=1e-9, atol=1e-12
            )
        assert int(layer.num_batches_filtered) == oracle.filtered
    x = torch.randn(4, 3, dtype=torch.float64)
    out = layer.eval()(x).detach().numpy()
    np.testing.assert_allclose(out, oracle.evaluate(x.numpy()), rtol=1e-9)


@pytest.mark.parametrize("window", [1, 2, 4])
@pytest.mark.parametrize("warmup", [0, 6, 100])
def test_training_is_the_oracle_s(window, warmup):
    follow(*pair(window, warmup=warmup), 15)


def test_outliers_are_filtered_as_by_the_oracle():
    layer, oracle = pair(4, warmup=5, filter_outliers=True)
    follow(layer, oracle, 20, lambda i: 1e3 if i in (9, 15) else 1.0)
    # Both are caught; what stays within the bounds of the last windows is not.
    assert 2 <= int(layer.num_batches_filtered) < 10


def test_the_derivative_is_corrected_after_a_thousand_batches():
    layer, oracle = pair(3, warmup=0)
    layer.num_batches_tracked.fill_(998)
    oracle.t = 998
    layer.window.fill_(1)
    oracle.window[:] = 1
    follow(layer, oracle, 6, lambda i: 1 + i)


def test_a_window_of_one_is_division_by_the_batch_s_own_root():
    layer = UnifiedNorm(3, window_size=1, warmup=0, dtype=torch.float64)
    torch.nn.init.normal_(layer.weight)
    for i in range(5):
        x, grad = (1 + i) * torch.randn(2, 7, 3, dtype=torch.float64)
        out, dx, dw, db = train(layer, x, grad)
        x.requires_grad_()
        layer.zero_grad()
        expected = x / (x.square().mean(0) + layer.eps).sqrt() * layer.weight + layer.bias
        expected.backward(grad)
        found = (expected.detach(), x.grad, layer.weight.grad, layer.bias.grad)
        torch.testing.assert_close((out, dx, dw, db), found)


def test_the_geometric_mean_and_its_gap_are_bounded_as_the_threshold_assumes():
    """Var(sqrt) <= AM - GM <= M Var(sqrt) with the population's variance (Aldaz, 2009)."""
    rng = np.random.default_rng(0)
    for m in (2, 4, 7):
        values = rng.gamma(0.5, size=(1000, m)) + 1e-6
        gap = values.mean(1) - np.exp(np.log(values).mean(1))
        spread = np.sqrt(values).var(1)
        assert (gap >= spread - 1e-12).all()
        assert (gap <= m * spread + 1e-12).all()


def test_one_wild_batch_hardly_moves_the_output_scale():
    """The point of the geometric mean: a batch 1e4 times too strong counts as its fourth root."""
    layer = UnifiedNorm(1, warmup=0, affine=False, dtype=torch.float64)
    ones = torch.ones(8, 1, dtype=torch.float64)
    for _ in range(6):
        layer(ones)
    wild = layer(100 * ones)  # mean square 1e4 in one of four slots: geometric mean 10
    torch.testing.assert_close(wild, 100 * ones / 10**0.5, rtol=1e-4, atol=0)


def test_fused_into_the_next_linear_it_is_the_same_function():
    norm, linear = UnifiedNorm(5, dtype=torch.float64), torch.nn.Linear(5, 7).double()
    for _ in range(9):
        norm(3 * torch.randn(11, 5, dtype=torch.float64))
    torch.nn.init.normal_(norm.weight)
    torch.nn.init.normal_(norm.bias)
    scale, shift = norm.eval().inference_affine()
    x = torch.randn(4, 5, dtype=torch.float64)
    fused = F.linear(x, linear.weight * scale, linear.weight @ shift + linear.bias)
    torch.testing.assert_close(fused, linear(norm(x)))


def test_a_state_dict_of_the_authors_loads():
    official = {
        "blocks.0.norm.weight": torch.randn(3),
        "blocks.0.norm.bias": torch.randn(3),
        "blocks.0.norm.running_var": torch.rand(3),
        "blocks.0.norm.ema_gz": torch.randn(3),
        "blocks.0.norm.iters": torch.tensor([17]),
        "blocks.0.norm.buffer_x2": torch.rand(4, 3),
        "blocks.0.norm.buffer_gz": torch.randn(4, 3),
        "blocks.0.norm.skip_counter": torch.tensor([2]),
        "head.weight": torch.randn(2, 3),
    }
    state = from_official(official)
    assert torch.equal(state.pop("head.weight"), official["head.weight"])
    layer = UnifiedNorm(3)
    layer.load_state_dict({name.removeprefix("blocks.0.norm."): t for name, t in state.items()})
    assert int(layer.num_batches_tracked) == 17
    assert int(layer.num_batches_filtered) == 2
    assert torch.equal(layer.window, official["blocks.0.norm.buffer_x2"])


def test_a_window_must_hold_a_batch():
    with pytest.raises(InputError, match="window_size"):
        UnifiedNorm(3, window_size=0)
