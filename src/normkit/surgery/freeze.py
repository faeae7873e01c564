"""Choose which parameters train."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from torch import nn

from normkit.errors import InputError
from normkit.surgery.architectures import matches
from normkit.surgery.norms import norm_layers
from normkit.surgery.report import Report

_HEADS = ("lm_head", "classifier", "score", "head", "fc", "proj_out")


def _norm_affine(model: nn.Module) -> Iterator[str]:
    for path, layer in norm_layers(model).items():
        for name, _ in layer.named_parameters():
            if name in ("weight", "bias"):
                yield f"{path}.{name}"


def _norm(model: nn.Module) -> Iterator[str]:
    for path, layer in norm_layers(model).items():
        yield from (f"{path}.{name}" for name, _ in layer.named_parameters())


def _head(model: nn.Module) -> Iterator[str]:
    path = _head_path(model)
    yield from (f"{path}.{name}" for name, _ in model.get_submodule(path).named_parameters())


def _head_path(model: Any) -> str:
    """Path of the layer that makes the model's outputs."""
    getter = getattr(model, "get_output_embeddings", None)
    head = getter() if callable(getter) else None
    layers: dict[str, nn.Module] = dict(model.named_modules())
    if head is not None:
        return next(path for path, layer in layers.items() if layer is head)
    for name in _HEADS:
        if any(True for _ in getattr(model, name, nn.Identity()).parameters()):
            return name
    linear = [path for path, layer in layers.items() if isinstance(layer, nn.Linear)]
    if not linear:
        raise InputError('train: the model has no linear layer that "head" could mean')
    return linear[-1]


def _bias(model: nn.Module) -> Iterator[str]:
    for name, _ in model.named_parameters():
        if name.rpartition(".")[2] == "bias":
            yield name


GROUPS: dict[str, Callable[[nn.Module], Iterator[str]]] = {
    "norm-affine": _norm_affine,
    "norm": _norm,
    "head": _head,
    "bias": _bias,
    "all": lambda model: (name for name, _ in model.named_parameters()),
    "none": lambda _model: iter(()),
}
"""Named groups of parameters: "norm-affine" gains and shifts of norms, "norm" every parameter of
norms, "head" the layer that makes the outputs, "bias" every bias."""


def freeze(model: nn.Module, train: str | Sequence[str] = "norm-affine") -> Report:
    """Let only the named groups of parameters train, by ``requires_grad``.

    Args:
        model: any module.
        train: names of :data:`GROUPS`, or patterns of parameter names (``*`` stands for one name).

    Returns:
        The report, with the trainable share of all parameters; a parameter that layers share is
        counted once, and noted.

    Raises:
        InputError: for a name that is no group and fits no parameter.
    """
    parameters = dict(model.named_parameters(remove_duplicate=False))
    chosen: dict[str, str] = {}
    for group in (train,) if isinstance(train, str) else train:
        known = GROUPS.get(group)
        names = list(known(model)) if known else [n for n in parameters if matches(group, n)]
        if not names and group != "none":
            raise InputError(
                f"train: {group!r} fits no parameter; groups: {', '.join(GROUPS)}, or a pattern"
            )
        chosen.update(dict.fromkeys(names, group))
    trained = {id(parameters[name]) for name in chosen}
    report = Report("freeze")
    total = count = 0
    for name, parameter in model.named_parameters():
        parameter.requires_grad = id(parameter) in trained
        total += parameter.numel()
        if parameter.requires_grad:
            count += parameter.numel()
            report.did(name, f"trains, {parameter.numel()} values")
    report.numbers.update(trainable=count, total=total, share=count / max(total, 1))
    for name, group in chosen.items():
        twins = [n for n, p in parameters.items() if p is parameters[name] and n != name]
        if twins:
            report.notes.append(f"{name} ({group}) is shared: {', '.join(twins)} trains too")
    return report
