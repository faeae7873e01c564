r"""Clipping-bias correction: gradients divided by the size of what clipping threw away.

ST-PPO: Stabilized Off-Policy Proximal Policy Optimization for Multi-Turn Agents Training (Li et
al., 2025), arXiv 2511.20718, eqs. 7 and 8 (from the second version on: clipping-triggered
normalization)::

    g <- g / |C|        C = sum over clipped tokens of weight w A grad log pi

with token ratios S-PPO, with turn ratios ST-PPO. On-policy nothing is clipped and C is zero, so the
formula needs a floor, which the paper does not give; the modes are ours:

=========  ====================  ==================================================================
mode       gradient              with C = 0
=========  ====================  ==================================================================
"floor"    g / max(1, |C| / c0)  unchanged: only batches with more bias than ``c0`` step less far
"ratio"    g |g| / (|g| + |C|)   unchanged: the share of the unclipped gradient that was kept
"paper"    g / (|C| + delta)     g / delta, an enormous step that only a maximum norm can tame
"measure"  g                     unchanged: for watching a method that does not correct
=========  ====================  ==================================================================

Adam divides by the running size of its gradients and is invariant to a constant factor. With it the
correction acts through changes of ``|C|`` from update to update, through a maximum norm (which must
come after it) and, in Adam proper, through the L2 penalty that is added to the gradient. SGD takes
the factor as it is.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal, NamedTuple, get_args

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.utils import get_total_norm

from normkit.errors import InputError

Mode = Literal["floor", "ratio", "paper", "measure"]


class BiasNorms(NamedTuple):
    """L2 norms over all parameters, scalars.

    Attributes:
        gradient: of the clipped objective's gradient, before the correction.
        bias: of the clipping bias C.
        corrected: of the gradient after the correction.
    """

    gradient: Tensor
    bias: Tensor
    corrected: Tensor


def correction_factor(
    gradient: Tensor, bias: Tensor, mode: Mode = "floor", c0: float = 1.0, delta: float = 1e-6
) -> Tensor:
    """What gradients are multiplied by, see the head of this module.

    Args:
        gradient: norms of gradients, any shape.
        bias: norms of their clipping biases, the same shape.
        mode: what is made of the norms.
        c0: bias that "floor" lets pass, above 0.
        delta: what keeps "paper" finite, above 0.

    Returns:
        A factor for each pair of norms.
    """
    if mode == "floor":
        return 1 / (bias / c0).clamp(min=1)
    if mode == "paper":
        return 1 / (bias + delta)
    if mode == "ratio":
        return torch.where(bias > 0, gradient / (gradient + bias), 1)
    return torch.ones_like(bias)


class ClippingBias:
    """Measures the clipping bias of an update and corrects the gradients by it.

    For each update::

        for part in micro_batches:
            ...
            bias.collect(complementary_loss(...))   # before the backward pass of the loss
            loss.backward()
        norms = bias.correct()
        clip_grad_norm_(parameters, max_norm)
        optimizer.step()

    C is summed over the micro-batches before its norm is taken. It costs one more backward pass
    where something is clipped, nothing elsewhere, and one more buffer of gradients from the first
    such pass until :meth:`correct`.

    Data-parallel: gradients and C are averaged over the processes of the default group, as
    ``DistributedDataParallel`` averages gradients; every process must call :meth:`correct`. The
    loss and the complementary loss must be scaled alike. Gradients that a ``GradScaler`` has
    scaled must be unscaled before :meth:`correct`.

    Args:
        parameters: those that the loss trains.
        mode: what is made of the norms, see the head of this module.
        c0: bias that "floor" lets pass, above 0.
        delta: what keeps "paper" finite, above 0.

    Raises:
        InputError: for an unknown mode, a ``c0`` or ``delta`` that is not above 0, no parameters,
            or parameters that are sharded.
    """

    def __init__(
        self,
        parameters: Iterable[nn.Parameter],
        mode: Mode = "floor",
        c0: float = 1.0,
        delta: float = 1e-6,
    ) -> None:
        self.parameters = [p for p in parameters if p.requires_grad]
        if not self.parameters:
            raise InputError("parameters must hold at least one that requires a gradient")
        if any(isinstance(p, DTensor) for p in self.parameters):
            raise InputError("parameters must be whole in every process, got a sharded DTensor")
        if mode not in get_args(Mode):
            raise InputError(f"mode must be one of {', '.join(get_args(Mode))}; got {mode!r}")
        for name, number in (("c0", c0), ("delta", delta)):
            if not number > 0:
                raise InputError(f"{name} must be above 0, got {number}")
        self.mode, self.c0, self.delta = mode, c0, delta
        self._sums: list[Tensor] | None = None

    def collect(self, complementary: Tensor | None) -> None:
        """Add a micro-batch's part of C, before the backward pass of its loss.

        Gradients come from ``torch.autograd.grad``, which neither touches ``p.grad`` nor wakes the
        hooks of a data-parallel wrapper. The graph is kept for the loss.

        Args:
            complementary: :func:`normkit.rl.loss.complementary_loss`; None where nothing is
                clipped.
        """
        if complementary is None:
            return
        parts = torch.autograd.grad(
            complementary,
            self.parameters,
            retain_graph=True,
            allow_unused=True,
            materialize_grads=True,
        )
        if self._sums is None:  # not the parts themselves, which may share memory
            self._sums = [torch.zeros_like(p) for p in self.parameters]
        torch._foreach_add_(self._sums, parts)

    def forget(self) -> None:
        """Drop what an update has collected that was given up before :meth:`correct`."""
        self._sums = None

    @torch.no_grad()
    def correct(self) -> BiasNorms:
        """Rescale ``p.grad`` of all parameters, forget C, and return the norms."""
        gradients = [p.grad for p in self.parameters if p.grad is not None]
        sums, self._sums = self._averaged(), None
        size, bias = get_total_norm(gradients), get_total_norm(sums or [])
        factor = correction_factor(size, bias, self.mode, self.c0, self.delta)
        if gradients and (sums is not None or self.mode == "paper"):
            torch._foreach_mul_(gradients, factor)
        return BiasNorms(size, bias, size * factor)

    def _averaged(self) -> list[Tensor] | None:
        """C of all processes, or None where nothing was clipped in any."""
        if not dist.is_initialized() or dist.get_world_size() == 1:
            return self._sums
        any_clipped = self.parameters[0].new_tensor(float(self._sums is not None))
        dist.all_reduce(any_clipped)
        if not any_clipped:
            return None
        sums = self._sums or [torch.zeros_like(p) for p in self.parameters]
        for part in sums:
            dist.all_reduce(part)
        torch._foreach_div_(sums, float(dist.get_world_size()))
        return sums
