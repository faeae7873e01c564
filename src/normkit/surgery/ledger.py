"""The ledger of changes to a model: it undoes them if surgery fails, and is the recipe to load by.

Weights are replaced through ``parameter.data``, so that a parameter stays the object that an
optimizer or a tied layer holds.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from normkit.surgery.layers import Recenter, build, describe
from normkit.surgery.linear import refresh_sizes

_ATTRIBUTE = "_normkit_edits"


class Ledger:
    """Changes to one model, in order.

    Args:
        model: the model that is changed in place.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.layers: dict[str, dict[str, Any]] = {}
        self._undo: list[Callable[[], object]] = []

    def set(self, layer: Any, name: str, value: Tensor) -> None:
        """Set a parameter of ``layer`` to ``value``, rounded once to the layer's dtype.

        A bias that the layer lacks is added, with ``requires_grad`` of its weight.
        """
        old = getattr(layer, name)
        if old is None:
            like: Tensor = layer.weight
            new = nn.Parameter(value.to(like), requires_grad=like.requires_grad)
            setattr(layer, name, new)
            self._undo.append(lambda: setattr(layer, name, None))
            return
        data, grad = old.data, old.grad
        old.grad = None
        old.data = value.detach().to(data).contiguous()
        if hasattr(layer, "weight"):
            refresh_sizes(layer)

        def undo() -> None:
            old.data, old.grad = data, grad
            if hasattr(layer, "weight"):
                refresh_sizes(layer)

        self._undo.append(undo)

    def on_undo(self, action: Callable[[], object]) -> None:
        """Call ``action`` if the changes are undone."""
        self._undo.append(action)

    def untie(self, layer: nn.Module, name: str) -> None:
        """Give ``layer`` a copy of its own of a parameter that it shares."""
        shared = getattr(layer, name)
        own = nn.Parameter(shared.detach().clone(), requires_grad=shared.requires_grad)
        setattr(layer, name, own)
        self._undo.append(lambda: setattr(layer, name, shared))
        config: Any = getattr(self.model, "config", None)
        if getattr(config, "tie_word_embeddings", False):
            config.tie_word_embeddings = False  # or saving and loading would tie them again
            self._undo.append(lambda: setattr(config, "tie_word_embeddings", True))

    def swap(self, path: str, new: nn.Module) -> None:
        """Put ``new`` in the place of the layer at ``path``; it takes over mode and device."""
        old = self.model.get_submodule(path)
        new.train(old.training)
        _put(self.model, path, new)
        self.layers[path] = describe(new)
        self._undo.append(lambda: _put(self.model, path, old))

    def recenter_input(self, path: str, recenter: Recenter) -> None:
        """Let the layer at ``path`` subtract the mean of its first input."""
        handle = attach(self.model, path, recenter)
        self.layers[f"{path}.recenter"] = describe(recenter)

        def undo() -> None:
            handle.remove()
            del self.model.get_submodule(path)._modules["recenter"]

        self._undo.append(undo)

    def rollback(self) -> None:
        """Undo everything."""
        with torch.no_grad():
            while self._undo:
                self._undo.pop()()

    def commit(self) -> None:
        """Keep the changes, and remember on the model which layers they put in."""
        self._undo.clear()
        edits: dict[str, Any] = {**edits_of(self.model), **self.layers}
        setattr(self.model, _ATTRIBUTE, edits)


@contextmanager
def changes(model: nn.Module) -> Iterator[Ledger]:
    """Yield a ledger; an exception in the block leaves the model as it was before."""
    ledger = Ledger(model)
    try:
        with torch.no_grad():
            yield ledger
    except BaseException:
        ledger.rollback()
        raise
    ledger.commit()


def edits_of(model: nn.Module) -> dict[str, Any]:
    """Layers that surgery put into ``model``, by path: type and arguments of each."""
    return dict(getattr(model, _ATTRIBUTE, {}))


def attach(model: nn.Module, path: str, recenter: Recenter) -> Any:
    """Register ``recenter`` as the child "recenter" of a layer, run on its first input."""
    layer = model.get_submodule(path)
    layer.add_module("recenter", recenter)
    return layer.register_forward_pre_hook(_recenter_first, with_kwargs=True)


def _recenter_first(layer: Any, args: Any, kwargs: Any) -> Any:
    if args:
        return (layer.recenter(args[0]), *args[1:]), kwargs
    name = next(iter(kwargs))
    return args, {**kwargs, name: layer.recenter(kwargs[name])}


def _put(model: nn.Module, path: str, layer: nn.Module) -> None:
    parent, _, name = path.rpartition(".")
    model.get_submodule(parent)._modules[name] = layer


def replay(model: nn.Module, edits: dict[str, Any]) -> None:
    """Put the layers of ``edits`` into a model built anew; their weights are loaded afterwards."""
    for path, spec in edits.items():
        layer = build(spec)
        if isinstance(layer, Recenter):
            attach(model, path.removesuffix(".recenter"), layer)
        else:
            _put(model, path, layer)
    setattr(model, _ATTRIBUTE, dict(edits))
