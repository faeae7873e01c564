"""Fold norms into the layers beside them, where that is exact.

Two kinds fold. A norm that is a fixed affine map per channel in evaluation mode (BatchNorm)
disappears: ``y = a x + s`` goes into the layer before it, ``W' = a W, c' = a c + s``, or into those
after it, ``W' = W diag(a), c' = c + W s``. A norm that looks at its input (LayerNorm, RMSNorm)
stays without its gain and shift, which go into the linear layers that read it.

A norm is left where another layer reads it too, where a weight is shared, or where zero padding
would see the shift; the report says which. The outcome is checked on the sample.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from normkit.errors import InputError, NormkitError
from normkit.nn import LayerNorm, PowerNorm, RMSNorm, UnifiedNorm
from normkit.surgery.layers import CompletedCRMSNorm
from normkit.surgery.ledger import Ledger, changes
from normkit.surgery.linear import along, apply_weight, input_axis, is_conv, is_linear, output_axes
from normkit.surgery.norms import norm_layers
from normkit.surgery.reads import DataFlow, largest_difference, run, watch
from normkit.surgery.report import Report
from normkit.surgery.samples import sample_inputs
from normkit.surgery.sharing import sharers

Affine = Callable[[Any], "tuple[Tensor, Tensor]"]


def _batch_norm(norm: _BatchNorm) -> tuple[Tensor, Tensor]:
    if norm.running_mean is None or norm.running_var is None:
        raise InputError("it keeps no running statistics")
    scale = (norm.running_var.double() + norm.eps).rsqrt()
    if norm.weight is not None:
        scale = scale * norm.weight.double()
    shift = -norm.running_mean.double() * scale
    return scale, shift if norm.bias is None else shift + norm.bias.double()


FIXED: dict[type[nn.Module], Affine] = {
    nn.BatchNorm1d: _batch_norm,
    nn.BatchNorm2d: _batch_norm,
    nn.BatchNorm3d: _batch_norm,
    nn.SyncBatchNorm: _batch_norm,
    UnifiedNorm: UnifiedNorm.inference_affine,
    PowerNorm: PowerNorm.inference_affine,
}
"""Norms that are ``x * scale + shift`` per channel in evaluation: a function of the norm that
returns both in float64, or raises InputError with the reason why this one is not."""

WITHOUT_AFFINE: dict[type[nn.Module], Callable[[Any], nn.Module]] = {
    nn.LayerNorm: lambda n: nn.LayerNorm(n.normalized_shape, n.eps, elementwise_affine=False),
    LayerNorm: lambda n: LayerNorm(n.normalized_shape, n.eps, elementwise_affine=False),
    nn.RMSNorm: lambda n: nn.RMSNorm(n.normalized_shape, n.eps, elementwise_affine=False),
    RMSNorm: lambda n: RMSNorm(n.normalized_shape, n.eps, elementwise_affine=False),
    CompletedCRMSNorm: lambda n: CompletedCRMSNorm(n.normalized_shape[0], n.eps, False),
}
"""Norms whose gain and shift fold: how each looks without them."""


def fold(model: nn.Module, inputs: Mapping[str, Any] | Sequence[Any] | None = None) -> Report:
    """Fold every norm of ``model`` that can be folded exactly, in place.

    Args:
        model: a model in evaluation mode.
        inputs: what to run it on, to see who reads whom and to check the outcome: keyword arguments
            as a mapping or positional ones as a sequence. Random inputs that fit the configuration
            of a transformers model if not given.

    Returns:
        The report: what each norm was folded into, or why it was left.

    Raises:
        InputError: for a model in training mode, whose statistics still move.
        NormkitError: if the outputs on the sample differ; the model is then as it was.
    """
    if model.training:
        raise InputError("model must be in evaluation mode; call model.eval() first")
    inputs = sample_inputs(model) if inputs is None else inputs
    flow = watch(model, inputs)
    before = run(model, inputs)
    report = Report("fold")
    with changes(model) as ledger:
        for path, norm in norm_layers(model).items():
            try:
                done = _fold_one(ledger, flow, path, norm)
            except InputError as reason:
                report.left(path, str(reason))
            else:
                report.did(path, done)
        gap = largest_difference(before, run(model, inputs))
        report.numbers["largest_difference"] = gap
        size = max((float(x.abs().max()) for x in before), default=0.0)
        if not gap <= _tolerance(before) * max(1.0, size):
            raise NormkitError(f"fold: outputs differ by {gap:.1e}; the model is as it was")
    return report


def folded_affine(
    layer: Any, gain: Tensor | None, shift: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """Weight and bias of a layer that reads ``x * gain + shift`` as if it read ``x``, in float64.

    Args:
        layer: linear, or an ungrouped convolution.
        gain: one factor per input channel.
        shift: one summand per input channel.

    Returns:
        ``W diag(gain)`` and ``c + W shift``; the bias is None where it stays as it is.
    """
    weight: Tensor = layer.weight.double()
    bias = None
    if shift is not None:
        bias = apply_weight(layer, shift)
        if layer.bias is not None:
            bias = bias + layer.bias.double()
    if gain is not None:
        weight = weight * along(gain, weight, input_axis(layer))
    return weight, bias


def linear_readers(model: nn.Module, flow: DataFlow, path: str) -> tuple[list[str], str]:
    """Find the linear layers that are the only readers of a layer's output.

    Returns:
        Their paths and an empty reason; or no path and the reason why nothing can go into them.
    """
    readers, why = _sole_readers(model, flow, path)
    for reader in readers:
        layer = model.get_submodule(reader)
        if not is_linear(layer):
            return [], f"{reader} reads it, which is a {type(layer).__name__}"
    return readers, why


def _sole_readers(model: nn.Module, flow: DataFlow, path: str) -> tuple[list[str], str]:
    if flow.calls[path] != 1:
        return [], f"it ran {flow.calls[path]} times on the sample"
    reads = flow.readers(path)
    if not reads:
        return [], "nothing reads its output as it is"
    for read in reads:
        layer: Any = model.get_submodule(read.reader)
        if not read.reader or not (is_linear(layer) or is_conv(layer)):
            return [], f"{read} reads it too" if len(reads) > 1 else f"{read} reads it"
        if flow.calls[read.reader] != 1:
            return [], f"{read.reader}, which reads it, ran {flow.calls[read.reader]} times"
        if others := sharers(model, layer, "weight"):
            return [], f"{read.reader}, which reads it, shares its weight with {others[0][1]}"
        if not layer.weight.is_floating_point():
            return [], f"{read.reader}, which reads it, has a weight of {layer.weight.dtype}"
    return list(dict.fromkeys(read.reader for read in reads)), ""


def _fold_one(ledger: Ledger, flow: DataFlow, path: str, norm: Any) -> str:
    """Fold one norm and say into what; an InputError says why not."""
    if type(norm) in FIXED:
        return _fold_fixed(ledger, flow, path, *FIXED[type(norm)](norm))
    without_affine = WITHOUT_AFFINE.get(type(norm)) or _llama_like(norm)
    if without_affine is None:
        raise InputError(f"there is no rule for a {type(norm).__name__}")
    gain, shift = norm.weight, getattr(norm, "bias", None)
    if gain is None:
        raise InputError("it has no gain or shift to fold")
    if gain.ndim != 1:
        raise InputError(f"it normalizes over {tuple(gain.shape)}, not one axis")
    readers, why = linear_readers(ledger.model, flow, path)
    if why:
        raise InputError(why)
    _into_readers(ledger, readers, getattr(norm, "gain", gain), shift)
    ledger.swap(path, without_affine(norm))
    return f"gain and shift folded into {', '.join(readers)}"


def _llama_like(norm: nn.Module) -> Callable[[Any], nn.Module] | None:
    """Rule for the RMSNorm that Llama and its kin define each for itself; None for another norm."""
    if type(norm).__name__.endswith("RMSNorm") and hasattr(norm, "variance_epsilon"):
        return lambda n: RMSNorm(n.weight.shape[0], n.variance_epsilon, elementwise_affine=False)
    return None


def _fold_fixed(ledger: Ledger, flow: DataFlow, path: str, scale: Tensor, shift: Tensor) -> str:
    model = ledger.model
    before = flow.producer(path)
    if before is not None and _sole_readers_are(flow, before, path):
        layer: Any = model.get_submodule(before)
        axes = {} if isinstance(layer, nn.Embedding) else output_axes(layer)
        fits = axes and layer.weight.shape[axes["weight"]] == scale.numel()
        if fits and flow.calls[before] == 1 and not sharers(model, layer, "weight"):
            weight = layer.weight * along(scale, layer.weight, axes["weight"])
            bias = shift if layer.bias is None else layer.bias.double() * scale + shift
            ledger.set(layer, "weight", weight)
            ledger.set(layer, "bias", bias)
            ledger.swap(path, nn.Identity())
            return f"folded into {before}, before it"
    readers, why = _sole_readers(model, flow, path)
    for reader in readers:
        layer = model.get_submodule(reader)
        if is_conv(layer) and (layer.groups != 1 or _pads(layer)):
            what = "is grouped" if layer.groups != 1 else "pads, and padding would see the shift"
            why = f"{reader}, which reads it, {what}"
        elif layer.weight.shape[input_axis(layer)] != scale.numel():
            why = f"{reader}, which reads it, has its channels on another axis"
    if why:
        raise InputError(f"nothing before it takes it, and {why}")
    _into_readers(ledger, readers, scale, shift)
    ledger.swap(path, nn.Identity())
    return f"folded into {', '.join(readers)}, after it"


def _sole_readers_are(flow: DataFlow, producer: str, path: str) -> bool:
    return {read.reader for read in flow.readers(producer)} == {path}


def _pads(layer: Any) -> bool:
    padding = layer.padding
    return padding != "valid" and (isinstance(padding, str) or any(padding))


def _into_readers(
    ledger: Ledger, readers: Sequence[str], gain: Tensor, shift: Tensor | None
) -> None:
    for reader in readers:
        layer = ledger.model.get_submodule(reader)
        weight, bias = folded_affine(layer, gain, shift)
        ledger.set(layer, "weight", weight)
        if bias is not None:
            ledger.set(layer, "bias", bias)


def _tolerance(outputs: Sequence[Tensor]) -> float:
    return max((1e3 * torch.finfo(x.dtype).eps for x in outputs), default=0.0)
