"""Tiny models of transformers with random weights, affine parameters and biases included."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

transformers = pytest.importorskip("transformers")


def _text(kind: str, head: str = "ForCausalLM", **more: Any) -> Any:
    config = getattr(transformers, f"{kind}Config")(
        vocab_size=61, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, **more
    )
    return getattr(transformers, f"{kind}{head}")(config)


def _image(kind: str, **more: Any) -> Any:
    config = getattr(transformers, f"{kind}Config")(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64,
        image_size=16, patch_size=4, num_labels=5, **more,
    )  # fmt: skip
    return getattr(transformers, f"{kind}ForImageClassification")(config)


def _opt(**more: Any) -> Any:
    sizes = {"word_embed_proj_dim": 32, "ffn_dim": 64, "max_position_embeddings": 32}
    return _text("OPT", **{**sizes, **more})


def _whisper() -> Any:
    config = transformers.WhisperConfig(
        vocab_size=61, d_model=32, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4,
        decoder_attention_heads=4, encoder_ffn_dim=64, decoder_ffn_dim=64, num_mel_bins=8,
        max_source_positions=20, max_target_positions=24, pad_token_id=0, bos_token_id=1,
        eos_token_id=2, decoder_start_token_id=1,
    )  # fmt: skip
    return transformers.WhisperForConditionalGeneration(config)


def _falcon(**more: Any) -> Any:
    return _text("Falcon", **more)


PRE_LN: dict[str, Callable[[], Any]] = {
    "gpt2": lambda: _text("GPT2", "LMHeadModel"),
    "gpt2-cross-attention": lambda: _text("GPT2", "LMHeadModel", add_cross_attention=True),
    "gpt2-classifier": lambda: _text("GPT2", "ForTokenClassification"),
    "opt": _opt,
    "opt-projected": lambda: _opt(word_embed_proj_dim=16),
    "opt-no-affine": lambda: _opt(layer_norm_elementwise_affine=False, enable_bias=False),
    "vit": lambda: _image("ViT"),
    "deit": lambda: _image("DeiT"),
    "dinov2": lambda: _image("Dinov2"),
    "dinov2-swiglu": lambda: _image("Dinov2", use_swiglu_ffn=True),
    "whisper": _whisper,
    "gpt-neox": lambda: _text("GPTNeoX", intermediate_size=64),
    "gpt-neox-serial": lambda: _text(
        "GPTNeoX", intermediate_size=64, use_parallel_residual=False, attention_bias=False
    ),
    "gptj": lambda: _text("GPTJ", rotary_dim=4, bos_token_id=1, eos_token_id=2),
    "phi": lambda: _text("Phi", intermediate_size=64, qk_layernorm=True),
    "falcon": _falcon,
    "falcon-two-norms": lambda: _falcon(new_decoder_architecture=True, num_kv_heads=2),
    "falcon-serial": lambda: _falcon(parallel_attn=False, multi_query=False, bias=True, alibi=True),
}
"""By name: what makes a Pre-LN model."""


def post_ln(kind: str) -> Any:
    """A model that cannot be recentered."""
    if kind == "opt-350m":
        return randomize(_opt(do_layer_norm_before=False))
    return randomize(_text(kind, "Model", intermediate_size=64))


def randomize(model: Any, seed: int = 0, scale: float = 0.3) -> Any:
    """Draw every parameter anew, so that no mean, bias or gain is zero or one by chance."""
    dice = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            noise = torch.randn(p.shape, generator=dice).to(p)
            p.copy_(1 + scale * noise if "norm" in name.lower() and p.ndim == 1 else scale * noise)
    return model.eval()


def build(name: str, dtype: torch.dtype = torch.float64, seed: int = 0) -> Any:
    """Make the model of :data:`PRE_LN` with random weights of ``dtype``."""
    torch.manual_seed(seed)
    return randomize(PRE_LN[name]().to(dtype), seed)


def llama() -> Any:
    """A model that has RMSNorm."""
    return _text("Llama", intermediate_size=64)
