"""Folding a norm leaves the function as it was, or leaves the norm and says why."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from normkit.errors import InputError, NormkitError
from normkit.nn import PowerNorm, RMSNorm, UnifiedNorm
from normkit.surgery import fold
from normkit.surgery.fold import FIXED
from normkit.surgery.reads import largest_difference, run
from normkit.surgery.samples import sample_inputs
from tests.surgery import tiny


def _random(model: nn.Module) -> nn.Module:
    """Double precision, random weights and running statistics, evaluation mode."""
    dice = torch.Generator().manual_seed(0)
    model = model.double()
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if tensor.is_floating_point():
                noise = torch.randn(tensor.shape, generator=dice, dtype=torch.float64)
                tensor.copy_(0.5 + noise.abs() if "var" in name else 0.5 * noise)
    return model.eval()


IMAGE = torch.randn(2, 4, 7, 7, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
ROWS = torch.randn(5, 4, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
ODD = torch.randn(2, 7, 7, generator=torch.Generator().manual_seed(3), dtype=torch.float64)


@pytest.mark.parametrize(
    ("model", "x", "where"),
    [
        (lambda: [nn.Conv2d(4, 6, 3, padding=1), nn.BatchNorm2d(6)], IMAGE, "before"),
        (lambda: [nn.Conv2d(4, 6, 3, groups=2, bias=False), nn.BatchNorm2d(6)], IMAGE, "before"),
        (lambda: [nn.Linear(4, 6), nn.BatchNorm1d(6)], ROWS, "before"),
        (lambda: [nn.Linear(4, 6), nn.BatchNorm1d(6, affine=False)], ROWS, "before"),
        (lambda: [nn.ReLU(), nn.BatchNorm2d(4), nn.Conv2d(4, 3, 3)], IMAGE, "after"),
        (lambda: [nn.ReLU(), nn.BatchNorm1d(4), nn.Linear(4, 3, bias=False)], ROWS, "after"),
        (lambda: [nn.ReLU(), nn.BatchNorm1d(4), nn.Dropout(), nn.Linear(4, 3)], ROWS, "after"),
    ],
)
def test_batch_norm_goes_into_its_neighbour(model, x, where):
    model = _random(nn.Sequential(*model()))
    original = copy.deepcopy(model)
    report = fold(model, (x,))
    assert [line.what.endswith(f"{where} it") for line in report.changed] == [True]
    assert not any(isinstance(layer, nn.BatchNorm1d | nn.BatchNorm2d) for layer in model)
    other = x.flip(0) * 1.7 + 0.3
    assert largest_difference(run(original, (other,)), run(model, (other,))) < 1e-12


@pytest.mark.parametrize(
    ("model", "x", "reason"),
    [
        (lambda: [nn.ReLU(), nn.BatchNorm2d(4), nn.Conv2d(4, 3, 3, padding=1)], IMAGE, "padding"),
        (lambda: [nn.ReLU(), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3, groups=2)], IMAGE, "grouped"),
        (lambda: [nn.ReLU(), nn.BatchNorm2d(4), nn.ReLU()], IMAGE, "2 reads it"),
        (lambda: [nn.ReLU(), nn.BatchNorm2d(4, track_running_stats=False)], IMAGE, "no running"),
        (lambda: [nn.Linear(7, 6), nn.BatchNorm1d(7), nn.Linear(6, 2)], ODD, "another axis"),
        (lambda: [nn.GroupNorm(2, 4), nn.Conv2d(4, 3, 1)], IMAGE, "no rule for a GroupNorm"),
        (lambda: [nn.LayerNorm(4)], ROWS, "the model's output reads it"),
        (lambda: [nn.LayerNorm(4, elementwise_affine=False), nn.Linear(4, 3)], ROWS, "no gain"),
        (lambda: [nn.LayerNorm((7, 7)), nn.Conv2d(4, 3, 1)], IMAGE, "not one axis"),
    ],
)
def test_what_cannot_be_folded_is_left_with_its_reason(model, x, reason):
    model = _random(nn.Sequential(*model()))
    before = copy.deepcopy(model.state_dict())
    report = fold(model, (x,))
    assert not report.changed
    assert [reason in line.what for line in report.skipped] == [True]
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


class Branches(nn.Module):
    """A norm with several readers."""

    def __init__(self, norm, residual=False, twice=False, tied=False):
        super().__init__()
        self.norm, self.residual, self.twice = norm, residual, twice
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4, bias=False)
        if tied:
            self.other = nn.Linear(4, 4)
            self.other.weight = self.b.weight

    def forward(self, x):
        n = self.norm(x)
        y = self.a(n) * self.b(n).tanh()
        if self.twice:
            y = y + self.a(y)
        if hasattr(self, "other"):
            y = self.other(y)
        return y + n if self.residual else y


@pytest.mark.parametrize("norm", [nn.LayerNorm, nn.RMSNorm, RMSNorm, nn.BatchNorm1d])
def test_every_linear_reader_takes_the_gain_and_shift(norm):
    model = _random(Branches(norm(4)))
    original = copy.deepcopy(model)
    assert len(fold(model, (ROWS,)).changed) == 1
    assert not list(model.norm.parameters())
    assert largest_difference(run(original, (-ROWS,)), run(model, (-ROWS,))) < 1e-12


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"residual": True}, "the model's add reads it too"),
        ({"twice": True}, "ran 2 times"),
        ({"tied": True}, "shares its weight with other.weight"),
    ],
)
def test_another_reader_is_seen_even_if_no_module_wraps_it(options, reason):
    model = _random(Branches(nn.LayerNorm(4), **options))
    assert [reason in line.what for line in fold(model, (ROWS,)).skipped] == [True]


@pytest.mark.parametrize("name", tiny.PRE_LN)
def test_models_of_transformers_stay_equal(name):
    model = tiny.build(name)
    original = copy.deepcopy(model)
    report = fold(model)
    inputs = sample_inputs(model, seed=5)
    assert largest_difference(run(original, inputs), run(model, inputs)) < 1e-10
    assert bool(report.changed) == (name != "opt-no-affine")


def test_the_rms_norm_of_llama_folds_too():
    model = tiny.randomize(tiny.llama())  # its norm computes in float32, whatever it is given
    original = copy.deepcopy(model)
    report = fold(model)
    assert [line.name for line in report.skipped] == ["model.norm"]  # the head takes a slice of it
    inputs = sample_inputs(model, seed=5)
    assert largest_difference(run(original, inputs), run(model, inputs)) < 1e-4


@pytest.mark.parametrize("norm", [UnifiedNorm(4), PowerNorm(4, groups=None)])
def test_batch_wise_norms_of_tokens_fold(norm):
    model = _random(nn.Sequential(norm, nn.Linear(4, 3)))
    x = torch.randn(2, 5, 4, dtype=torch.float64)
    expected = model(x)
    fold(model, inputs=[x])
    assert not any(isinstance(layer, type(norm)) for layer in model.modules())
    torch.testing.assert_close(model(x), expected, rtol=0, atol=1e-12)


def test_a_norm_joins_by_one_line(monkeypatch):
    class Halve(nn.Module):
        def forward(self, x):
            return x / 2 + 1

    Halve.__name__ = "HalveNorm"
    monkeypatch.setitem(FIXED, Halve, lambda _n: (torch.full((4,), 0.5), torch.ones(4)))
    model = _random(nn.Sequential(Halve(), nn.Linear(4, 3)))
    original = copy.deepcopy(model)
    assert len(fold(model, (ROWS,)).changed) == 1
    assert isinstance(model[0], nn.Identity)
    assert largest_difference(run(original, (-ROWS,)), run(model, (-ROWS,))) < 1e-12


def test_a_wrong_rule_is_found_out_and_undone(monkeypatch):
    monkeypatch.setitem(FIXED, nn.BatchNorm1d, lambda _n: (torch.ones(4), torch.zeros(4)))
    model = _random(nn.Sequential(nn.BatchNorm1d(4), nn.Linear(4, 3)))
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(NormkitError, match="as it was"):
        fold(model, (ROWS,))
    assert isinstance(model[0], nn.BatchNorm1d)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_a_model_in_training_mode_is_refused():
    with pytest.raises(InputError, match="evaluation mode"):
        fold(nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)), (ROWS.float(),))
    with pytest.raises(InputError, match="cannot guess what Sequential reads"):
        fold(nn.Sequential(nn.Linear(4, 4)).eval())
