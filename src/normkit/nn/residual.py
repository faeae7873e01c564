"""Where the norm sits in a residual block: post, pre, sandwich, peri, output.

Peri-LN: Revisiting Normalization Layer in the Transformer Architecture (Kim et al., 2025), arXiv
2502.02732. For a sublayer F (attention, then a feed-forward net) and a norm N:

    post            x <- N(x + F(x))
    pre             x <- x + F(N(x))
    output          x <- x + N(F(x))
    peri, sandwich  x <- x + N(F(N(x)))

A stack of peri blocks also normalizes the embeddings, a stack of sandwich blocks (CogView) does
not; all but post end in a norm. An output norm makes the branch's variance its squared gain,
whatever the weights: the stream's variance grows linearly in depth, ``Var(x_0) + sum gain^2``.

Shapes: B batch, N tokens, D dim, H heads.
Differences from the authors' code: none is public; the paper's models are those of Megatron-LM.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from normkit.errors import InputError
from normkit.functional.norms import check_normalized
from normkit.nn.layer_norm import LayerNorm

Placement = Literal["post", "pre", "sandwich", "peri", "output"]
PLACEMENTS: tuple[Placement, ...] = get_args(Placement)
"""The places of a norm by name."""

_INPUT, _OUTPUT = ("pre", "sandwich", "peri"), ("output", "sandwich", "peri")

Norm = Callable[..., nn.Module]
"""Makes a norm: ``norm(dim, device=..., dtype=...)``; any of ours or torch's, or a partial."""


