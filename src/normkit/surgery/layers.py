"""Layers that surgery puts into a model, and how a recipe describes them.

Shapes: d channels of the residual stream.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from normkit.errors import InputError
from normkit.functional.norms import crms_norm
from normkit.nn import CRMSNorm, LayerNorm, RMSNorm


class Recenter(nn.Module):
    """Subtract the mean over channels: ``x C``; with ``compress``, drop the last channel too.

    Args:
        compress: return the first d - 1 channels, which determine the last.
    """

    def __init__(self, compress: bool = False) -> None:
        super().__init__()
        self.compress = compress

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[*, d]`` to ``[*, d]``, or to ``[*, d-1]``."""
        centered = x - x.mean(-1, keepdim=True)
        return centered[..., :-1] if self.compress else centered

    def extra_repr(self) -> str:
        """Show the argument."""
        return f"compress={self.compress}"


class CompletedCRMSNorm(nn.Module):
    """CRMSNorm whose output has the missing channel again, for readers that are not linear.

    ``y = [n, -sum n] * weight + bias`` with ``n = CRMSNorm(z)``: LayerNorm of the whole vector.

    Args:
        normalized_shape: d.
        eps: added to the mean square.
        elementwise_affine: whether there is a gain.
        bias: whether there is a shift.
        device: of the parameters.
        dtype: of the parameters.

    Source: arXiv 2305.14858, section 3.3.
    """

    def __init__(
        self,
        normalized_shape: int,
        eps: float = 1e-5,
        elementwise_affine: bool = True,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.normalized_shape, self.eps = (normalized_shape,), eps
        self.elementwise_affine = elementwise_affine
        gain = torch.ones(normalized_shape, device=device, dtype=dtype)
        self.weight = nn.Parameter(gain) if elementwise_affine else None
        has_bias = elementwise_affine and bias
        self.bias = nn.Parameter(torch.zeros_like(gain)) if has_bias else None

    def forward(self, z: Tensor) -> Tensor:
        """Map ``[*, d-1]`` to ``[*, d]``; half input is computed in float32 and rounded once."""
        n = crms_norm(z if z.dtype == torch.float64 else z.float(), self.eps)
        y = torch.cat((n, -n.sum(-1, keepdim=True)), -1)
        if self.weight is not None:
            y = y * self.weight
        return (y if self.bias is None else y + self.bias).to(z.dtype)

    def extra_repr(self) -> str:
        """Show the arguments."""
        return f"{self.normalized_shape}, eps={self.eps}, bias={self.bias is not None}"


def with_parameters_of(new: nn.Module, old: nn.Module) -> nn.Module:
    """Let ``new`` hold the very parameters of ``old``, so that an optimizer keeps them."""
    for name in ("weight", "bias"):
        if getattr(new, name) is not None:
            setattr(new, name, getattr(old, name))
    return new


class _Kind(NamedTuple):
    layer: type[nn.Module]
    arguments: tuple[str, ...]


_AFFINE = ("normalized_shape", "eps", "elementwise_affine", "bias")

KINDS: dict[str, _Kind] = {
    "torch.LayerNorm": _Kind(nn.LayerNorm, _AFFINE),
    "LayerNorm": _Kind(LayerNorm, (*_AFFINE, "zero_centered")),
    "RMSNorm": _Kind(RMSNorm, (*_AFFINE, "zero_centered")),
    "torch.RMSNorm": _Kind(nn.RMSNorm, ("normalized_shape", "eps", "elementwise_affine")),
    "CRMSNorm": _Kind(CRMSNorm, ("normalized_shape", "eps")),
    "CompletedCRMSNorm": _Kind(CompletedCRMSNorm, _AFFINE),
    "Recenter": _Kind(Recenter, ("compress",)),
    "Identity": _Kind(nn.Identity, ()),
}
"""What a recipe on disk may name; a layer that surgery can put in joins by one line."""


def describe(layer: nn.Module) -> dict[str, Any]:
    """Return type and arguments of a layer, JSON-ready, for :func:`build`."""
    for name, (kind, arguments) in KINDS.items():
        if type(layer) is kind:
            return {"type": name, **{a: _value(getattr(layer, a), a) for a in arguments}}
    return {"type": type(layer).__qualname__}


def build(spec: dict[str, Any]) -> nn.Module:
    """Make the layer that :func:`describe` described.

    Raises:
        InputError: for a type that recipes cannot name.
    """
    arguments = dict(spec)
    name = arguments.pop("type", None)
    if name not in KINDS:
        raise InputError(f"a recipe cannot name layers of type {name!r}; known: {', '.join(KINDS)}")
    kind = KINDS[name]
    if set(arguments) != set(kind.arguments):
        raise InputError(f"the recipe of a {name} must give {', '.join(kind.arguments)}")
    if isinstance(arguments.get("normalized_shape"), list) and kind.layer in (
        CRMSNorm,
        CompletedCRMSNorm,
    ):
        (arguments["normalized_shape"],) = arguments["normalized_shape"]
    return kind.layer(**arguments)


def _value(value: Any, name: str) -> Any:
    if name == "bias":
        return value is not None
    return list(value) if isinstance(value, tuple) else value
