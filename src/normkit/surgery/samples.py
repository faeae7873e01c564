"""Sample inputs for models of transformers, from their configuration."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import nn

from normkit.errors import InputError

_HOW = "pass inputs=, a mapping of the arguments of its forward"


def sample_inputs(model: nn.Module, batch: int = 2, length: int = 12, seed: int = 0) -> Any:
    """Return random inputs that ``model`` can run on.

    Args:
        model: a model of transformers for text, images or audio.
        batch: number of examples.
        length: tokens of text, at most what the model has positions for.
        seed: of the random numbers; the global generator is not touched.

    Returns:
        Keyword arguments of the model's forward.

    Raises:
        InputError: if the configuration does not say what the model reads.
    """
    config: Any = getattr(model, "config", None)
    kind = getattr(model, "main_input_name", None)
    if config is None or kind is None:
        name = type(model).__name__
        raise InputError(f"inputs: cannot guess what {name} reads; {_HOW}")
    try:
        inputs = _random(model, config, kind, batch, length, torch.Generator().manual_seed(seed))
    except AttributeError as error:
        raise InputError(f"inputs: cannot guess what {kind!r} is like ({error}); {_HOW}") from None
    weight = next(model.parameters())
    return {
        name: x.to(weight.device, weight.dtype if x.is_floating_point() else x.dtype)
        for name, x in inputs.items()
    }


def _random(
    model: nn.Module, config: Any, kind: str, batch: int, length: int, dice: torch.Generator
) -> dict[str, torch.Tensor]:
    """Draw what the configuration describes, in float32."""
    inputs: dict[str, torch.Tensor] = {}
    if kind == "pixel_values":
        size = config.image_size
        height, width = (size, size) if isinstance(size, int) else size
        inputs[kind] = torch.randn(batch, config.num_channels, height, width, generator=dice)
    elif kind == "input_features":
        frames = 2 * config.max_source_positions
        inputs[kind] = torch.randn(batch, config.num_mel_bins, frames, generator=dice)
    elif kind == "input_ids":
        inputs[kind] = _ids(config, batch, length, dice)
    else:
        raise InputError(f"inputs: no sample is known for models that read {kind!r}; {_HOW}")
    if "decoder_input_ids" in inspect.signature(model.forward).parameters:
        inputs["decoder_input_ids"] = _ids(config, batch, length, dice)
    if getattr(config, "add_cross_attention", False):
        shape = (batch, length, config.hidden_size)
        inputs["encoder_hidden_states"] = torch.randn(shape, generator=dice)
    return inputs


def real_inputs(model: nn.Module, tokenizer: Any = None) -> tuple[Any, str]:
    """Return inputs that are not noise: text, or photographs.

    Args:
        model: a model of transformers for text, images or audio.
        tokenizer: of the model; without one the bytes of the text are its tokens.

    Returns:
        Keyword arguments of the model's forward, and in words what they are made of.
    """
    inputs = sample_inputs(model, batch=2)
    made = []
    for name, old in inputs.items():
        if name.endswith("input_ids"):
            inputs[name] = _text_ids(model.config, tokenizer).expand(2, -1).to(old.device)
            made.append("text" if tokenizer else "the bytes of a text")
        elif name == "pixel_values" and (photos := _photographs(old.shape[1])) is not None:
            inputs[name] = nn.functional.interpolate(photos, old.shape[-2:], mode="area").to(old)
            made.append("photographs")
    return inputs, " and ".join(made) or "noise, as no other input is at hand"


def _text_ids(config: Any, tokenizer: Any) -> torch.Tensor:
    ids = tokenizer(TEXT)["input_ids"] if tokenizer else list(TEXT.encode())
    return torch.tensor([[i % config.vocab_size for i in ids[: _places(config)]]])


def _photographs(channels: int) -> torch.Tensor | None:
    """Two photographs that scikit-learn brings along, (2, 3, 427, 640) in [-1, 1]."""
    if channels != 3:
        return None
    try:
        from sklearn.datasets import load_sample_images
    except ImportError:
        return None
    images = torch.stack([torch.from_numpy(image.copy()) for image in load_sample_images().images])
    return images.permute(0, 3, 1, 2).double() / 127.5 - 1


def _places(config: Any) -> int | None:
    """Tokens that the model has positions for; None if any number will do."""
    for name in ("max_position_embeddings", "max_target_positions"):
        if places := getattr(config, name, None):
            return int(places)
    return None


def _ids(config: Any, batch: int, length: int, dice: torch.Generator) -> torch.Tensor:
    size = (batch, min(length, _places(config) or length))
    return torch.randint(config.vocab_size, size, generator=dice)


TEXT = (
    "The harbour froze in the second week of January, and for nine days no boat left it. "
    "On the tenth the wind turned: by noon one could hear the ice work, a low sound like carts on "
    "a wooden bridge, and by evening there was a lane of open water as wide as a street. "
    '"If it holds," said the pilot, "we sail at 6:45 tomorrow; if it doesn\'t, ask me again."'
)
"""Our own words, for checks on text that is not random."""
