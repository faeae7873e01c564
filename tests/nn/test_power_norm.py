"""PowerNorm against the oracle, and its laws."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from normkit.errors import InputError
from normkit.nn import PowerNorm
from normkit.nn.power_norm import from_official
from tests.reference.powernorm import PowerNorm as Oracle
from tests.reference.powernorm import layer_scale


def train(layer, x, grad):
    x = x.clone().requires_grad_()
    layer.zero_grad()
    out = layer(x)
    out.backward(grad)
    return out.detach(), x.grad, layer.weight.grad, layer.bias.grad


@pytest.mark.parametrize("warmup", [0, 1, 5, 100])
def test_training_is_the_oracle_s(warmup):
    layer = PowerNorm(3, warmup=warmup, groups=None, dtype=torch.float64)
    oracle = Oracle(3, warmup)
    torch.nn.init.normal_(layer.weight)
    torch.nn.init.normal_(layer.bias)
    oracle.weight = layer.weight.detach().numpy().copy()
    oracle.bias = layer.bias.detach().numpy().copy()
    for i in range(15):
        x, grad = (1 + i) * torch.randn(2, 7, 3, dtype=torch.float64)
        found = train(layer, x, grad)
        expected = (oracle.forward(x.numpy()), *oracle.backward(grad.numpy()))
        for a, b in zip(found, expected, strict=True):
            np.testing.assert_allclose(a.numpy(), b, rtol=1e-9, atol=1e-12)
        np.testing.assert_allclose(layer.running_var.numpy(), oracle.psi2, rtol=1e-12)
        np.testing.assert_allclose(layer.running_grad.numpy(), oracle.nu, rtol=1e-9, atol=1e-14)
    x = torch.randn(4, 3, dtype=torch.float64)
    out = layer.eval()(x).detach().numpy()
    np.testing.assert_allclose(out, oracle.evaluate(x.numpy()), rtol=1e-12)


@pytest.mark.parametrize("groups", [1, 2, 6])
def test_the_layer_scale_is_the_oracle_s(groups):
    layer = PowerNorm(6, warmup=0, groups=groups, dtype=torch.float64)
    x = torch.randn(2, 5, 6, dtype=torch.float64)
    expected = layer_scale(x.flatten(0, 1).numpy(), groups) / np.sqrt(1 + layer.eps)
    np.testing.assert_allclose(layer(x).detach().flatten(0, 1).numpy(), expected, rtol=1e-12)


def test_the_first_batch_of_a_warm_up_sets_the_running_value():
    x = 5 * torch.randn(100, 3, dtype=torch.float64)
    layer = PowerNorm(3, warmup=10, groups=None, dtype=torch.float64)
    layer(x)
    torch.testing.assert_close(layer.running_var, x.square().mean(0))


def test_derivatives_stay_bounded():
    """nu moves to a convex combination of itself and mean(g z) / mean(z^2) while a mean(z^2) <= 1.

    So |nu| never exceeds the largest of those quotients, and the derivative (g - nu z) / psi is
    bounded by what bounds g and z.
    """
    torch.manual_seed(0)
    layer = PowerNorm(8, warmup=0, groups=None, affine=False, eps=0.0, dtype=torch.float64)
    bound = torch.zeros(8, dtype=torch.float64)
    for _ in range(300):
        x = torch.randn(16, 8, dtype=torch.float64) * torch.empty(8).uniform_(0.3, 1.5)
        x = x.requires_grad_()
        z, grad = layer(x), torch.randn(16, 8, dtype=torch.float64)
        if float(z.detach().square().mean(0).max()) * layer.momentum > 1:
            continue
        psi = (x / z).detach().mean(0)
        nu = layer.running_grad.clone()
        z.backward(grad)
        torch.testing.assert_close(x.grad, (grad - nu * z.detach()) / psi)
        quotient = (grad * z.detach()).mean(0) / z.detach().square().mean(0)
        bound = torch.maximum(bound, quotient.abs())
        assert (layer.running_grad.abs() <= bound + 1e-12).all()
    assert bound.min() > 0


def test_a_layer_scale_does_not_fold():
    with pytest.raises(InputError, match="layer scale"):
        PowerNorm(4).inference_affine()


def test_a_state_dict_of_the_authors_loads():
    official = {
        "norm.weight": torch.randn(3),
        "norm.bias": torch.randn(3),
        "norm.running_phi": torch.rand(1, 3, 1, 1),
        "norm.ema_gz": torch.randn(1, 3, 1, 1),
        "norm.iters": torch.tensor([17]),
    }
    layer = PowerNorm(3)
    state = from_official(official)
    layer.load_state_dict({name.removeprefix("norm."): t for name, t in state.items()})
    assert int(layer.num_batches_tracked) == 17
    torch.testing.assert_close(layer.running_grad, 0.1 * official["norm.ema_gz"].flatten())


def test_groups_must_divide_the_channels():
    with pytest.raises(InputError, match="groups"):
        PowerNorm(6, groups=4)
