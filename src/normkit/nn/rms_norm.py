"""RMSNorm and CRMSNorm.

RMSNorm: Root Mean Square Layer Normalization (Zhang and Sennrich, 2019), arXiv 1910.07467.
CRMSNorm: Pre-RMSNorm and Pre-CRMSNorm Transformers (Jiang et al., 2023), arXiv 2305.14858.

    RMSNorm(x)  = x / sqrt(mean(x^2) + eps) * weight + bias
    CRMSNorm(z) = z / sqrt((sum z^2 + (sum z)^2) / d + eps),   z the first d-1 of d coordinates

Differences from the authors' code: a bias and a zero-centered gain where wanted, and no
partial RMSNorm.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from normkit.errors import InputError
from normkit.functional.norms import check_normalized, crms_norm, rms_norm
from normkit.nn._trailing import TrailingNorm


class RMSNorm(TrailingNorm):
    r"""Scale each sample by its root mean square: ``x / sqrt(mean(x^2) + eps) * weight + bias``.

    Takes the place of ``torch.nn.RMSNorm`` and loads its state dict. Called with a residual it
    returns ``norm(x + residual), x + residual``.

    Args:
        normalized_shape: sizes of the trailing dimensions that form a group; an int for one.
        eps: added to the mean square, in units of the input squared; None takes the machine
            epsilon of the dtype of the statistics, as torch does.
        elementwise_affine: whether there is a gain (and, with ``bias``, a shift) per member.
        device: of the parameters.
        dtype: of the parameters.
        bias: whether there is a shift, as a LayerNorm turned into an RMSNorm keeps.
        zero_centered: store the gain minus one, as Gemma does.

    Raises:
        InputError: for a shape without positive sizes or a negative eps.

    Source:
        arXiv 1910.07467, equation 4.
    """

    def __init__(
        self,
        normalized_shape: int | Sequence[int],
        eps: float | None = None,
        elementwise_affine: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        bias: bool = False,
        zero_centered: bool = False,
    ) -> None:
        super().__init__(
            normalized_shape, eps, elementwise_affine, bias, device, dtype, zero_centered
        )

    def norm(self, x: Tensor) -> Tensor:
        """Normalize by :func:`normkit.functional.norms.rms_norm`."""
        return rms_norm(x, self.normalized_shape, self.gain, self.bias, self.eps)


class CRMSNorm(nn.Module):
    r"""RMSNorm of zero-sum vectors kept without their last coordinate.

    ``z / sqrt((sum z^2 + (sum z)^2) / d + eps)``. There is no gain: in a Pre-CRMSNorm transformer
    it is part of the linear layers that read the norm, where the coordinate left out has its own.

    Args:
        normalized_shape: d - 1, the size of the last dimension of the input.
        eps: added to the mean square, in units of the input squared.
        device: accepted, as by other norms; there are no parameters.
        dtype: likewise.

    Raises:
        InputError: for a size below one or a negative eps.

    Source:
        arXiv 2305.14858, section 3.3.
    """

    def __init__(
        self,
        normalized_shape: int,
        eps: float = 1e-5,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if normalized_shape < 1:
            raise InputError(f"normalized_shape must be at least 1, got {normalized_shape}")
        if not eps >= 0:
            raise InputError(f"eps must be at least 0, got {eps}")
        self.normalized_shape = (normalized_shape,)
        self.eps = eps

    def reset_parameters(self) -> None:
        """There are none."""

    def forward(self, z: Tensor) -> Tensor:
        """Normalize ``z``.

        Args:
            z: ``[*, d-1]``, floating point.

        Returns:
            ``[*, d-1]``: the first coordinates of RMSNorm of the completed vector.

        Raises:
            InputError: for integers or another size.
        """
        check_normalized(z, self.normalized_shape)
        return crms_norm(z, self.eps)

    def extra_repr(self) -> str:
        """The constructor's arguments."""
        return f"{self.normalized_shape}, eps={self.eps}"
