"""LayerNorm beside torch's."""

from __future__ import annotations

import copy

import pytest
import torch

from normkit.errors import InputError
from normkit.nn import LayerNorm, RMSNorm
from tests.reference.layernorm import layer_norm


@pytest.mark.parametrize(
    ("ours", "torchs"), [(LayerNorm, torch.nn.LayerNorm), (RMSNorm, torch.nn.RMSNorm)]
)
def test_state_dicts_interchange_with_torch(ours, torchs):
    x = torch.randn(2, 3, 4, 5)
    theirs = torchs((4, 5))
    torch.manual_seed(0)
    for p in theirs.parameters():
        torch.nn.init.normal_(p)
    mine = ours((4, 5))
    mine.load_state_dict(theirs.state_dict())
    torch.testing.assert_close(mine(x), theirs(x))
    again = torchs((4, 5))
    again.load_state_dict(mine.state_dict())
    torch.testing.assert_close(again(x), theirs(x))


@pytest.mark.parametrize("norm", [LayerNorm(6), RMSNorm(6)])
def test_the_residual_form_is_add_then_norm(norm):
    x, residual = torch.randn(2, 3, 6), torch.randn(2, 3, 6)
    out, total = norm(x, residual)
    assert torch.equal(total, x + residual)
    assert torch.equal(out, norm(x + residual))


@pytest.mark.parametrize("kind", [LayerNorm, RMSNorm])
def test_zero_centered_gain_is_one_plus_the_weight(kind):
    x = torch.randn(3, 6)
    plain, centered = kind(6), kind(6, zero_centered=True)
    assert not centered.weight.any()
    assert torch.equal(plain(x), centered(x))
    weight = torch.randn(6)
    with torch.no_grad():
        plain.weight.copy_(1 + weight)
        centered.weight.copy_(weight)
    torch.testing.assert_close(plain(x), centered(x))


def test_training_is_evaluation():
    norm, x = LayerNorm(6), torch.randn(3, 6)
    assert torch.equal(norm.train()(x), copy.deepcopy(norm).eval()(x))


def test_values_are_the_oracle_s():
    norm, x = LayerNorm(6, eps=1e-3).double(), torch.randn(5, 6, dtype=torch.float64)
    expected = torch.from_numpy(layer_norm(x.numpy(), eps=1e-3))
    torch.testing.assert_close(norm(x).detach(), expected)


@pytest.mark.parametrize("kind", [LayerNorm, RMSNorm])
def test_bad_arguments_are_refused(kind):
    for shape in (0, (), (3, -1), "ab"):
        with pytest.raises(InputError, match="normalized_shape"):
            kind(shape)
    with pytest.raises(InputError, match="eps"):
        kind(4, eps=-1.0)
    with pytest.raises(InputError, match=r"residual must have the shape of x \(2, 4\)"):
        kind(4)(torch.ones(2, 4), torch.ones(4))


def test_repr_names_what_differs():
    assert repr(LayerNorm(4)) == "LayerNorm((4,), eps=1e-05, elementwise_affine=True, bias=True)"
    assert "zero_centered=True" in repr(RMSNorm(4, zero_centered=True))
