"""Sums and scaling per channel, in every layout of memory."""

from __future__ import annotations

import pytest
import torch

from normkit.functional.channels import along, channel_products, mean_square, scale_channels

SHAPES = {  # and dimension of the channels
    "tokens": ((5, 3, 4), -1),
    "rows": ((4, 7), 0),
    "images": ((2, 4, 3, 5), 1),
    "between": ((2, 3, 4, 5), 2),
}
LAYOUTS = {
    "contiguous": lambda x: x,
    "transposed": lambda x: x.transpose(0, -1).contiguous().transpose(0, -1),
    "gapped": lambda x: torch.stack([x, x], -1)[..., 0],
}
DTYPES = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}


@pytest.fixture(params=SHAPES)
def case(request):
    shape, dim = SHAPES[request.param]
    generator = torch.Generator().manual_seed(0)
    return torch.randn(2, *shape, generator=generator, dtype=torch.float64), dim


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_products_are_sums_of_products(case, layout, dtype):
    (a, b), dim = case
    a, b = (LAYOUTS[layout](t.to(dtype)) for t in (a, b))
    product, total = channel_products(a, b, dim)
    others = [d for d in range(a.dim()) if d != dim % a.dim()]
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    assert product.dtype == total.dtype == wide
    # Half input is not rounded on the way: the tolerance is float32's.
    tolerance = 1e-12 if dtype == torch.float64 else 1e-5
    a, b = a.double(), b.double()
    torch.testing.assert_close(product.double(), (a * b).sum(others), rtol=0, atol=tolerance * 30)
    torch.testing.assert_close(total.double(), a.sum(others), rtol=0, atol=tolerance * 30)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shifted", [True, False])
def test_scaling_keeps_dtype_and_rounds_once(case, layout, dtype, shifted):
    (x, other), dim = case
    x = LAYOUTS[layout](x.to(dtype))
    scale, shift = (other.movedim(dim, -1).reshape(-1, x.shape[dim])[i] for i in (0, 1))
    out = scale_channels(x, scale, shift if shifted else None, dim)
    exact = x.double() * along(scale, x, dim) + (along(shift, x, dim) if shifted else 0)
    assert (out.dtype, out.shape) == (dtype, x.shape)
    spacing = torch.finfo(dtype).eps * exact.abs().clamp(min=torch.finfo(dtype).smallest_normal)
    slack = 1e-5 if dtype != torch.float64 else 1e-14  # scale and shift in float32
    assert ((out.double() - exact).abs() <= 0.5 * spacing + slack).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_scaling_keeps_channels_last_memory(dtype):
    x = torch.randn(2, 4, 3, 5).to(dtype, memory_format=torch.channels_last)
    out = scale_channels(x, torch.ones(4), torch.ones(4), 1)
    assert out.is_contiguous(memory_format=torch.channels_last)


def test_scaling_half_input_is_differentiable():
    x = torch.randn(6, 4).bfloat16().requires_grad_()
    scale, shift = (torch.randn(4, requires_grad=True) for _ in range(2))
    upstream = torch.randn(6, 4).bfloat16()
    found = torch.autograd.grad(scale_channels(x, scale, shift, -1), (x, scale, shift), upstream)
    expected = (
        (upstream * scale).bfloat16(),
        (upstream.float() * x).sum(0),
        upstream.float().sum(0),
    )
    for a, b in zip(found, expected, strict=True):
        assert a.dtype == b.dtype
        torch.testing.assert_close(a, b, rtol=1e-2, atol=1e-4)


def test_many_rows_lose_no_digits():
    """One running sum in float32 over 2^18 rows is off by 7e-5 (torch's kernel, 2.13)."""
    x = torch.rand(2**18, 2, generator=torch.Generator().manual_seed(0))
    square, count = mean_square(x, -1, None, False)
    torch.testing.assert_close(square.double(), x.double().square().mean(0), rtol=1e-5, atol=0)
    assert count.tolist() == [2**18] * 2


def test_nothing_sums_to_zero():
    product, total = channel_products(torch.ones(0, 3), torch.ones(0, 3), -1)
    assert product.tolist() == total.tolist() == [0, 0, 0]


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiled_graphs_sum_the_same(case, backend):
    (a, b), dim = case
    torch.compiler.reset()
    compiled = torch.compile(channel_products, fullgraph=True, backend=backend)
    for x, y in zip(compiled(a, b, dim), channel_products(a, b, dim), strict=True):
        torch.testing.assert_close(x, y)
    torch.compiler.reset()
