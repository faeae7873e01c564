"""The norms against NumPy, torch, and numbers worked by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.func import grad, jacfwd, jacrev, vmap

from normkit.errors import InputError
from normkit.functional.norms import complete, compress, crms_norm, layer_norm, rms_norm
from tests.reference import layernorm as layernorm_oracle
from tests.reference import rms_norm as rms_oracle

D = 7
PAIRS = {
    "layer_norm": (layer_norm, layernorm_oracle.layer_norm, layernorm_oracle.layer_norm_gradients),
    "rms_norm": (rms_norm, rms_oracle.rms_norm, rms_oracle.rms_norm_gradients),
}


def leaves(n=5, dtype=torch.float64, seed=0):
    torch.manual_seed(seed)
    made = (3 * torch.randn(n, D) + 1, 1 + torch.randn(D), torch.randn(D))
    return tuple(t.to(dtype).requires_grad_() for t in made)


@pytest.mark.parametrize("name", PAIRS)
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 3e-2)]
)
def test_values_and_gradients_are_those_of_the_oracle(name, dtype, tolerance):
    norm, oracle, oracle_gradients = PAIRS[name]
    x, weight, bias = leaves(dtype=dtype)
    upstream = torch.randn(5, D).to(dtype)
    out = norm(x, (D,), weight, bias, 1e-5)
    out.backward(upstream)
    rows, w, b = (t.detach().double().numpy() for t in (x, weight, bias))
    expected = (
        oracle(rows, w, b, 1e-5),
        *oracle_gradients(rows, w, upstream.double().numpy(), 1e-5),
    )
    for got, want in zip((out, x.grad, weight.grad, bias.grad), expected, strict=True):
        assert got.dtype == dtype
        np.testing.assert_allclose(
            got.detach().double().numpy(), want, rtol=tolerance, atol=tolerance * abs(want).max()
        )


def test_worked_numbers():
    # [1, 2, 4, 5]: mean 3, variance 2.5; mean square 46/4.
    x = torch.tensor([1.0, 2, 4, 5], dtype=torch.float64)
    root = 2.5**0.5
    torch.testing.assert_close(layer_norm(x, (4,), eps=0.0), (x - 3) / root)
    torch.testing.assert_close(rms_norm(x, (4,), eps=0.0), x / 11.5**0.5)
    z = compress(x - 3)
    assert z.tolist() == [-2, -1, 1]
    torch.testing.assert_close(crms_norm(z, eps=0.0), z / root)


def test_crms_norm_is_rms_norm_of_the_completed_vector():
    z = torch.randn(4, 3, D, dtype=torch.float64, requires_grad=True)
    whole = compress(rms_norm(complete(z), (D + 1,), eps=1e-5))
    torch.testing.assert_close(crms_norm(z, 1e-5), whole)
    np.testing.assert_allclose(
        crms_norm(z, 1e-5).detach().flatten(0, 1), rms_oracle.crms_norm(z.detach().flatten(0, 1))
    )
    upstream = torch.randn_like(z)
    (ours,) = torch.autograd.grad(crms_norm(z, 1e-5), z, upstream)
    (theirs,) = torch.autograd.grad(whole, z, upstream)
    torch.testing.assert_close(ours, theirs)


def test_layer_norm_is_rms_norm_of_centered_rows():
    x, weight, bias = leaves()
    centered = x - x.mean(-1, keepdim=True)
    torch.testing.assert_close(
        layer_norm(x, (D,), weight, bias), rms_norm(centered, (D,), weight, bias, 1e-5)
    )


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("eps", [None, 1e-5])
def test_rms_norm_is_that_of_torch(dtype, eps):
    x, weight, _ = leaves(dtype=dtype)
    x = (1e-3 * x).detach()  # small, so that eps counts
    torch.testing.assert_close(
        rms_norm(x, (D,), weight, eps=eps), torch.rms_norm(x, (D,), weight, eps)
    )


@pytest.mark.parametrize("name", PAIRS)
def test_bfloat16_gradients_of_many_rows_are_not_lost(name):
    norm = PAIRS[name][0]
    torch.manual_seed(0)
    x, upstream = torch.randn(8192, D).bfloat16(), torch.randn(8192, D).bfloat16()
    found = []
    for dtype in (torch.bfloat16, torch.float64):
        weight = torch.ones(D, dtype=torch.float64, requires_grad=True)
        bias = torch.zeros(D, dtype=torch.float64, requires_grad=True)
        out = norm(x.to(dtype), (D,), weight.to(dtype), bias.to(dtype), 1e-5)
        found.append(torch.autograd.grad(out, (weight, bias), upstream.to(dtype)))
    for low, exact in zip(*found, strict=True):
        assert (low - exact).abs().max() < 0.01 * exact.abs().max()


@pytest.mark.parametrize("name", PAIRS)
def test_transforms_of_torch_func(name):
    norm = PAIRS[name][0]
    x, weight, bias = (t.detach() for t in leaves())

    def value(w, row):
        return norm(row, (D,), w, bias, 1e-5).square().sum()

    per_sample = vmap(grad(value), (None, 0))(weight, x)
    one_by_one = torch.stack([grad(value)(weight, row) for row in x])
    torch.testing.assert_close(per_sample, one_by_one)
    models = vmap(lambda w: norm(x, (D,), w, bias, 1e-5))(torch.stack([weight, 2 * weight]))
    torch.testing.assert_close(models[1], norm(x, (D,), 2 * weight, bias, 1e-5))
    torch.testing.assert_close(jacfwd(value, 1)(weight, x[0]), jacrev(value, 1)(weight, x[0]))


@pytest.mark.parametrize("name", [*PAIRS, "crms_norm"])
def test_forward_mode(name):
    def function(x, *parameters):
        if name == "crms_norm":
            return crms_norm(x)
        return PAIRS[name][0](x, (D,), *parameters, 1e-5)

    arguments = leaves(2)[: 1 if name == "crms_norm" else 3]
    assert torch.autograd.gradcheck(
        function, arguments, check_forward_ad=True, check_backward_ad=False
    )


def test_second_derivatives_of_half_layer_norm():
    found = []
    for dtype in (torch.bfloat16, torch.float32):
        x, weight, bias = (t.detach().bfloat16().to(dtype).requires_grad_() for t in leaves())
        out = layer_norm(x, (D,), weight, bias).float()
        (first,) = torch.autograd.grad(out.pow(3).sum(), x, create_graph=True)
        found.append(torch.autograd.grad(first.float().square().sum(), (x, weight)))
    for low, exact in zip(*found, strict=True):
        torch.testing.assert_close(
            low.float(), exact, rtol=0.1, atol=0.05 * float(exact.abs().max())
        )


@pytest.mark.parametrize("name", PAIRS)
def test_only_what_needs_a_gradient_gets_one(name):
    norm = PAIRS[name][0]
    for dtype in (torch.float32, torch.bfloat16):
        for wanted in range(3):
            arguments = [t.detach().to(dtype) for t in leaves()]
            arguments[wanted].requires_grad_()
            norm(arguments[0], (D,), *arguments[1:], 1e-5).sum().backward()
            assert [a.grad is not None for a in arguments] == [i == wanted for i in range(3)]


@pytest.mark.parametrize("norm", [layer_norm, rms_norm])
def test_a_group_may_span_dimensions(norm):
    x = torch.randn(2, 3, 4, 5, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(4, 5, dtype=torch.float64, requires_grad=True)
    whole = norm(x, (4, 5), weight, eps=1e-5)
    flat = norm(x.flatten(2), (20,), weight.flatten(), eps=1e-5).reshape(x.shape)
    torch.testing.assert_close(whole, flat)
    upstream = torch.randn_like(x)
    for a, b in zip(
        torch.autograd.grad(whole, (x, weight), upstream),
        torch.autograd.grad(flat, (x, weight), upstream),
        strict=True,
    ):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("norm", [layer_norm, rms_norm])
def test_nan_stays_in_its_token_and_constant_tokens_are_finite(norm):
    x = torch.randn(3, D)
    x[1, 2] = torch.nan
    x[2] = 5.0
    out = norm(x, (D,), eps=1e-5)
    assert out[1].isnan().all()
    assert out[[0, 2]].isfinite().all()
    if norm is layer_norm:
        assert not out[2].any()


@pytest.mark.parametrize("norm", [layer_norm, rms_norm])
def test_bad_input_is_refused(norm):
    with pytest.raises(InputError, match="floating point"):
        norm(torch.ones(2, 3, dtype=torch.int64), (3,))
    with pytest.raises(InputError, match=r"end in normalized_shape \(3,\), got shape \(2, 4\)"):
        norm(torch.ones(2, 4), (3,))
    with pytest.raises(InputError, match="normalized_shape"):
        norm(torch.ones(2, 4), ())
    for bad in (torch.tensor(1.0), torch.ones(2, dtype=torch.int32)):
        with pytest.raises(InputError):
            crms_norm(bad)
    with pytest.raises(InputError, match="two coordinates"):
        compress(torch.ones(3, 1))
    with pytest.raises(InputError, match="scalar"):
        complete(torch.tensor(1.0))


class _Norm(torch.nn.Module):
    def __init__(self, norm):
        super().__init__()
        self.norm = norm
        self.weight, self.bias = (torch.nn.Parameter(torch.randn(D)) for _ in range(2))

    def forward(self, x):
        return self.norm(x, (D,), self.weight, self.bias, 1e-5)


@pytest.mark.parametrize("norm", [layer_norm, rms_norm])
def test_exported_programs_hold_torch_s_operators_alone(norm):
    program = torch.export.export(_Norm(norm).eval(), (torch.randn(3, D),))
    called = {str(n.target) for n in program.graph.nodes if n.op == "call_function"}
    assert called
    assert not [name for name in called if "normkit" in name]


@pytest.mark.parametrize("norm", [layer_norm, rms_norm])
@pytest.mark.parametrize("without", [torch.no_grad, torch.inference_mode])
def test_compiled_without_derivatives(norm, without):
    torch.compiler.reset()
    module, x = _Norm(norm), torch.randn(5, D)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    with without():
        torch.testing.assert_close(compiled(x), module(x))
    torch.compiler.reset()


@pytest.mark.parametrize("norm", [layer_norm, rms_norm])
def test_compiled_transforms_of_torch_func(norm):
    torch.compiler.reset()
    x, weight, bias = (t.detach() for t in leaves())

    def value(w):
        return norm(x, (D,), w, bias, 1e-5).pow(3).sum()

    compiled = torch.compile(grad(value), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(weight), grad(value)(weight))
    torch.compiler.reset()
