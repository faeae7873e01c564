"""Draws tokens from logits by inverting the cumulative distribution at given uniforms.

Shapes: B rows, V vocabulary, k candidates of a nucleus, n blocks of a row.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from normkit.errors import NormkitError

_BLOCK = 256
"""Width of the blocks whose sums are searched before their entries."""

_CANDIDATES = 1024
"""Tokens that are sorted at first when looking for a nucleus."""


def sample(
    logits: Tensor,
    uniforms: npt.NDArray[np.float64],
    temperature: float = 1.0,
    top_p: float = 1.0,
    greedy: bool = False,
    banned: Tensor | None = None,
) -> tuple[list[int], list[float]]:
    """Draw one token per row.

    The token is the first at which the cumulative probability, summed in float64, exceeds the
    uniform. So it depends on nothing but its row's logits and its uniform.

    Args:
        logits: ``[B, V]``, any floating dtype.
        uniforms: numbers in [0, 1) ``[B]``.
        temperature: divides the logits.
        top_p: draw from the smallest set of most probable tokens with at least this probability.
        greedy: take the most probable token instead.
        banned: tokens that are not drawn.

    Returns:
        Tokens ``[B]`` and their log-probabilities ``[B]``, the latter under
        ``softmax(logits / temperature)`` over the whole vocabulary: neither ``top_p`` nor
        ``banned`` nor ``greedy`` changes them, as training computes them without these too.

    Raises:
        NormkitError: when a row has a NaN or an infinite logit at the top.
    """
    scaled = logits.float() / temperature if temperature != 1.0 else logits.float()
    peak = scaled.amax(-1, keepdim=True)
    weights = (scaled - peak).exp_()
    blocks = _blocks(weights)
    sums = blocks.sum(-1, dtype=torch.float64)
    normalizer = peak[:, 0] + sums.sum(-1).log()
    if not torch.isfinite(normalizer).all():
        raise NormkitError(
            "the policy's logits are not finite: its weights diverged (lower the learning rate or "
            "resume from an earlier checkpoint)"
        )
    if banned is not None and len(banned):
        # Weighed anew: beside a banned token of almost all the mass the others would all be zero.
        allowed = scaled.index_fill(1, banned, -torch.inf)
        weights = (allowed - allowed.amax(-1, keepdim=True)).exp_()
        blocks = _blocks(weights)
        sums = blocks.sum(-1, dtype=torch.float64)
    uniform = torch.from_numpy(uniforms).to(logits.device)
    if greedy:
        token = weights.argmax(-1)
    elif top_p < 1.0:
        token = _from_nucleus(weights, uniform, top_p)
    else:
        block, rest = _invert(sums, uniform * sums.sum(-1))
        entries = blocks.gather(1, block[:, None, None].expand(-1, 1, _BLOCK))[:, 0]
        within, _ = _invert(entries.double(), rest)
        token = block * _BLOCK + within
    logprob = scaled.gather(1, token[:, None])[:, 0] - normalizer
    return token.tolist(), logprob.tolist()


def _blocks(weights: Tensor) -> Tensor:
    """Cut rows ``[B, V]`` into blocks ``[B, n, _BLOCK]``, the last one filled up with zeros."""
    missing = -weights.shape[1] % _BLOCK
    padded = F.pad(weights, (0, missing)) if missing else weights
    return padded.view(len(weights), -1, _BLOCK)


def _invert(weights: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """First index at which the running sum of ``weights`` exceeds ``target``, and the remainder.

    The running sum rises only at positive weights, so the index never has weight zero.
    """
    running = weights.cumsum(-1)
    below = torch.nextafter(running[:, -1], torch.zeros_like(target))
    target = torch.minimum(target, below)
    index = torch.searchsorted(running, target[:, None], right=True)
    before = running.gather(1, index) - weights.gather(1, index)
    return index[:, 0], (target - before[:, 0]).clamp_min(0.0)


def _from_nucleus(weights: Tensor, uniform: Tensor, top_p: float) -> Tensor:
    wanted = top_p * weights.sum(-1, dtype=torch.float64)
    count = min(_CANDIDATES, weights.shape[1])
    while True:
        ranked, order = weights.topk(count, dim=-1)
        running = ranked.cumsum(-1, dtype=torch.float64)
        if count == weights.shape[1] or bool((running[:, -1] >= wanted).all()):
            break
        count = min(8 * count, weights.shape[1])
    # A token belongs to the nucleus while those before it do not reach top_p.
    before = running - ranked
    nucleus = torch.where(before < wanted[:, None], ranked.double(), 0.0)
    place, _ = _invert(nucleus, uniform * nucleus.sum(-1))
    return order.gather(1, place[:, None])[:, 0]
