"""Inference of a transformer with LayerNorm beside one whose UnifiedNorm is fused away."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from normkit.nn import LayerNorm, UnifiedNorm
from normkit.nn.residual import Norm, Transformer
from normkit.surgery import fold
from normkit.surgery.timing import in_turns

TOKENS = 197  # of an image of 224 pixels in patches of 16, and a class token


@dataclass(frozen=True)
class Size:
    """Size of a transformer: width, heads, blocks."""

    dim: int
    heads: int
    layers: int


TINY, SMALL = Size(192, 3, 12), Size(384, 6, 12)
"""Those of DeiT-Tiny and DeiT-Small."""


def images(size: Size, batch: int = 8) -> Tensor:
    """Tokens of a batch of images ``[B, 197, D]``."""
    return torch.randn(batch, TOKENS, size.dim)


def stack(norm: Norm, size: Size) -> Transformer:
    """Pre-norm blocks whose every norm is read by one linear layer, in evaluation mode."""
    torch.manual_seed(0)
    model = Transformer(size.dim, size.heads, size.layers, "pre", norm, final_norm=False)
    with torch.no_grad():
        for _ in range(3):  # statistics of their own
            model(images(size, 2))
    return model.eval()


def fuse(model: Transformer, size: Size) -> Transformer:
    """Put every UnifiedNorm into the linear layer that reads it, in place."""
    fold(model, inputs=[images(size, 2)])
    return model


def models(size: Size) -> dict[str, Transformer]:
    """With LayerNorm, with UnifiedNorm, and with UnifiedNorm fused."""
    return {
        "layer": stack(LayerNorm, size),
        "unified": stack(UnifiedNorm, size),
        "fused": fuse(stack(UnifiedNorm, size), size),
    }


def inference(model: nn.Module, x: Tensor) -> Callable[[], Tensor]:
    """Return a call that runs the model without autograd."""

    def call() -> Tensor:
        with torch.inference_mode():
            return model(x)  # type: ignore[no-any-return]

    return call


def seconds(size: Size, repeats: int) -> dict[str, list[float]]:
    """Seconds of each repeat of a forward pass, the models in turns."""
    x = images(size)
    return in_turns({name: inference(model, x) for name, model in models(size).items()}, repeats)


class _Living(TorchDispatchMode):  # type: ignore[no-untyped-call, unused-ignore]
    """Counts the bytes of tensors that live, and the most that ever did."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call, unused-ignore]
        self.now: int = 0
        self.peak: int = 0
        self._known: set[int] = set()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        found = func(*args, **(kwargs or {}))
        for t in tree_leaves(found):
            if isinstance(t, Tensor):
                self._enter(t.untyped_storage())
        return found

    def _enter(self, storage: Any) -> None:
        key = storage._cdata
        if key in self._known or not storage.nbytes():
            return
        self._known.add(key)
        self.now += storage.nbytes()
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._leave, key, storage.nbytes())

    def _leave(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.now -= size


def peak_bytes(call: Callable[[], object]) -> int:
    """Most bytes of tensors that a call makes and holds at a time."""
    living = _Living()
    with living:
        call()
    return living.peak
