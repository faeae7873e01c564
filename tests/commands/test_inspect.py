"""``normkit inspect`` counts every norm and says which conversions apply."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from normkit.commands import inspect
from normkit.errors import InputError
from normkit.surgery.survey import survey
from tests.surgery import tiny


def test_a_folder_as_json(tmp_path, capsys):
    model = tiny.build("gpt2", torch.float32)
    model.save_pretrained(tmp_path)
    inspect.main([str(tmp_path), "--json", "--length", "8", "--repeats", "1"])
    found = json.loads(capsys.readouterr().out)
    assert found["model"] == "GPT2LMHeadModel"
    assert [n["name"] for n in found["norms"]][-1] == "transformer.ln_f"
    assert {(n["place"], tuple(n["readers"])) for n in found["norms"][:2]} == {
        ("pre", ("transformer.h.0.attn.c_attn",)),
        ("pre", ("transformer.h.0.mlp.c_fc",)),
    }
    assert found["parameters"] == sum(p.numel() for p in model.parameters())
    assert found["share_of_norms"]["parameters"] == 5 * 64 / found["parameters"]
    assert 0 < found["share_of_norms"]["saved_bytes"] < 1
    assert 0 < found["share_of_norms"]["seconds"] < 1
    assert {name: text[:3] for name, text in found["conversions"].items()} == {
        "pre-rmsnorm": "yes",
        "pre-crmsnorm": "yes",
        "folded": "yes",
    }


def test_the_table_groups_blocks_and_gives_reasons(tmp_path, capsys):
    tiny.post_ln("Bert").save_pretrained(tmp_path)
    inspect.main([str(tmp_path), "--repeats", "1"])
    shown = capsys.readouterr().out
    assert "2 x" in shown
    assert "post" in shown
    assert "pre-rmsnorm: no: it is post-LN" in shown


def test_llama_has_nothing_to_recenter(tmp_path, capsys):
    tiny.randomize(tiny.llama()).save_pretrained(tmp_path)
    inspect.main([str(tmp_path), "--json", "--repeats", "1"])
    found = json.loads(capsys.readouterr().out)["conversions"]
    assert "RMSNorm already" in found["pre-rmsnorm"]
    assert found["folded"].startswith("yes (4")


def test_saved_bytes_are_those_of_layer_norm():
    """LayerNorm keeps its input, and mean and deviation of each row."""
    model = nn.Sequential(nn.LayerNorm(6))
    x = torch.randn(5, 6, requires_grad=True)
    found = survey(model, (x,), repeats=1)
    assert found.norms[0].saved_bytes == 4 * (5 * 6 + 2 * 5)
    assert found.share("saved_bytes") == 1.0
    assert found.norms[0].shape == (6,)


@pytest.mark.parametrize("flag", ["batch", "length", "repeats"])
def test_numbers_below_one_are_refused(flag):
    with pytest.raises(InputError, match=f"{flag} must be at least 1"):
        inspect.main(["nowhere", f"--{flag}", "0"])


def test_a_path_that_is_no_folder(tmp_path):
    (tmp_path / "file").write_text("")
    for name, reason in (("nowhere", "does not exist"), ("file", "is not a folder")):
        with pytest.raises(InputError, match=reason):
            inspect.main([str(tmp_path / name)])


def _index(path, shards):
    (path / "config.json").write_text('{"model_type": "gpt2"}')
    weights = {f"w{i}": name for i, name in enumerate(shards)} if shards else 3
    text = json.dumps({"weight_map": weights})
    (path / "model.safetensors.index.json").write_text(text)


def _broken(path):
    tiny.build("gpt2", torch.float32).save_pretrained(path)
    file = path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-50])


def _short(path):
    tiny.build("gpt2", torch.float32).save_pretrained(path)
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, "n_layer": 2}))
    weights = load_file(path / "model.safetensors")
    kept = {k: v for k, v in weights.items() if ".h.1." not in k}
    save_file(kept, path / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda path: None, "no config.json"),
        (lambda path: (path / "config.json").write_text('{"model_type": "gpt2"}'), "no weights"),
        (lambda path: _index(path, ["a.safetensors"]), "lacks a.safetensors of 1"),
        (lambda path: _index(path, None), "not an index"),
        (_broken, "cannot load"),
        (_short, "lacks the weight transformer.h.1"),
    ],
    ids=["empty", "no weights", "no shard", "bad index", "cut weights", "too few weights"],
)
def test_a_broken_folder_is_one_sentence(make, reason, tmp_path):
    make(tmp_path)
    with pytest.raises(InputError, match=reason) as caught:
        inspect.main([str(tmp_path)])
    assert caught.value.exit_code == 2
    assert "\n" not in str(caught.value)
