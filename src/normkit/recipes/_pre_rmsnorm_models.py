"""Models with random weights for the pre-rmsnorm recipe, gains and shifts of norms included."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from normkit.errors import MissingDependencyError


def randomize(model: Any, seed: int, scale: float = 0.02) -> Any:
    """Draw all parameters anew: no gain is one, no shift, bias or mean is zero by chance.

    Args:
        model: changed in place.
        seed: of the random numbers.
        scale: deviation of weights; gains and shifts of norms deviate by 0.3.
    """
    dice = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            noise = torch.randn(p.shape, generator=dice, dtype=torch.float32).to(p)
            norm = p.ndim == 1 and any(k in name.lower() for k in ("norm", "ln_"))
            gain = norm and name.endswith("weight")
            p.copy_((1.0 if gain else 0.0) + (0.3 if norm else scale) * noise)
    return model.eval()


def gpt2(layers: int, width: int, heads: int, vocab: int, tokens: int, seed: int) -> Any:
    """Make a GPT-2 language model."""
    t = _transformers()
    config = t.GPT2Config(
        n_layer=layers, n_embd=width, n_head=heads, vocab_size=vocab, n_positions=tokens,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    return randomize(t.GPT2LMHeadModel(config), seed)


def vit(layers: int, width: int, heads: int, image: int, patch: int, seed: int) -> Any:
    """Make a ViT image classifier."""
    t = _transformers()
    config = t.ViTConfig(
        num_hidden_layers=layers, hidden_size=width, num_attention_heads=heads,
        intermediate_size=4 * width, image_size=image, patch_size=patch, num_labels=1000,
    )  # fmt: skip
    return randomize(t.ViTForImageClassification(config), seed)


def tiny_models() -> dict[str, Callable[[], Any]]:
    """By name: what makes a tiny float64 model of each architecture of the exact claims."""
    t = _transformers()
    text = {
        "vocab_size": 61,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
    }
    image = {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 64,
        "image_size": 16,
        "patch_size": 4,
    }
    audio = {
        "vocab_size": 61, "d_model": 32, "encoder_layers": 2, "decoder_layers": 2,
        "encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_ffn_dim": 64,
        "decoder_ffn_dim": 64, "num_mel_bins": 8, "max_source_positions": 20,
        "max_target_positions": 24, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
        "decoder_start_token_id": 1,
    }  # fmt: skip
    made: dict[str, Callable[[], Any]] = {
        "GPT-2": lambda: t.GPT2LMHeadModel(t.GPT2Config(**text)),
        "OPT": lambda: t.OPTForCausalLM(
            t.OPTConfig(**text, ffn_dim=64, word_embed_proj_dim=32, max_position_embeddings=32)
        ),
        "GPT-NeoX": lambda: t.GPTNeoXForCausalLM(t.GPTNeoXConfig(**text, intermediate_size=64)),
        "ViT": lambda: t.ViTForImageClassification(t.ViTConfig(**image)),
        "DeiT": lambda: t.DeiTForImageClassification(t.DeiTConfig(**image)),
        "Whisper": lambda: t.WhisperForConditionalGeneration(t.WhisperConfig(**audio)),
    }
    return {name: partial(_tiny, make) for name, make in made.items()}


def _tiny(make: Callable[[], Any]) -> Any:
    return randomize(make().double(), seed=0, scale=0.3)


def _transformers() -> Any:
    try:
        import transformers
    except ImportError:
        raise MissingDependencyError("transformers", "rl") from None
    return transformers
