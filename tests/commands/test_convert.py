"""``normkit convert`` writes a checked folder that loads back, or nothing."""

from __future__ import annotations

import json

import pytest
import torch

from normkit.commands import convert
from normkit.errors import InputError
from normkit.nn import CRMSNorm, RMSNorm
from normkit.surgery import load
from normkit.surgery.reads import largest_difference, run
from normkit.surgery.samples import sample_inputs
from tests.surgery import tiny

FEW = ("--repeats", "1")


@pytest.mark.parametrize(
    ("name", "to", "norm"),
    [
        ("gpt2", "pre-rmsnorm", RMSNorm),
        ("vit", "pre-crmsnorm", CRMSNorm),
        ("whisper", "folded", torch.nn.LayerNorm),
    ],
)
def test_the_printed_line_loads_the_converted_model(name, to, norm, tmp_path, capsys):
    original = tiny.build(name, torch.float32)
    original.save_pretrained(tmp_path / "model")
    (tmp_path / "model" / "tokenizer_config.json").write_text("{}")
    out = tmp_path / "out"
    convert.main([str(tmp_path / "model"), "--to", to, "--out", str(out), *FEW])
    shown = capsys.readouterr().out
    assert shown.count("largest difference on") == 2
    assert "times that of the original" in shown
    line = shown.strip().splitlines()[-1].strip()
    assert line == f"model = normkit.surgery.load({str(out)!r})"
    model = load(out)
    assert any(type(layer) is norm for layer in model.modules())
    inputs = sample_inputs(model, seed=9)
    assert largest_difference(run(original, inputs), run(model, inputs)) < 1e-5
    names = {path.name for path in out.iterdir()}
    assert {"config.json", "model.safetensors", "normkit.json", "tokenizer_config.json"} <= names
    assert not any(n.endswith((".bin", ".pt", ".pkl")) for n in names)
    facts = json.loads((out / "normkit.json").read_text())["facts"]
    assert facts["random"]["difference"] < 1e-5
    assert facts["random"]["same_choice"] == 1.0


def test_json_and_another_dtype(tmp_path, capsys):
    original = tiny.build("gpt2", torch.float32)
    original.save_pretrained(tmp_path / "model")
    options = ["--to", "pre-rmsnorm", "--dtype", "bfloat16", "--json", *FEW]
    convert.main([str(tmp_path / "model"), "--out", str(tmp_path / "out"), *options])
    shown = json.loads(capsys.readouterr().out)
    assert 1e-4 < shown["random"]["difference"] < 0.3
    model = load(tmp_path / "out")
    weight = model.transformer.h[0].mlp.c_proj.weight
    assert weight.dtype == torch.bfloat16
    wide = original.transformer.h[0].mlp.c_proj.weight.double()
    once = (wide - wide.mean(1, keepdim=True)).bfloat16()
    assert torch.equal(weight, once)


@pytest.mark.slow
def test_an_onnx_file(tmp_path, capsys):
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    tiny.build("gptj", torch.float32).save_pretrained(tmp_path / "model")
    file = tmp_path / "model.onnx"
    arguments = ["--to", "pre-rmsnorm", "--out", str(tmp_path / "out"), "--onnx", str(file)]
    convert.main([str(tmp_path / "model"), *arguments, *FEW])
    assert "onnxruntime differs by" in capsys.readouterr().out
    assert file.stat().st_size > 10_000


@pytest.mark.parametrize(
    ("name", "reason"), [("Bert", "post-LN"), ("opt-350m", "post-LN"), ("llama", "RMSNorm already")]
)
def test_a_refused_model_leaves_no_folder(name, reason, tmp_path):
    model = tiny.randomize(tiny.llama()) if name == "llama" else tiny.post_ln(name)
    model.save_pretrained(tmp_path / "model")
    with pytest.raises(InputError, match=reason) as caught:
        convert.main([str(tmp_path / "model"), "--to", "pre-rmsnorm", "--out", str(tmp_path / "o")])
    assert caught.value.exit_code == 2
    assert "\n" not in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_folder_with_content_is_refused_before_anything_is_loaded(tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(InputError, match="exists already"):
        convert.main(["nowhere", "--to", "folded", "--out", str(tmp_path)])
    with pytest.raises(InputError, match="untie"):
        convert.main(["x", "--to", "folded", "--out", str(tmp_path / "o"), "--untie"])
    with pytest.raises(InputError, match="repeats must be at least 1"):
        convert.main(["x", "--to", "folded", "--out", str(tmp_path / "o"), "--repeats", "0"])
