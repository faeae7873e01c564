"""ONNX files compute what the model computes, also for other sizes than the sample's."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from normkit.errors import InputError
from normkit.nn import CRMSNorm, LayerNorm, RMSNorm
from normkit.surgery import export_onnx, fold, recenter
from normkit.surgery.layers import CompletedCRMSNorm
from normkit.surgery.reads import run
from normkit.surgery.samples import sample_inputs
from tests.surgery import tiny

onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")


def _run(path, tensors):
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    names = [place.name for place in session.get_inputs()]
    feed = {name: x.numpy() for name, x in zip(names, tensors, strict=True)}
    return torch.from_numpy(session.run(None, feed)[0])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("gpt2", lambda m: recenter(m, "pre-crmsnorm")),
        ("vit", recenter),
        ("opt", fold),
    ],
)
def test_a_converted_model(name, change, tmp_path):
    model = tiny.build(name, torch.float32)
    change(model)
    assert export_onnx(model, tmp_path / "model.onnx") < 1e-5
    inputs = sample_inputs(model, batch=3, length=7, seed=4)
    got = _run(tmp_path / "model.onnx", list(inputs.values()))
    torch.testing.assert_close(got, run(model, inputs)[0], rtol=0, atol=1e-5)
    assert [p.name for p in tmp_path.iterdir()] == ["model.onnx"]


@pytest.mark.parametrize(
    "layer",
    [LayerNorm(6), RMSNorm(6, bias=True), CRMSNorm(6), CompletedCRMSNorm(7)],
    ids=lambda layer: type(layer).__name__,
)
def test_a_layer(layer: nn.Module, tmp_path):
    assert export_onnx(layer, tmp_path / "layer.onnx", (torch.randn(3, 4, 6),)) < 1e-5
    x = torch.randn(5, 4, 6)
    got = _run(tmp_path / "layer.onnx", [x])
    torch.testing.assert_close(got, run(layer, (x,))[0], rtol=0, atol=1e-5)


def test_bfloat16_is_refused():
    with pytest.raises(InputError, match="bfloat16"):
        export_onnx(nn.Linear(2, 2).bfloat16(), "unused.onnx", (torch.randn(1, 2),))
