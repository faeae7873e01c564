"""One view of every layer that maps channels to channels: where its outputs and inputs lie.

Linear keeps its weight as (out, in), the Conv1D of transformers as (in, out), a convolution as
(out, in / groups, kernel), an embedding as (rows, out). Surgery asks here for the axis and
computes in float64, so that each weight is rounded once.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

_CONV = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


def is_transposed(layer: nn.Module) -> bool:
    """Whether ``layer`` is the Conv1D of transformers: a linear layer with weight (in, out)."""
    named = any(kind.__name__ == "Conv1D" for kind in type(layer).__mro__)
    return named and {"nf", "nx"} <= vars(layer).keys()


def is_linear(layer: nn.Module) -> bool:
    """Whether ``layer`` computes ``x W + b`` over the last dimension."""
    return isinstance(layer, nn.Linear) or is_transposed(layer)


def is_conv(layer: nn.Module) -> bool:
    """Whether ``layer`` is a plain convolution (not a transposed one)."""
    return isinstance(layer, _CONV)


def output_axes(layer: nn.Module) -> dict[str, int]:
    """Axis of the output channels in each parameter of a layer; empty for an unknown layer."""
    if isinstance(layer, nn.Embedding):
        return {"weight": 1}
    if is_transposed(layer):
        return {"weight": 1, "bias": 0}
    if is_linear(layer) or is_conv(layer):
        return {"weight": 0, "bias": 0}
    return {}


def input_axis(layer: nn.Module) -> int:
    """Axis of the input channels in the weight of a linear layer or an ungrouped convolution."""
    return 0 if is_transposed(layer) else 1


def refresh_sizes(layer: Any) -> None:
    """Set the sizes that a layer keeps as attributes to those of its weight."""
    shape = layer.weight.shape
    if isinstance(layer, nn.Embedding):
        layer.num_embeddings, layer.embedding_dim = shape
    elif is_transposed(layer):
        layer.nx, layer.nf = shape
    elif isinstance(layer, nn.Linear):
        layer.out_features, layer.in_features = shape
    elif is_conv(layer):
        layer.out_channels = shape[0]


def center(weight: Tensor, axis: int) -> Tensor:
    """Subtract the mean over ``axis``, in float64: ``W C`` with ``C = I - 11^T / d``."""
    wide = weight.double()
    return wide - wide.mean(axis, keepdim=True)


def drop_last(weight: Tensor, axis: int) -> Tensor:
    """Leave out the last index of ``axis``."""
    return weight.narrow(axis, 0, weight.shape[axis] - 1)


def along(vector: Tensor, weight: Tensor, axis: int) -> Tensor:
    """Shape a vector so that it multiplies ``weight`` along ``axis``."""
    shape = [1] * weight.ndim
    shape[axis] = -1
    return vector.to(torch.float64).reshape(shape)


def apply_weight(layer: Any, vector: Tensor) -> Tensor:
    """What a linear layer or convolution makes of one vector at every position, without its bias.

    Args:
        layer: linear, or a convolution whose input is ``vector`` everywhere (no zero padding).
        vector: input channels, shape (in,).

    Returns:
        Output channels, shape (out,), float64.
    """
    weight: Tensor = layer.weight.double()
    vector = vector.double()
    if is_transposed(layer):
        return vector @ weight
    if isinstance(layer, nn.Linear):
        return weight @ vector
    summed = weight.flatten(2).sum(2)
    groups = vector.reshape(layer.groups, -1)
    per_group = summed.reshape(layer.groups, -1, summed.shape[1])
    return torch.einsum("goi,gi->go", per_group, groups).reshape(-1)
