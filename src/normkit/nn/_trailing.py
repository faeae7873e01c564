"""What norms over trailing dimensions share: affine parameters, checks, the residual form."""

from __future__ import annotations

from collections.abc import Sequence
from typing import overload

import torch
from torch import Tensor, nn

from normkit.errors import InputError
from normkit.functional.norms import check_normalized


class TrailingNorm(nn.Module):
    """A norm over the last dimensions, with affine parameters; subclasses define :meth:`norm`.

    Args:
        normalized_shape: sizes of the trailing dimensions that form a group; an int for one.
        eps: added under the root, in units of the input squared.
        elementwise_affine: whether there is a gain (and, with ``bias``, a shift) per member.
        bias: whether there is a shift.
        device: of the parameters.
        dtype: of the parameters.
        zero_centered: store the gain minus one, as Gemma does, so that weight decay pulls the gain
            towards one; the state dict then differs from torch's by that one.
    """

    def __init__(
        self,
        normalized_shape: int | Sequence[int],
        eps: float | None,
        elementwise_affine: bool,
        bias: bool,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
        zero_centered: bool,
    ) -> None:
        super().__init__()
        if isinstance(normalized_shape, int):
            normalized_shape = (normalized_shape,)
        shape = tuple(normalized_shape)
        if not shape or any(not isinstance(n, int) or n < 1 for n in shape):
            raise InputError(f"normalized_shape must be positive integers, got {shape}")
        if eps is not None and not eps >= 0:
            raise InputError(f"eps must be at least 0, got {eps}")
        self.normalized_shape = shape
        self.eps = eps
        self.elementwise_affine = elementwise_affine
        self.zero_centered = zero_centered
        self.weight: nn.Parameter | None
        self.bias: nn.Parameter | None
        for name, exists in (("weight", elementwise_affine), ("bias", elementwise_affine and bias)):
            values = torch.empty(shape, device=device, dtype=dtype) if exists else None
            self.register_parameter(name, None if values is None else nn.Parameter(values))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set the gain to one and the shift to zero."""
        if self.weight is not None:
            nn.init.constant_(self.weight, 0.0 if self.zero_centered else 1.0)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    @property
    def gain(self) -> Tensor | None:
        """What the normalized values are multiplied by."""
        if self.weight is None or not self.zero_centered:
            return self.weight
        return 1 + self.weight

    @overload
    def forward(self, x: Tensor) -> Tensor: ...
    @overload
    def forward(self, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]: ...

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
        """Normalize ``x``, or the sum of ``x`` and ``residual``.

        Args:
            x: ``[*, *normalized_shape]``, floating point.
            residual: shaped like ``x``; added before normalizing.

        Returns:
            The normalized tensor, shaped and typed like ``x``; with ``residual`` also the sum, as
            the next residual: ``norm(x + residual), x + residual``.

        Raises:
            InputError: for integer ``x``, or shapes that do not fit.
        """
        if residual is None:
            return self.norm(x)
        check_normalized(x, self.normalized_shape)
        if residual.shape != x.shape:
            raise InputError(
                f"residual must have the shape of x {tuple(x.shape)}, got {tuple(residual.shape)}"
            )
        total = x + residual
        return self.norm(total), total

    def norm(self, x: Tensor) -> Tensor:
        """Normalize a tensor, checking it."""
        raise InputError(f"{type(self).__name__} must define norm(x)")

    def extra_repr(self) -> str:
        """The constructor's arguments, as torch's norms show them."""
        text = f"{self.normalized_shape}, eps={self.eps}"
        text += f", elementwise_affine={self.elementwise_affine}, bias={self.bias is not None}"
        return text + (", zero_centered=True" if self.zero_centered else "")
