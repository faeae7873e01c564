"""Blocks by the placement of their norms."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from normkit.errors import InputError
from normkit.nn import (
    PLACEMENTS,
    LayerNorm,
    PowerNorm,
    Residual,
    RMSNorm,
    Transformer,
    TransformerBlock,
)
from tests.reference import peri_ln as reference

NORMS = {"post": 2, "pre": 2, "output": 2, "sandwich": 4, "peri": 4}


def block(placement, seed=0, **options):
    torch.manual_seed(seed)
    made = TransformerBlock(8, 2, 12, placement, **{"dtype": torch.float64, **options})
    with torch.no_grad():
        for p in made.parameters():
            p.add_(0.2 * torch.randn_like(p))
    return made


def tokens(*size, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*size, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("masked", [False, True])
def test_a_block_is_the_reference(placement, causal, masked):
    made, x = block(placement, causal=causal), tokens(3, 5, 8)
    mask = torch.arange(5) < torch.tensor([5, 2, 3])[:, None] if masked else None
    state = {name: t.numpy() for name, t in made.state_dict().items()}
    with torch.no_grad():
        got = made(x, mask).numpy()
    for i in range(3):
        seen = None if mask is None else mask[i].numpy()
        want = reference.block(x[i].numpy(), state, placement, 2, causal, seen)
        np.testing.assert_allclose(got[i], want, rtol=1e-10, atol=1e-12)


def test_with_the_identity_for_a_norm_all_placements_coincide():
    outputs = [block(p, norm=nn.Identity)(tokens(2, 5, 8)) for p in PLACEMENTS]
    for out in outputs[1:]:
        assert torch.equal(out, outputs[0])
    assert not torch.allclose(block("pre")(tokens(2, 5, 8)), block("peri")(tokens(2, 5, 8)))


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_the_norms_stand_where_the_placement_says(placement):
    found = {
        name.split(".")[-1]
        for name, m in block(placement).named_modules()
        if isinstance(m, LayerNorm)
    }
    want = {
        "post": {"norm_sum"},
        "pre": {"norm_in"},
        "output": {"norm_out"},
        "sandwich": {"norm_in", "norm_out"},
        "peri": {"norm_in", "norm_out"},
    }
    assert found == want[placement]
    made = block(placement)
    assert sum(isinstance(m, LayerNorm) for m in made.modules()) == NORMS[placement]


@pytest.mark.parametrize("sublayer", ["attention", "feed_forward"])
@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("c", [0.1, 7.0])
def test_scaling_the_last_map_of_a_sublayer(sublayer, placement, c):
    """An output norm undoes the scale and divides the gradient by it; without one both stay."""
    norm = partial(LayerNorm, eps=0.0)
    x, cotangent = tokens(2, 5, 8), tokens(2, 5, 8, seed=2)

    def run(scale):
        branch = getattr(block(placement, norm=norm, bias=False), sublayer)
        weight = getattr(branch.sublayer, "out" if sublayer == "attention" else "down").weight
        with torch.no_grad():
            weight.mul_(scale)
        out = branch(x)
        (out * cotangent).sum().backward()
        return out.detach() - x, weight.grad

    (one, grad), (scaled, scaled_grad) = run(1.0), run(c)
    if placement in ("peri", "sandwich", "output"):
        torch.testing.assert_close(scaled, one, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(scaled_grad * c, grad, rtol=1e-10, atol=1e-12)
    elif placement == "pre":
        torch.testing.assert_close(scaled, c * one, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(scaled_grad, grad, rtol=1e-10, atol=1e-12)
    else:
        assert not torch.allclose(scaled, one)


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_a_causal_block_does_not_look_ahead(placement):
    made, x = block(placement, causal=True), tokens(2, 6, 8)
    changed = torch.cat([x[:, :4], tokens(2, 2, 8, seed=5)], 1)
    torch.testing.assert_close(made(x)[:, :4], made(changed)[:, :4], rtol=1e-12, atol=1e-12)
    assert not torch.allclose(made(x)[:, 4:], made(changed)[:, 4:])


@pytest.mark.parametrize("causal", [False, True])
def test_padding_is_as_if_it_were_not_there(causal):
    made, x = block("peri", causal=causal), tokens(2, 6, 8)
    mask = torch.arange(6) < torch.tensor([6, 4])[:, None]
    torch.testing.assert_close(made(x, mask)[1, :4], made(x[1:, :4])[0], rtol=1e-12, atol=1e-12)
    left = mask.flip(1)
    assert made(x, left).isfinite().all()
    torch.testing.assert_close(made(x, left)[1, 2:], made(x[1:, 2:])[0], rtol=1e-12, atol=1e-12)


def test_norms_with_running_statistics_are_given_the_mask():
    made, x = block("pre", norm=partial(PowerNorm, warmup=0, groups=None)), tokens(2, 6, 8)
    mask = torch.arange(6) < torch.tensor([6, 2])[:, None]
    made(x, mask)
    norm = made.attention.norm_in
    want = 0.9 + 0.1 * x[mask].square().mean(0)
    torch.testing.assert_close(norm.running_var, want)


def test_second_derivatives_without_the_fused_attention():
    made = TransformerBlock(4, 2, 4, causal=True, bias=False, dtype=torch.float64)
    x = tokens(1, 3, 4).requires_grad_()
    with sdpa_kernel(SDPBackend.MATH):
        assert torch.autograd.gradgradcheck(made, x)


def test_dropout_is_of_training_only():
    made, x = block("peri", dropout=0.5), tokens(2, 5, 8)
    assert not torch.equal(made(x), made(x))
    made.eval()
    assert torch.equal(made(x), made(x))
    assert torch.equal(made(x), block("peri").eval()(x))
    branch = Residual(nn.Identity(), 4, "pre", nn.Identity, dropout=0.5)
    out = branch(torch.ones(1, 1000, 4)) - 1
    assert set(out.unique().tolist()) == {0.0, 2.0}
    assert 0.4 < float((out > 0).float().mean()) < 0.6


@pytest.mark.parametrize(
    ("placement", "first", "last"),
    [
        ("post", False, False),
        ("pre", False, True),
        ("output", False, True),
        ("sandwich", False, True),
        ("peri", True, True),
    ],
)
def test_a_stack_has_the_norms_of_its_placement_at_its_ends(placement, first, last):
    stack = Transformer(8, 2, 3, placement, RMSNorm)
    assert (stack.embedding_norm is not None, stack.final_norm is not None) == (first, last)
    assert len(stack.blocks) == 3
    turned = Transformer(8, 2, 1, placement, embedding_norm=not first, final_norm=not last)
    assert (turned.embedding_norm is not None, turned.final_norm is not None) == (
        not first,
        not last,
    )


def test_a_stack_is_its_parts_in_order():
    stack = Transformer(8, 2, 2, causal=True).double()
    x, mask = tokens(2, 5, 8), torch.ones(2, 5, dtype=torch.bool)
    want = stack.embedding_norm(x)
    for made in stack.blocks:
        want = made(want, mask)
    torch.testing.assert_close(stack(x, mask), stack.final_norm(want))


def test_a_stack_is_reset_as_it_was_made():
    torch.manual_seed(3)
    stack = Transformer(8, 2, 2, "pre")
    fresh = {name: t.clone() for name, t in stack.state_dict().items()}
    with torch.no_grad():
        for p in stack.parameters():
            p.zero_()
    torch.manual_seed(3)
    stack.reset_parameters()
    assert all(torch.equal(t, fresh[name]) for name, t in stack.state_dict().items())


def test_the_variance_of_a_peri_stack_grows_by_one_a_sublayer():
    """Signs of the last maps are symmetric, so ``E Var(x_L) = Var(x_0) + 2 L``."""
    gaps = []
    x = tokens(2, 8, 64)
    for seed in range(40):
        torch.manual_seed(seed)
        stack = Transformer(64, 4, 5, "peri", embedding_norm=False, final_norm=False, bias=False)
        with torch.no_grad():
            out = stack.double()(x)
        gaps.append(float((out.var(-1, correction=0) - x.var(-1, correction=0)).mean()))
    error = np.std(gaps, ddof=1) / np.sqrt(len(gaps))
    assert abs(np.mean(gaps) - 10) < 4 * error
    assert error < 0.2


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"placement": "around"}, "placement must be one of post, pre"),
        ({"heads": 3}, "heads must divide dim"),
        ({"heads": 0}, "heads must divide dim"),
        ({"hidden": 0}, "hidden must be at least 1"),
        ({"dropout": 1.0}, r"dropout must be in \[0, 1\)"),
    ],
)
def test_bad_options_are_refused(options, name):
    with pytest.raises(InputError, match=name):
        TransformerBlock(**{"dim": 8, "heads": 2, **options})


def test_bad_inputs_are_refused():
    made = TransformerBlock(8, 2)
    with pytest.raises(InputError, match=r"x must be \[B, N, 8\]"):
        made(torch.randn(5, 8))
    for mask in (torch.ones(2, 5), torch.ones(2, 4, dtype=torch.bool)):
        with pytest.raises(InputError, match=r"mask must be bool \(2, 5\)"):
            made(torch.randn(2, 5, 8), mask)
    with pytest.raises(InputError, match="layers must be at least 1"):
        Transformer(8, 2, 0)