class Residual(nn.Module):
    """A sublayer beside the stream, normalized as its placement says.

    ``x + dropout(norm_out(sublayer(norm_in(x))))``, then ``norm_sum``; of the three norms there are
    those that the placement has. Norms and sublayers that take ``mask=`` are given it.

    Args:
        sublayer: maps ``[B, N, D]`` to ``[B, N, D]``.
        dim: D.
        placement: where the norm sits.
        norm: makes the norms.
        dropout: share of the branch that is dropped in training.
        device: of the norms' parameters.
        dtype: of the norms' parameters.

    Raises:
        InputError: for an unknown placement, or a dropout outside [0, 1).
    """

    def __init__(
        self,
        sublayer: nn.Module,
        dim: int,
        placement: Placement = "peri",
        norm: Norm = LayerNorm,
        dropout: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        _check_placement(placement)
        if not 0 <= dropout < 1:
            raise InputError(f"dropout must be in [0, 1), got {dropout}")

        def make(exists: bool) -> nn.Module | None:
            return norm(dim, device=device, dtype=dtype) if exists else None

        self.placement = placement
        self.dropout = dropout
        self.norm_in = make(placement in _INPUT)
        self.sublayer = sublayer
        self.norm_out = make(placement in _OUTPUT)
        self.norm_sum = make(placement == "post")

    def reset_parameters(self) -> None:
        """Reset sublayer and norms."""
        _reset_children(self)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Add the branch to the stream.

        Args:
            x: ``[B, N, D]``.
            mask: bool ``[B, N]``, True where a token counts.

        Returns:
            ``[B, N, D]``.
        """
        branch = x
        for layer in (self.norm_in, self.sublayer, self.norm_out):
            branch = _call(layer, branch, mask)
        return _call(self.norm_sum, x + F.dropout(branch, self.dropout, self.training), mask)

    def extra_repr(self) -> str:
        """The placement, and dropout where there is any."""
        text = f"placement={self.placement!r}"
        return text + (f", dropout={self.dropout}" if self.dropout else "")


class SelfAttention(nn.Module):
    """Attention of tokens to each other: ``softmax(Q K^T / sqrt(D / H)) V``, then a linear map.

    Args:
        dim: D.
        heads: H, a divisor of D.
        causal: whether a token attends to itself and earlier ones only.
        bias: whether the linear maps have shifts.
        dropout: share of attention weights that is dropped in training.
        device: of the parameters.
        dtype: of the parameters.

    Raises:
        InputError: for heads that do not divide dim.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        causal: bool = False,
        bias: bool = True,
        dropout: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if heads < 1 or dim < 1 or dim % heads:
            raise InputError(f"heads must divide dim, got {heads} heads and dim {dim}")
        self.heads = heads
        self.causal = causal
        self.dropout = dropout
        self.qkv = nn.Linear(dim, 3 * dim, bias, device, dtype)
        self.out = nn.Linear(dim, dim, bias, device, dtype)

    def reset_parameters(self) -> None:
        """Draw the linear maps anew."""
        _reset_children(self)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Attend; ``x`` is ``[B, N, D]``, and no token attends to one whose ``mask`` is False."""
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        found = F.scaled_dot_product_attention(
            q,
            k,
            v,
            None if mask is None else self._visible(mask),
            self.dropout if self.training else 0.0,
            is_causal=self.causal and mask is None,
        )
        return self.out(found.transpose(1, 2).flatten(2))  # type: ignore[no-any-return]

    def _visible(self, mask: Tensor) -> Tensor:
        """Who attends to whom ``[B, 1, N, N]``; to itself each token does, lest a row be empty."""
        n = mask.shape[1]
        visible = mask[:, None, None, :].expand(-1, 1, n, n)
        if self.causal:
            visible = visible.tril()
        return visible | torch.eye(n, dtype=torch.bool, device=mask.device)

    def extra_repr(self) -> str:
        """Heads and direction."""
        return f"heads={self.heads}, causal={self.causal}"


class FeedForward(nn.Module):
    """``W_down gelu(W_up x)``, each token by itself.

    Args:
        dim: D.
        hidden: size between the two maps.
        bias: whether they have shifts.
        device: of the parameters.
        dtype: of the parameters.
    """

    def __init__(
        self,
        dim: int,
        hidden: int,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.up = nn.Linear(dim, hidden, bias, device, dtype)
        self.down = nn.Linear(hidden, dim, bias, device, dtype)

    def reset_parameters(self) -> None:
        """Draw both maps anew."""
        _reset_children(self)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[B, N, D]`` to ``[B, N, D]``."""
        return self.down(F.gelu(self.up(x)))  # type: ignore[no-any-return]


class TransformerBlock(nn.Module):
    """Attention and a feed-forward net on the residual stream, normalized as the placement says.

    Args:
        dim: D.
        heads: H, a divisor of D.
        hidden: size of the feed-forward net; None takes ``4 * dim``.
        placement: "post", "pre", "sandwich", "peri" or "output"; "sandwich" and "peri" are the same
            block and differ in :class:`Transformer`.
        norm: makes the norms.
        causal: whether a token attends to itself and earlier ones only.
        bias: whether the linear maps have shifts.
        dropout: share of attention weights and of branches that is dropped in training.
        device: of the parameters.
        dtype: of the parameters.

    Raises:
        InputError: for an unknown placement, heads that do not divide dim, a hidden size below one
            or a dropout outside [0, 1).

    Source:
        arXiv 2502.02732, section 3.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        hidden: int | None = None,
        placement: Placement = "peri",
        norm: Norm = LayerNorm,
        causal: bool = False,
        bias: bool = True,
        dropout: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        hidden = 4 * dim if hidden is None else hidden
        if hidden < 1:
            raise InputError(f"hidden must be at least 1, got {hidden}")
        self.dim = dim
        self.placement = placement
        where = (device, dtype)
        attention = SelfAttention(dim, heads, causal, bias, dropout, *where)
        self.attention = Residual(attention, dim, placement, norm, dropout, *where)
        feed_forward = FeedForward(dim, hidden, bias, *where)
        self.feed_forward = Residual(feed_forward, dim, placement, norm, dropout, *where)

    def reset_parameters(self) -> None:
        """Draw all maps anew and reset the norms."""
        _reset_children(self)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Add both branches to the stream.

        Args:
            x: ``[B, N, D]``, floating point.
            mask: bool ``[B, N]``, True where a token counts; the others are taken as zero, and
                what stands in their places of the output has no meaning.

        Returns:
            ``[B, N, D]``.

        Raises:
            InputError: for integers, another shape, or a mask that does not fit.
        """
        check_normalized(x, (self.dim,))
        if x.dim() != 3:
            raise InputError(f"x must be [B, N, {self.dim}], got shape {tuple(x.shape)}")
        if mask is not None:
            if mask.dtype != torch.bool or mask.shape != x.shape[:2]:
                raise InputError(
                    f"mask must be bool {tuple(x.shape[:2])}, got {mask.dtype} {tuple(mask.shape)}"
                )
            x = x.masked_fill(~mask[..., None], 0)
        return self.feed_forward(self.attention(x, mask), mask)  # type: ignore[no-any-return]

    def extra_repr(self) -> str:
        """Size and placement."""
        return f"{self.dim}, placement={self.placement!r}"


class Transformer(nn.Module):
    """A stack of :class:`TransformerBlock`, with the norms at its ends.

    Args:
        dim: D.
        heads: H, a divisor of D.
        layers: number of blocks.
        placement: of the norms in each block.
        norm: makes the norms.
        embedding_norm: whether the input is normalized; None as the placement has it: peri does.
        final_norm: whether the output is; None as the placement has it: all but post do.
        hidden: size of the feed-forward nets; None takes ``4 * dim``.
        causal: whether a token attends to itself and earlier ones only.
        bias: whether the linear maps have shifts.
        dropout: share of attention weights and of branches that is dropped in training.

    Raises:
        InputError: as :class:`TransformerBlock`, and for fewer than one layer.

    Source:
        arXiv 2502.02732, section 3.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        layers: int,
        placement: Placement = "peri",
        norm: Norm = LayerNorm,
        embedding_norm: bool | None = None,
        final_norm: bool | None = None,
        hidden: int | None = None,
        causal: bool = False,
        bias: bool = True,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        _check_placement(placement)
        if layers < 1:
            raise InputError(f"layers must be at least 1, got {layers}")
        embedding_norm = placement == "peri" if embedding_norm is None else embedding_norm
        final_norm = placement != "post" if final_norm is None else final_norm
        self.embedding_norm = norm(dim) if embedding_norm else None
        self.blocks = nn.ModuleList(
            TransformerBlock(dim, heads, hidden, placement, norm, causal, bias, dropout)
            for _ in range(layers)
        )
        self.final_norm = norm(dim) if final_norm else None

    def reset_parameters(self) -> None:
        """Draw all maps anew and reset the norms."""
        _reset_children(self)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Pass ``x`` ``[B, N, D]`` through the blocks; ``mask`` is that of a block."""
        x = _call(self.embedding_norm, x, mask)
        for block in self.blocks:
            x = block(x, mask)
        return _call(self.final_norm, x, mask)


def _check_placement(placement: str) -> None:
    if placement not in PLACEMENTS:
        raise InputError(f"placement must be one of {', '.join(PLACEMENTS)}, got {placement!r}")


def _call(layer: nn.Module | None, x: Tensor, mask: Tensor | None) -> Tensor:
    """Apply a layer that may be absent, with the mask where it takes one."""
    if layer is None:
        return x
    if mask is not None and "mask" in inspect.signature(layer.forward).parameters:
        return layer(x, mask=mask)  # type: ignore[no-any-return]
    return layer(x)  # type: ignore[no-any-return]


def _reset_children(module: nn.Module) -> None:
    """Reset what a module is made of, in the order in which it was made."""
    for child in module.children():
        reset = getattr(child, "reset_parameters", None)
        if reset is None:
            _reset_children(child)
        else:
            reset()
