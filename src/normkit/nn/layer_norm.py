"""LayerNorm. Layer Normalization (Ba, Kiros, Hinton, 2016), arXiv 1607.06450.

    y = (x - mean(x)) / sqrt(var(x) + eps) * weight + bias

over the trailing dimensions of each sample, in training and evaluation alike.

Differences from the authors' code (ryankiros/layer-norm): any number of trailing dimensions, and no
affine parameters where they are not wanted.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from normkit.functional.norms import layer_norm
from normkit.nn._trailing import TrailingNorm


class LayerNorm(TrailingNorm):
    r"""Center and scale each sample: ``(x - mean) / sqrt(var + eps) * weight + bias``.

    Takes the place of ``torch.nn.LayerNorm`` and loads its state dict. Called with a residual it
    returns ``norm(x + residual), x + residual``.

    Args:
        normalized_shape: sizes of the trailing dimensions that form a group; an int for one.
        eps: added to the variance, in units of the input squared.
        elementwise_affine: whether there is a gain (and, with ``bias``, a shift) per member.
        bias: whether there is a shift.
        device: of the parameters.
        dtype: of the parameters.
        zero_centered: store the gain minus one, as Gemma does.

    Raises:
        InputError: for a shape without positive sizes or a negative eps.

    Source:
        arXiv 1607.06450, equations 3 and 4.
    """

    eps: float

    def __init__(
        self,
        normalized_shape: int | Sequence[int],
        eps: float = 1e-5,
        elementwise_affine: bool = True,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        zero_centered: bool = False,
    ) -> None:
        super().__init__(
            normalized_shape, eps, elementwise_affine, bias, device, dtype, zero_centered
        )

    def norm(self, x: Tensor) -> Tensor:
        """Normalize by torch's fused kernel: :func:`normkit.functional.norms.layer_norm`."""
        return layer_norm(x, self.normalized_shape, self.gain, self.bias, self.eps)
