"""Which layers share a parameter."""

from __future__ import annotations

from torch import nn


def sharers(model: nn.Module, owner: nn.Module, name: str) -> list[tuple[nn.Module, str]]:
    """Other layers that hold the parameter ``name`` of ``owner``, each with its full name there."""
    wanted = getattr(owner, name)
    return [
        (layer, key)
        for path, layer in model.named_modules()
        for key, parameter in layer.named_parameters(path, recurse=False)
        if parameter is wanted and layer is not owner
    ]
