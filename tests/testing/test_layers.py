"""Each check of the layer contract finds the layer that breaks it, and passes one that does not."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import nn

from normkit.errors import InputError
from normkit.nn import LayerNorm
from normkit.testing import LAYER_CHECKS, LayerCase, check_layer
from normkit.testing.layers import check_mask


class Scale(nn.Module):
    """Keeps the whole contract: ``x * weight`` where the mask is True."""

    def __init__(self, features, device=None, dtype=None):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(features, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self):
        nn.init.ones_(self.weight)

    def forward(self, x, mask=None):
        if not x.is_floating_point() or x.shape[-1:] != self.weight.shape:
            raise InputError("x must be floating point and end in the features")
        if mask is not None:
            x = x.masked_fill(~mask[..., None], 0)
        return x * self.weight

    def extra_repr(self):
        return str(len(self.weight))


class WrongGradient(Scale):
    def forward(self, x, mask=None):
        return super().forward(x, mask) * self.weight.detach()


class SecondOnly(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.square()

    @staticmethod
    def backward(ctx, grad):
        return 2 * grad * ctx.saved_tensors[0].detach()


class WrongSecondGradient(Scale):
    def forward(self, x, mask=None):
        return SecondOnly.apply(super().forward(x, mask))


class BreaksGraph(Scale):
    def forward(self, x, mask=None):
        if x.sum().item() > 1e9:
            return x
        return super().forward(x, mask)


class CompilesToOther(Scale):
    def forward(self, x, mask=None):
        return super().forward(x, mask) + (1.0 if torch.compiler.is_compiling() else 0.0)


class Widens(Scale):
    def forward(self, x, mask=None):
        return super().forward(x, mask).float()


class IsOtherInBfloat16(Scale):
    def forward(self, x, mask=None):
        low = torch.is_autocast_enabled("cpu") or x.dtype == torch.bfloat16
        return super().forward(x, mask) * (1.1 if low else 1)


class IgnoresDtype(Scale):
    def __init__(self, features, device=None, dtype=None):
        super().__init__(features)


class MeanOverBatch(Scale):
    def forward(self, x, mask=None):
        return super().forward(x, mask) - x.mean(0)


class RunningMean(Scale):
    def __init__(self, features, device=None, dtype=None):
        super().__init__(features, device, dtype)
        self.register_buffer("mean", torch.zeros(features, device=device, dtype=dtype))

    def forward(self, x, mask=None):
        self.mean = x.detach().mean((0, 1))
        return super().forward(x, mask)


class ReadsMemory(Scale):
    def forward(self, x, mask=None):
        return super().forward(x.as_strided(x.shape, torch.empty(x.shape).stride()), mask)


class Leaks(Scale):
    def forward(self, x, mask=None):
        return super().forward(x, mask) + 0 * x.sum(1, keepdim=True)


class HidesState(Scale):
    def __init__(self, features, device=None, dtype=None):
        super().__init__(features, device, dtype)
        self.hidden = torch.randn(features, device=device, dtype=dtype)

    def forward(self, x, mask=None):
        return super().forward(x, mask) + self.hidden.to(x)


class SharesState(Scale):
    def __deepcopy__(self, memo):
        return self


class Forgets(Scale):
    def reset_parameters(self):
        if not self.weight.any():
            nn.init.ones_(self.weight)


class Silent(Scale):
    def extra_repr(self):
        return ""


class TakesAnything(Scale):
    def forward(self, x, mask=None):
        return x * self.weight[0]


class LosesLayout(Scale):
    def forward(self, x, mask=None):
        return super().forward(x, mask).contiguous()


def case(kind, **options):
    return LayerCase(
        "x",
        partial(kind, 4),
        lambda n: torch.randn(n, 3, 4),
        mask=lambda n: torch.arange(3).expand(n, 3) < 2,
        **options,
    )


@pytest.mark.parametrize(
    ("check", "kind"),
    [
        ("gradients", WrongGradient),
        ("second_gradients", WrongSecondGradient),
        ("compile", BreaksGraph),
        ("compile", CompilesToOther),
        ("export", BreaksGraph),
        ("autocast", IsOtherInBfloat16),
        ("bfloat16", Widens),
        ("bfloat16", IsOtherInBfloat16),
        ("dtype", IgnoresDtype),
        ("empty_batch", RunningMean),
        ("batch_of_one", MeanOverBatch),
        ("non_contiguous", ReadsMemory),
        ("mask", Leaks),
        ("state_dict", HidesState),
        ("deepcopy", SharesState),
        ("reset_parameters", Forgets),
        ("extra_repr", Silent),
        ("integer_input", TakesAnything),
        ("wrong_shape", TakesAnything),
    ],
)
def test_a_check_finds_the_layer_that_breaks_it(check, kind):
    LAYER_CHECKS[check](case(Scale))
    with pytest.raises(Exception) as caught:
        LAYER_CHECKS[check](case(kind))
    assert not isinstance(caught.value, InputError)


def test_channels_last_is_found_lost():
    def images(kind):
        return LayerCase("x", partial(kind, 4), lambda n: torch.randn(n, 2, 3, 4))

    LAYER_CHECKS["channels_last"](images(Scale))
    with pytest.raises(AssertionError, match="channels-last"):
        LAYER_CHECKS["channels_last"](images(LosesLayout))


def test_a_mask_may_be_broadcast_to_the_input():
    class Masked(Scale):
        def forward(self, x, mask=None):
            return (x if mask is None else x.masked_fill(~mask, 0)) * self.weight

    check_mask(
        LayerCase(
            "x",
            partial(Masked, 4),
            lambda n: torch.randn(n, 3, 4),
            mask=lambda n: torch.arange(3)[:, None].expand(n, 3, 1) < 2,
        )
    )


def test_check_layer_passes_a_layer_of_ours():
    check_layer(partial(LayerNorm, 4), lambda n: torch.randn(n, 4), skip={"inductor": "is slow"})


def test_check_layer_names_every_check_that_failed():
    with pytest.raises(AssertionError) as caught:
        check_layer(
            partial(TakesAnything, 4), lambda n: torch.randn(n, 4), skip={"inductor": "is slow"}
        )
    lines = str(caught.value).splitlines()
    assert [line.partition(":")[0] for line in lines if ": AssertionError" in line] == [
        "integer_input",
        "wrong_shape",
    ]


def test_a_skip_must_name_a_check():
    with pytest.raises(InputError, match="unknown checks colour"):
        check_layer(partial(Scale, 4), lambda n: torch.randn(n, 4), skip={"colour": "none"})
