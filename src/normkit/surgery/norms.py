"""Which layers of a model are norms."""

from __future__ import annotations

from collections import Counter

from torch import nn

from normkit.nn import LayerNorm


def is_norm(layer: nn.Module) -> bool:
    """Whether a layer is a norm: a layer without parts whose class is named so."""
    return "Norm" in type(layer).__name__ and not any(True for _ in layer.children())


def is_layer_norm(layer: nn.Module) -> bool:
    """Whether ``layer`` is LayerNorm itself, of torch or normkit, and no variant of it."""
    return type(layer) in (nn.LayerNorm, LayerNorm)


def norm_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Every norm of ``model`` by its path, in the order of registration."""
    return {path: layer for path, layer in model.named_modules() if is_norm(layer)}


def describe_norms(model: nn.Module) -> str:
    """Count the norms of ``model`` by class, as text."""
    counts = Counter(type(layer).__name__ for layer in norm_layers(model).values())
    return ", ".join(f"{n} x {name}" for name, n in counts.items()) or "none"
