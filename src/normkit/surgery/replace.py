"""Put other norms in the place of those of a model."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

from torch import nn

from normkit.errors import InputError
from normkit.nn import LayerNorm, RMSNorm
from normkit.surgery.architectures import matches
from normkit.surgery.ledger import changes
from normkit.surgery.report import Report

Which: TypeAlias = "type[nn.Module] | str | Callable[[str, nn.Module], bool]"
Maker: TypeAlias = "Callable[[Any], nn.Module]"


def _shape(old: Any) -> Any:
    """Sizes of the trailing dimensions that a norm works on."""
    if hasattr(old, "normalized_shape"):
        return old.normalized_shape
    weight = getattr(old, "weight", None)
    if weight is not None and weight.ndim == 1 and not hasattr(old, "num_features"):
        return tuple(weight.shape)
    raise InputError(f"a {type(old).__name__} does not normalize over trailing dimensions")


def _eps(old: Any, default: float = 1e-5) -> float:
    return next((e for k in ("eps", "variance_epsilon") if (e := getattr(old, k, None))), default)


def _layer_norm(old: Any) -> nn.Module:
    affine = getattr(old, "weight", None) is not None
    return LayerNorm(_shape(old), _eps(old), affine, bias=getattr(old, "bias", None) is not None)


def _rms_norm(old: Any) -> nn.Module:
    affine = getattr(old, "weight", None) is not None
    return RMSNorm(_shape(old), _eps(old), affine, bias=getattr(old, "bias", None) is not None)


MAKERS: dict[str, Maker] = {
    "layernorm": _layer_norm,
    "rmsnorm": _rms_norm,
    "identity": lambda _old: nn.Identity(),
}
"""Names that ``replace`` knows: each makes a norm of the size of the old one, or raises InputError
with the reason why it cannot. A norm joins by one line."""


def replace(model: nn.Module, rules: Mapping[Which, str | Maker]) -> Report:
    """Replace layers of ``model``, in place.

    The new layer takes over gain and shift where it has them, dtype, device, training mode and
    ``requires_grad``. It computes another function: train again, or use
    :func:`normkit.surgery.recenter` where the function must stay.

    Args:
        model: any module.
        rules: what to replace, and by what; the first rule that fits a layer counts. A rule fits by
            the layer's exact type, by a pattern of its path (``*`` stands for one name), or by a
            predicate of path and layer. It gives a name of :data:`MAKERS` or a function of the
            old layer.

    Returns:
        The report: what was replaced, and which fitting layers could not be and why.

    Raises:
        InputError: for an unknown name, or a rule that fits no layer.

    Example:
        >>> replace(model, {nn.LayerNorm: "rmsnorm"})
        >>> replace(model, {"layers.*.norm1": lambda old: MyNorm(old.normalized_shape)})
    """
    makers = {which: _maker(to) for which, to in rules.items()}
    unused = set(makers)
    report = Report("replace")
    made: dict[nn.Module, nn.Module] = {}
    layers = [(p, layer) for p, layer in model.named_modules(remove_duplicate=False) if p]
    with changes(model) as ledger:
        for path, old in layers:
            which = next((w for w in makers if _fits(w, path, old)), None)
            if which is None:
                continue
            unused.discard(which)
            try:
                new = made.get(old) or _take_over(makers[which](old), old)
            except InputError as reason:
                report.left(path, str(reason))
                continue
            made[old] = new
            ledger.swap(path, new)
            report.did(path, f"{type(old).__name__} -> {type(new).__name__}")
        for which in unused:
            raise InputError(f"rules: {_text(which)} fits no layer of {type(model).__name__}")
    if report.changed:
        report.notes.append("the model computes another function now; train it again")
    return report


def _maker(to: str | Maker) -> Maker:
    if not isinstance(to, str):
        return to
    if to.lower() not in MAKERS:
        raise InputError(f"rules: there is no norm {to!r}; known: {', '.join(MAKERS)}")
    return MAKERS[to.lower()]


def _fits(which: Which, path: str, layer: nn.Module) -> bool:
    if isinstance(which, str):
        return matches(which, path)
    if isinstance(which, type):
        return type(layer) is which
    return which(path, layer)


def _take_over(new: nn.Module, old: nn.Module) -> nn.Module:
    """Give ``new`` the values of ``old`` that fit, and its dtype, device and requires_grad."""
    theirs = dict(old.named_parameters(recurse=False))
    like = next(iter(old.parameters()), None)
    if like is not None:
        new.to(like.device, like.dtype)
    for name, parameter in new.named_parameters(recurse=False):
        source = theirs.get(name)
        if source is not None and source.shape == parameter.shape:
            parameter.data.copy_(source)
        trained = source if source is not None else like
        parameter.requires_grad = trained is None or trained.requires_grad
    return new


def _text(which: Which) -> str:
    return repr(which) if isinstance(which, str) else getattr(which, "__name__", str(which))
