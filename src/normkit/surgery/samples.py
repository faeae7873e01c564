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
    dice = torch.Generator().manual_seed(seed)
    weight = next(model.parameters())
    inputs: dict[str, Any] = {}
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
    dtype = weight.dtype
    return {
        name: x.to(weight.device, dtype if x.is_floating_point() else x.dtype)
        for name, x in inputs.items()
    }


def _ids(config: Any, batch: int, length: int, dice: torch.Generator) -> torch.Tensor:
    places = getattr(config, "max_position_embeddings", None)
    places = places or getattr(config, "max_target_positions", None) or length
    return torch.randint(config.vocab_size, (batch, min(length, places)), generator=dice)
