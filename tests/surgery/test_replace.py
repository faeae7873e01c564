"""Replacing norms keeps what a layer carries, and reports what was not done."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from normkit.errors import InputError
from normkit.nn import LayerNorm, RMSNorm
from normkit.surgery import replace
from tests.surgery import tiny


def _model() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 6), nn.LayerNorm(6), nn.Linear(6, 6), nn.LayerNorm(6))


def test_by_type_values_and_state_are_kept():
    model = _model().double()
    model[1].eval()
    model[3].bias.requires_grad = False
    nn.init.normal_(model[1].weight)
    weight = model[1].weight.detach().clone()
    report = replace(model, {nn.LayerNorm: "rmsnorm"})
    assert [line.name for line in report.changed] == ["1", "3"]
    assert type(model[1]) is RMSNorm
    assert torch.equal(model[1].weight, weight)
    assert (model[1].training, model[3].training) == (False, True)
    assert (model[3].weight.requires_grad, model[3].bias.requires_grad) == (True, False)
    assert model[1].weight.dtype == torch.float64
    assert model[1].eps == 1e-5


def test_by_pattern_predicate_and_function_in_the_order_given():
    model = _model()
    rules = {
        "3": lambda old: nn.GroupNorm(2, old.normalized_shape[0]),
        lambda path, layer: isinstance(layer, nn.LayerNorm) and path == "1": "identity",
    }
    replace(model, rules)
    assert [type(layer) for layer in model[1::2]] == [nn.Identity, nn.GroupNorm]


def test_a_pattern_reaches_the_blocks_of_a_model_of_transformers():
    model = tiny.build("gpt2", torch.float32)
    replace(model, {"transformer.h.*.ln_1": "rmsnorm"})
    norms = [type(layer) for path, layer in model.named_modules() if "ln_" in path]
    assert norms == [RMSNorm, nn.LayerNorm] * 2 + [nn.LayerNorm]
    model(torch.tensor([[1, 2, 3]])).logits.sum().backward()
    assert model.transformer.h[1].ln_1.weight.grad is not None


def test_llamas_norm_becomes_layer_norm_with_its_eps():
    model = tiny.randomize(tiny.llama())
    eps = model.model.norm.variance_epsilon
    replace(model, {"model.norm": "layernorm"})
    assert type(model.model.norm) is LayerNorm
    assert model.model.norm.eps == eps


def test_a_shared_layer_stays_shared():
    norm = nn.LayerNorm(4)
    model = nn.ModuleDict({"a": norm, "b": norm})
    replace(model, {nn.LayerNorm: "rmsnorm"})
    assert model["a"] is model["b"]
    assert type(model["a"]) is RMSNorm


def test_what_cannot_be_replaced_is_reported():
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.LayerNorm(4))
    report = replace(model, {nn.BatchNorm2d: "layernorm", nn.LayerNorm: "rmsnorm"})
    assert [(line.name, "trailing" in line.what) for line in report.skipped] == [("1", True)]
    assert isinstance(model[1], nn.BatchNorm2d)


@pytest.mark.parametrize(
    ("rules", "reason"),
    [
        ({nn.LayerNorm: "nonorm"}, "no norm 'nonorm'"),
        ({nn.BatchNorm1d: "rmsnorm"}, "BatchNorm1d fits no layer"),
        ({nn.LayerNorm: "rmsnorm", "7.*": "rmsnorm"}, r"'7.\*' fits no layer"),
    ],
)
def test_bad_rules_change_nothing(rules, reason):
    model = _model()
    with pytest.raises(InputError, match=reason):
        replace(model, rules)
    assert isinstance(model[1], nn.LayerNorm)


def test_a_function_that_fails_changes_nothing():
    model = _model()

    def fail_at_second(old, seen=[]):  # noqa: B006
        seen.append(old)
        if len(seen) == 2:
            raise ZeroDivisionError
        return nn.Identity()

    with pytest.raises(ZeroDivisionError):
        replace(model, {nn.LayerNorm: fail_at_second})
    assert isinstance(model[1], nn.LayerNorm)
