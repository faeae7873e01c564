"""Sizes of activations and gradients, and leaps of a series."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import nn

from normkit.diagnostics import Monitor, activation, gradient_norms, spikes
from normkit.errors import InputError


def test_sizes_are_those_of_numpy():
    x = torch.randn(3, 5, 7, generator=torch.Generator().manual_seed(0))
    x[1, 2, 3] = -40.0
    found, a = activation(x), np.asarray(x, dtype=np.float64)
    assert found.variance == pytest.approx(a.var(-1).mean(), rel=1e-5)
    assert found.mean_square == pytest.approx((a**2).mean(), rel=1e-5)
    assert found.largest == 40.0
    assert found.median == pytest.approx(np.median(np.abs(a)), rel=1e-6)
    assert found.ratio == pytest.approx(40 / np.median(np.abs(a)), rel=1e-6)


def test_hidden_tokens_do_not_count():
    x = torch.randn(2, 3, 4)
    mask = torch.tensor([[True, True, False], [True, False, False]])
    padded = x.masked_fill(~mask[..., None], torch.nan)
    assert activation(padded, mask) == activation(x[mask])
    assert math.isnan(activation(x, torch.zeros(2, 3, dtype=torch.bool)).variance)


def test_half_precision_is_measured_in_float32():
    x = torch.full((4, 1024), 300.0, dtype=torch.float16)
    assert activation(x).mean_square == 90000.0


def test_zeros_have_no_finite_ratio():
    assert activation(torch.zeros(2, 3)).ratio == math.inf


def test_modules_are_watched_while_the_monitor_is_entered():
    model = nn.Sequential(nn.Linear(3, 4), nn.Identity(), nn.GRU(4, 2))
    x = torch.randn(5, 6, 3)
    monitor = Monitor(model, ["0", "2", ""])
    model(x)
    assert monitor.activations == {}
    with monitor:
        out, _ = model(x)
    assert list(monitor.activations) == ["0", "2", ""]
    assert monitor["0"] == activation(model[0](x))
    assert monitor["2"] == monitor[""] == activation(out)
    model(10 * x)
    assert monitor["0"] == activation(model[0](x))
    assert not model[0]._forward_hooks


def test_a_monitor_lets_go_after_an_error():
    model = nn.Linear(3, 4)
    with pytest.raises(RuntimeError), Monitor(model, [""]):
        model(torch.randn(2, 5))
    assert not model._forward_hooks


def test_a_monitor_takes_a_mask():
    model = nn.Linear(3, 4)
    x, mask = torch.randn(2, 5, 3), torch.arange(5) < torch.tensor([5, 2])[:, None]
    with Monitor(model, [""], mask) as monitor:
        out = model(x)
    assert monitor[""] == activation(out[mask])


def test_gradient_norms_are_of_all_parameters_of_a_module():
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2), nn.Linear(2, 2))
    model[1](model[0](torch.randn(5, 3))).sum().backward()
    norms = gradient_norms(model, ["0", "1", "2", ""])
    flat = [torch.cat([p.grad.flatten() for p in model[i].parameters()]) for i in (0, 1)]
    assert norms["0"] == pytest.approx(float(flat[0].norm()), rel=1e-6)
    assert norms["1"] == pytest.approx(float(flat[1].norm()), rel=1e-6)
    assert norms["2"] == 0.0
    assert norms[""] == pytest.approx(math.hypot(norms["0"], norms["1"]), rel=1e-6)


def test_leaps_are_found_against_the_median_before():
    flat = [1.0] * 5
    assert spikes([*flat, 2.1, 1.0, math.nan, 1.0, 3.0], factor=2, window=5) == [5, 7, 9]
    assert spikes([9.0, *flat, 1.9], factor=2, window=5) == []
    assert spikes([*flat, *[10.0] * 5], factor=2, window=5) == [5, 6, 7]
    assert spikes([1.0, 100.0], window=2) == []


def test_bad_input_is_refused():
    with pytest.raises(InputError, match="modules must be paths"):
        Monitor(nn.Linear(1, 1), ["absent"])
    with pytest.raises(InputError, match="modules must be paths"):
        gradient_norms(nn.Linear(1, 1), ["absent"])
    with pytest.raises(InputError, match="floating point"):
        activation(torch.arange(3))
    with pytest.raises(InputError, match="mask must be bool"):
        activation(torch.randn(2, 3), torch.ones(3, dtype=torch.bool))
    with pytest.raises(InputError, match="factor"):
        spikes([1.0], factor=1.0)
    with pytest.raises(InputError, match="window"):
        spikes([1.0], window=0)
