"""Freezing lets exactly the named groups train."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from normkit.errors import InputError
from normkit.surgery import freeze
from tests.surgery import tiny


def _model() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Flatten(), nn.LayerNorm(4), nn.Linear(4, 2)
    )


@pytest.mark.parametrize(
    ("train", "names"),
    [
        ("norm-affine", {"1.weight", "1.bias", "3.weight", "3.bias"}),
        ("norm", {"1.weight", "1.bias", "3.weight", "3.bias"}),
        ("head", {"4.weight", "4.bias"}),
        ("bias", {"0.bias", "1.bias", "3.bias", "4.bias"}),
        ("none", set()),
        (("head", "0.weight"), {"0.weight", "4.weight", "4.bias"}),
    ],
)
def test_groups(train, names):
    model = _model()
    report = freeze(model, train)
    parameters = dict(model.named_parameters())
    assert {name for name, p in parameters.items() if p.requires_grad} == names
    count = sum(parameters[name].numel() for name in names)
    total = sum(p.numel() for p in parameters.values())
    assert report.numbers == {"trainable": count, "total": total, "share": count / total}
    freeze(model, "all")
    assert all(p.requires_grad for p in model.parameters())


def test_learned_scalars_of_a_norm_are_norm_but_not_affine():
    class OwnNorm(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight, self.power = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(1))

    model = nn.Sequential(OwnNorm(), nn.Linear(2, 2))
    freeze(model, "norm-affine")
    assert not model[0].power.requires_grad
    freeze(model, "norm")
    assert model[0].power.requires_grad


def test_a_head_tied_to_the_embeddings_is_noted():
    model = tiny.build("gpt2")
    report = freeze(model, "head")
    assert [line.name for line in report.changed] == ["transformer.wte.weight"]
    assert "transformer.wte.weight trains too" in report.notes[0]
    assert report.numbers["trainable"] == 61 * 32


def test_a_classifier_is_found_by_name():
    report = freeze(tiny.build("vit"), "head")
    assert [line.name for line in report.changed] == ["classifier.weight", "classifier.bias"]


@pytest.mark.parametrize("train", ["nothing-like-it", ("norm", "9.weight")])
def test_names_that_fit_nothing_are_refused(train):
    with pytest.raises(InputError, match="fits no parameter"):
        freeze(_model(), train)
    with pytest.raises(InputError, match="no linear layer"):
        freeze(nn.Sequential(nn.LayerNorm(2)), "head")
