"""What is watched is who reads whom, whatever wraps it."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from normkit.surgery.reads import OUTPUT, Read, run, watch


class Net(nn.Module):
    """Reads its norm in many ways."""

    def __init__(self):
        super().__init__()
        self.norm, self.drop = nn.LayerNorm(4), nn.Dropout(0.5)
        self.linear, self.unused = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x, how="linear"):
        n = self.norm(x)
        if how == "linear":
            return self.linear(n.contiguous())
        if how == "dropped":
            return self.linear(self.drop(n))
        if how == "add":
            return self.linear(n) + n
        if how == "add in place":
            y = self.linear(n)
            n += y
            return n * 2
        if how == "slice":
            return self.linear(n[:, :2].repeat(1, 2))
        if how == "shape":
            return self.linear(n) * n.shape[0] * n.dim()
        return {"hidden": n, "all": [self.linear(n)]}


@pytest.mark.parametrize(
    ("how", "expected"),
    [
        ("linear", {("linear", "linear")}),
        ("dropped", {("linear", "linear")}),
        ("shape", {("linear", "linear")}),
        ("add", {("linear", "linear"), ("", "add")}),
        ("add in place", {("linear", "linear"), ("", "add_"), ("", "mul")}),
        ("slice", {("", "__getitem__")}),
        ("returned", {("linear", "linear"), ("", OUTPUT)}),
    ],
)
def test_reads(how, expected):
    model = Net().train()
    flow = watch(model, {"x": torch.randn(3, 4), "how": how})
    assert {(r.reader, r.function) for r in flow.readers("norm")} == expected
    assert any(r.is_addition for r in flow.readers("norm")) == ("add" in how)
    assert (flow.calls["norm"], flow.calls["unused"]) == (1, 0)
    assert flow.readers("unused") == []
    assert model.drop.training
    assert not model._forward_hooks


def test_the_producer_of_an_input():
    model = nn.Sequential(
        nn.Linear(4, 4), nn.ReLU(), nn.LayerNorm(4), nn.Identity(), nn.Linear(4, 2)
    )
    flow = watch(model, (torch.randn(2, 4),))
    assert flow.producer("1") == "0"
    assert flow.producer("2") == "1"
    assert flow.producer("0") is None
    assert [r.reader for r in flow.readers("2")] == ["4"]


def test_steps_within_a_layer_are_no_reads_of_it():
    class Own(nn.Module):
        def forward(self, x):
            y = x * 2
            y += 1
            return y

    flow = watch(nn.Sequential(Own(), nn.Linear(4, 2)), (torch.randn(2, 4),))
    assert flow.readers("0") == [Read("1", "linear")]


def test_run_returns_the_floating_tensors_of_any_output_without_gradient():
    out = run(Net(), (torch.randn(3, 4), "returned"))
    assert [x.shape for x in out] == [(3, 4), (3, 4)]
    assert not any(x.requires_grad for x in out)
