"""Which models can be recentered: their streams, and the reasons to refuse one.

What a map says is checked against what was watched (:mod:`normkit.surgery.reads`): a norm whose
output is added to the residual stream is post-LN, whatever the model calls it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from normkit.errors import InputError
from normkit.surgery.architectures import STREAMS, Stream, select
from normkit.surgery.norms import describe_norms, is_layer_norm, norm_layers
from normkit.surgery.reads import DataFlow, watch
from normkit.surgery.samples import sample_inputs


def find_streams(model: nn.Module, streams: Sequence[Stream] = ()) -> list[tuple[str, Stream]]:
    """Return the residual streams of ``model`` that a map describes, as (path, map)."""
    known = {s.module: s for s in (*STREAMS, *streams)}
    return [
        (path, known[type(module).__name__])
        for path, module in model.named_modules()
        if type(module).__name__ in known
    ]


def check_convertible(
    model: nn.Module, found: Sequence[tuple[str, Stream]], flow: DataFlow
) -> None:
    """Refuse a model whose streams are not Pre-LN, by what was watched.

    Raises:
        InputError: names the layer and the reason.
    """
    for root, stream in found:
        norms = below(model, root, stream.norms)
        if not norms or not below(model, root, (stream.blocks,)):
            raise InputError(f"model: the map of {stream.module} finds no norm or block below it")
        for path in norms:
            checked_layer_norm(model, path)
            if not flow.calls[path]:
                raise InputError(f"inputs: {path} did not run on them; pass inputs that reach it")
            if any(read.is_addition for read in flow.readers(path)):
                raise InputError(f"model: {_post_ln(path)}")


def why_not(model: nn.Module, inputs: Mapping[str, Any] | Sequence[Any] | None) -> str:
    """Why a model without a map is not converted."""
    name, norms = type(model).__name__, norm_layers(model)
    if not any(is_layer_norm(norm) for norm in norms.values()):
        already = any("RMSNorm" in type(norm).__name__ for norm in norms.values())
        what = "uses RMSNorm already, so there is nothing to recenter" if already else "has none"
        return f"{name} {what} (LayerNorm is what is converted; norms: {describe_norms(model)})"
    try:
        flow = watch(model, sample_inputs(model) if inputs is None else inputs)
    except InputError:
        flow = DataFlow()
    for path, norm in norms.items():
        if is_layer_norm(norm) and any(read.is_addition for read in flow.readers(path)):
            return _post_ln(path)
    return (
        f"no map says where the residual stream of {name} lies (norms: {describe_norms(model)}); "
        "describe it by a normkit.surgery.Stream and pass streams=[...]"
    )


def _post_ln(path: str) -> str:
    return (
        f"it is post-LN: the output of {path} is added to the residual stream, so its mean "
        "matters; only Pre-LN models can be recentered"
    )


def checked_layer_norm(model: nn.Module, path: str) -> Any:
    """Return the LayerNorm at ``path``.

    Raises:
        InputError: if the layer there is another norm, or normalizes over several axes.
    """
    layer: Any = model.get_submodule(path)
    if not is_layer_norm(layer):
        kind = type(layer).__name__
        raise InputError(f"model: {path} is a {kind}, not a LayerNorm over the channels")
    if len(layer.normalized_shape) != 1:
        raise InputError(f"model: {path} normalizes over {layer.normalized_shape}, not one axis")
    return layer


def below(model: nn.Module, root: str, patterns: Sequence[str]) -> list[str]:
    """Return the paths in ``model`` of what the patterns match below ``root``."""
    found = select(model.get_submodule(root), patterns)
    return [f"{root}.{path}" if root else path for path in found]
