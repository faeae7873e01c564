"""Pre-LN to Pre-RMSNorm and Pre-CRMSNorm, exactly.

Pre-RMSNorm and Pre-CRMSNorm Transformers: Equivalent and Efficient Pre-LN Transformers (Jiang et
al., 2023), arXiv 2305.14858. With ``C = I - 11^T/d``::

    LN(x) = RMSNorm(x C) * g + b          and          (x + y) C = x C + y C

so a stream whose writers are recentered once, ``W' = W C``, needs RMSNorm only. A zero-mean vector
is determined by its first d - 1 coordinates z; CRMSNorm keeps those:
``rms^2 = (sum z^2 + (sum z)^2) / d``, and a linear reader becomes ``z (W[:-1] - W[-1:])``.

Shapes: d channels of the stream.

Differences from the authors' code, which writes the three networks side by side without affine
parameters: models that exist are converted in place; affine parameters are folded where only linear
layers read a norm, else the missing coordinate is restored after it; tied embeddings stay tied and
are recentered at their output.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from normkit.errors import InputError, NormkitError
from normkit.nn import CRMSNorm, RMSNorm
from normkit.surgery.architectures import Stream, companion
from normkit.surgery.fold import folded_affine, linear_readers
from normkit.surgery.layers import CompletedCRMSNorm, Recenter, with_parameters_of
from normkit.surgery.ledger import Ledger, changes
from normkit.surgery.linear import along, center, drop_last, input_axis, output_axes, refresh_sizes
from normkit.surgery.norms import norm_layers
from normkit.surgery.reads import DataFlow, largest_difference, run, watch
from normkit.surgery.refusals import (
    below,
    check_convertible,
    checked_layer_norm,
    find_streams,
    why_not,
)
from normkit.surgery.report import Report
from normkit.surgery.samples import sample_inputs
from normkit.surgery.sharing import sharers

Target = Literal["pre-rmsnorm", "pre-crmsnorm"]
TARGETS: tuple[Target, ...] = ("pre-rmsnorm", "pre-crmsnorm")

_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-3, torch.bfloat16: 0.1, torch.float16: 0.02}
"""Relative: only a wrong map exceeds these. Rounding the weights once stays far below."""

_WRONG_MAP = "the map of the stream misses what writes to it (the model is as it was)"


def recenter(
    model: nn.Module,
    to: Target = "pre-rmsnorm",
    *,
    online: bool = False,
    untie: bool = False,
    streams: Sequence[Stream] = (),
    inputs: Mapping[str, Any] | Sequence[Any] | None = None,
) -> Report:
    r"""Turn a Pre-LN transformer into the Pre-RMSNorm or Pre-CRMSNorm one that equals it, in place.

    ``LN(x) = RMSNorm(xC) * g + b`` with ``C = I - 11^T/d``: everything that writes to the residual
    stream is multiplied by ``C``, every LayerNorm on it becomes RMSNorm (``to="pre-crmsnorm"``: and
    the last channel is left out). Weights are computed in float64 and rounded once. The result is
    checked on ``inputs``; a model that fails the check is left as it was.

    Args:
        model: a Pre-LN transformer: of transformers (GPT-2, OPT, GPT-NeoX, GPT-J, Phi, Falcon, ViT,
            DeiT, DINOv2, Whisper), or one that ``streams`` describes.
        to: the target.
        online: keep the weights as they are and apply ``C`` to them in each forward pass, so that
            training equals that of the original step by step (dropout on the stream off).
            ``False`` multiplies once: the same function now, another path under training.
        untie: give a head that shares the embedding table its own copy, and recenter the table;
            otherwise the mean is subtracted at the entry of the first block.
        streams: maps of architectures that normkit does not know.
        inputs: what to run the model on: keyword arguments as a mapping, or positional ones.
            Random inputs that fit the configuration if not given.

    Returns:
        The report. Its numbers are the largest difference of the outputs on ``inputs`` and the
        largest mean of the stream in units of its root mean square.

    Raises:
        InputError: says why the model cannot be converted.

    Source: arXiv 2305.14858, sections 3 and 4.
    """
    if to not in TARGETS:
        raise InputError(f"to must be one of {', '.join(TARGETS)}, got {to!r}")
    found = find_streams(model, streams)
    if not found:
        raise InputError(f"model: {why_not(model, inputs)}")
    inputs = sample_inputs(model) if inputs is None else inputs
    flow = watch(model, inputs)
    check_convertible(model, found, flow)
    before = run(model, inputs)
    report = Report(f"recenter to {to}" + (" online" if online else ""))
    with changes(model) as ledger:
        names: list[str] = []
        for root, stream in found:
            names += _Conversion(ledger, flow, report, root, stream, to, online, untie).run()
        _check(model, inputs, names, before, report)
    if dropped := _active_dropout(model):
        report.notes.append(
            f"exact in evaluation; in training {', '.join(dropped)} gives the stream a mean again"
        )
    return report


def stream_means(
    model: nn.Module,
    inputs: Mapping[str, Any] | Sequence[Any],
    names: Sequence[str] | None = None,
) -> dict[str, float]:
    """Measure the mean over channels of what each norm reads.

    Args:
        model: any model.
        inputs: keyword arguments as a mapping, or positional ones as a sequence.
        names: paths of the norms; all LayerNorm and RMSNorm layers if not given. A CRMSNorm reads
            d - 1 channels of a vector whose mean is zero by construction, and is left out.

    Returns:
        For each norm the largest absolute mean of a position, divided by the root mean square of
        its input; 0 for a norm that did not run.
    """
    found = dict.fromkeys(norm_layers(model) if names is None else names, 0.0)

    def record(path: str) -> Callable[..., None]:
        def hook(_module: nn.Module, args: Any) -> None:
            x = args[0].double()
            scale = x.square().mean().sqrt().clamp_min(torch.finfo(torch.float64).tiny)
            found[path] = max(found[path], float((x.mean(-1).abs() / scale).max()))

        return hook

    handles = [
        layer.register_forward_pre_hook(record(path))
        for path, layer in ((p, model.get_submodule(p)) for p in found)
        if not isinstance(layer, (CRMSNorm, CompletedCRMSNorm))
    ]
    try:
        run(model, inputs)
    finally:
        for handle in handles:
            handle.remove()
    return found


def bake(model: nn.Module) -> None:
    """Turn the online form into plain weights: ``W C`` is stored, the parametrizations go."""
    for module in list(model.modules()):
        parametrized: Any = getattr(module, "parametrizations", {})
        for name in [n for n, steps in parametrized.items() if isinstance(steps[0], Centered)]:
            parametrize.remove_parametrizations(module, name, leave_parametrized=True)


class Centered(nn.Module):
    """Parametrization ``W -> W C`` over the output channels, computed in each forward pass.

    Args:
        axis: axis of the output channels.
        compress: leave out the last channel.
    """

    def __init__(self, axis: int, compress: bool) -> None:
        super().__init__()
        self.axis, self.compress = axis, compress

    def forward(self, weight: Tensor) -> Tensor:
        """Return the recentered weight."""
        centered = weight - weight.mean(self.axis, keepdim=True)
        return drop_last(centered, self.axis) if self.compress else centered


class _Conversion:
    """The conversion of one stream."""

    def __init__(
        self,
        ledger: Ledger,
        flow: DataFlow,
        report: Report,
        root: str,
        stream: Stream,
        to: Target,
        online: bool,
        untie: bool,
    ) -> None:
        self.ledger, self.flow, self.report = ledger, flow, report
        self.root, self.stream, self.online, self.untie = root, stream, online, untie
        self.compress = to == "pre-crmsnorm"
        self.model = ledger.model
        self.norms = below(self.model, root, stream.norms)
        self.channels = checked_layer_norm(self.model, self.norms[0]).normalized_shape[0]

    def run(self) -> list[str]:
        """Convert the stream; return the paths of its norms."""
        self._embeddings()
        for pattern in self.stream.writers:
            scale = self.stream.scales.get(pattern)
            for path in below(self.model, self.root, (pattern,)):
                relative = path.removeprefix(f"{self.root}.")
                self._writer(path, scale and companion(pattern, relative, scale))
        for path in self.norms:
            self._norm(path)
        return self.norms

    def _embeddings(self) -> None:
        targets = []
        for path in below(self.model, self.root, self.stream.embeddings):
            parts = self._outputs(path)
            if parts and parts[0][1].shape[parts[0][2]] == self.channels:
                targets.append((path, parts))
        shared = [
            (layer, name)
            for path, parts in targets
            for owner, _, _, key in parts
            for layer, name in sharers(self.model, owner, key)
        ]
        why = self._why_at_entry([p for p, _ in targets], shared)
        if why:
            block = below(self.model, self.root, (self.stream.blocks,))[0]
            self.ledger.recenter_input(block, Recenter(self.compress))
            self.report.did(block, f"subtracts the mean of its input, since {why}")
            return
        for layer, name in shared:
            self.ledger.untie(layer, name.rpartition(".")[2])
            self.report.did(name, "has a copy of its own of the embedding table")
        for path, parts in targets:
            self._recenter(parts)
            self.report.did(path, self._what("embedding"))

    def _why_at_entry(self, paths: Sequence[str], shared: Sequence[Any]) -> str:
        if not paths:
            return "what arrives there is not a sum of embeddings"
        if self.online:
            return "it is cheaper than to recenter the tables in every step"
        if shared and not self.untie:
            return "the embedding table is shared with another layer"
        if self.compress and self.stream.keeps_width:
            return "the model needs the width of its embeddings"
        return ""

    def _writer(self, path: str, scale: str | None) -> None:
        parts = self._outputs(path)
        if not parts:
            kind = type(self.model.get_submodule(path)).__name__
            raise InputError(f"model: the writer {path} is a {kind}, which is not linear")
        for owner, _, _, key in parts:
            if others := sharers(self.model, owner, key):
                raise InputError(f"model: the writer {path} shares its {key} with {others[0][1]}")
        factor = self._scale(path, scale) if scale else None
        if self.online:
            if factor is not None:
                raise InputError(f"online: the output of {path} is scaled per channel by {scale}")
            for owner, _, axis, key in parts:
                self._parametrize(owner, key, axis)
        else:
            self._recenter(parts, factor)
        self.report.did(path, self._what("writer"))

    def _outputs(self, path: str) -> list[tuple[nn.Module, Tensor, int, str]]:
        """Owner, tensor, axis of the channels and name of each parameter that writes."""
        owner, key = _owner(self.model, path)
        if key:
            tensor = getattr(owner, key)
            return [(owner, tensor, tensor.ndim - 1, key)]
        parts = [(owner, getattr(owner, k), axis, k) for k, axis in output_axes(owner).items()]
        parts = [part for part in parts if part[1] is not None]
        for _, tensor, _, name in parts:
            if not tensor.is_floating_point():
                raise InputError(f"model: {path}.{name} is {tensor.dtype}; dequantize it first")
        if parametrize.is_parametrized(owner):
            raise InputError(f"model: {path} is parametrized already; see normkit.surgery.bake")
        return parts

    def _recenter(self, parts: Sequence[Any], factor: Tensor | None = None) -> None:
        for owner, tensor, axis, name in parts:
            wide = tensor if factor is None else tensor * along(factor, tensor, axis)
            wide = center(wide, axis)
            self.ledger.set(owner, name, drop_last(wide, axis) if self.compress else wide)

    def _parametrize(self, owner: nn.Module, name: str, axis: int) -> None:
        new = Centered(axis, self.compress)
        parametrize.register_parametrization(owner, name, new, unsafe=True)
        refresh_sizes(owner)

        def undo() -> None:
            parametrize.remove_parametrizations(owner, name, leave_parametrized=False)
            refresh_sizes(owner)

        self.ledger.on_undo(undo)

    def _scale(self, writer: str, relative: str) -> Tensor:
        """Take the factor of a per-channel scale, whose layer becomes the identity."""
        path = f"{self.root}.{relative}" if self.root else relative
        owner, name = _owner(self.model, path)
        if len(list(owner.parameters())) != 1:
            raise InputError(f"model: {path} scales {writer} in a layer with other parameters")
        factor: Tensor = getattr(owner, name).detach()
        layer = path.removesuffix(f".{name}")
        self.ledger.swap(layer, nn.Identity())
        self.report.did(layer, f"folded into {writer}")
        return factor

    def _norm(self, path: str) -> None:
        norm = checked_layer_norm(self.model, path)
        affine, bias = norm.weight is not None, norm.bias is not None
        if not self.compress:
            zero = getattr(norm, "zero_centered", False)
            new: nn.Module = RMSNorm(self.channels, norm.eps, affine, bias=bias, zero_centered=zero)
            self.ledger.swap(path, with_parameters_of(new, norm))
            self.report.did(path, "LayerNorm -> RMSNorm")
            return
        readers, why = linear_readers(self.model, self.flow, path)
        if why or self.online:
            new = CompletedCRMSNorm(self.channels, norm.eps, affine, bias)
            self.ledger.swap(path, with_parameters_of(new, norm))
            if getattr(norm, "zero_centered", False):
                self.ledger.set(new, "weight", norm.gain)
            why = why or "its gain and shift are trained"
            self.report.did(path, f"LayerNorm -> CRMSNorm, completed since {why}")
            return
        for reader in readers:
            layer = self.model.get_submodule(reader)
            weight, shift = folded_affine(layer, getattr(norm, "gain", norm.weight), norm.bias)
            axis = input_axis(layer)
            last = weight.narrow(axis, self.channels - 1, 1)
            self.ledger.set(layer, "weight", drop_last(weight, axis) - last)
            if shift is not None:
                self.ledger.set(layer, "bias", shift)
        self.ledger.swap(path, CRMSNorm(self.channels - 1, norm.eps))
        self.report.did(path, f"LayerNorm -> CRMSNorm, affine folded into {', '.join(readers)}")

    def _what(self, role: str) -> str:
        done = "recentered in each forward pass" if self.online else "recentered"
        return f"{role} {done}" + (", last channel left out" if self.compress else "")


_INSIDE = ("att", "activation", "classifier", "summary")  # dropout that the stream never sees


def _active_dropout(model: nn.Module) -> list[str]:
    """Settings by which a model of transformers drops what is written to its streams."""
    config: Any = getattr(model, "config", None)
    settings = config.to_dict() if hasattr(config, "to_dict") else {}
    return [
        name
        for name, value in settings.items()
        if "drop" in name and not any(part in name for part in _INSIDE) and value
    ]


def _check(
    model: nn.Module,
    inputs: Mapping[str, Any] | Sequence[Any],
    norms: Sequence[str],
    before: Sequence[Tensor],
    report: Report,
) -> None:
    """Measure the converted model on the sample.

    Raises:
        NormkitError: if it is not the original; the caller undoes the conversion.
    """
    try:
        after, means = run(model, inputs), stream_means(model, inputs, norms)
    except RuntimeError as error:  # widths that do not fit: a writer still has all channels
        text = str(error).splitlines()[0]
        raise NormkitError(f"{_WRONG_MAP}: the converted model fails with {text!r}") from None
    worst = max(means, key=lambda name: means[name])
    gap = largest_difference(before, after)
    report.numbers.update(largest_difference=gap, largest_mean=means[worst])
    tolerance = _TOLERANCE.get(before[0].dtype, 1e-3)
    if means[worst] > tolerance:
        raise NormkitError(f"{_WRONG_MAP}: what {worst} reads has a mean ({means[worst]:.1e})")
    if not gap <= tolerance * max(1.0, *(float(x.abs().max()) for x in before)):
        raise NormkitError(f"{_WRONG_MAP}: outputs differ by {gap:.1e} on the sample")


def _owner(model: nn.Module, path: str) -> tuple[nn.Module, str]:
    """Return the module at ``path`` and "", or the owner and name of the parameter there."""
    parent, _, name = path.rpartition(".")
    owner = model.get_submodule(parent)
    if isinstance(getattr(owner, name), nn.Parameter):
        return owner, name
    return model.get_submodule(path), ""
