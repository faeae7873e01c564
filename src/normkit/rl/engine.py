"""accelerate as the engine of the trainer: one process, or data-parallel ones.

Shapes: N rows of this process, F numbers of a row.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable
from typing import Any, Literal

import torch
from torch import Tensor, nn

from normkit.errors import InputError, MissingDependencyError

_SHARDED = ("FSDP", "DEEPSPEED", "MEGATRON_LM")
"""Kinds of accelerate's engine that keep no whole model in any process."""


class Engine:
    """What the processes of a training do together.

    Raises:
        MissingDependencyError: without accelerate.
        InputError: where accelerate was told to shard models.
    """

    def __init__(self) -> None:
        try:
            from accelerate import Accelerator
        except ImportError:
            raise MissingDependencyError("accelerate", "rl") from None
        self.accelerator = Accelerator()
        if self.accelerator.distributed_type.name in _SHARDED:
            raise InputError(
                "accelerate: the trainer runs in one process or data-parallel; to shard a model, "
                "use the estimators in TRL or verl (normkit.integrations)"
            )

    @property
    def device(self) -> torch.device:
        """Where this process computes."""
        device: torch.device = self.accelerator.device
        return device

    @property
    def world(self) -> int:
        """Number of processes."""
        return int(self.accelerator.num_processes)

    @property
    def rank(self) -> int:
        """Number of this process."""
        return int(self.accelerator.process_index)

    def prepare(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[Any, Any]:
        """Wrap a model and its optimizer for the engine."""
        wrapped: tuple[Any, Any] = self.accelerator.prepare(model, optimizer)
        return wrapped

    def unwrap(self, model: Any) -> Any:
        """Return the model without its data-parallel wrapper."""
        return self.accelerator.unwrap_model(model)

    def wait(self) -> None:
        """Wait until every process is here."""
        self.accelerator.wait_for_everyone()

    def backward(self, loss: Tensor) -> None:
        """Add the gradients of this process's share of a loss that is summed over processes."""
        # The wrapper averages gradients over processes.
        self.accelerator.backward(loss * self.world)

    def average_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Do for parameters outside the wrapped model what the wrapper does for its own."""
        for p in parameters if self.world > 1 else ():
            gradient = torch.zeros_like(p) if p.grad is None else p.grad
            p.grad = self.reduce(gradient, "sum").to(p.device) / self.world

    def clip_gradients(self, parameters: Iterable[nn.Parameter], norm: float) -> Tensor:
        """Clip gradients to a norm; return the norm they had."""
        return torch.as_tensor(self.accelerator.clip_grad_norm_(list(parameters), norm))

    def accumulating(self, model: Any, last: bool) -> contextlib.AbstractContextManager[Any]:
        """Context of one backward pass of several; gradients are exchanged in the last."""
        quiet: contextlib.AbstractContextManager[Any] = self.accelerator.no_sync(model)
        return contextlib.nullcontext() if last else quiet

    def reduce(self, value: Tensor, how: Literal["sum", "max"]) -> Tensor:
        """Sum or largest of every process's value."""
        if self.world == 1:
            return value
        gathered: Tensor = self.accelerator.gather(value[None].to(self.device))
        return (gathered.sum(0) if how == "sum" else gathered.amax(0)).cpu()

    def gather_rows(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Rows ``[N, F]`` of every process, process by process, and the process of each row."""
        if self.world == 1:
            return rows, torch.zeros(len(rows), dtype=torch.int64)
        most = int(self.reduce(torch.tensor(float(len(rows))), "max"))
        padded = rows.new_full((most, rows.shape[1] + 1), -1.0)
        padded[: len(rows), :-1], padded[: len(rows), -1] = rows, self.rank
        gathered = self.accelerator.gather(padded.to(self.device)).cpu()
        gathered = gathered[gathered[:, -1] >= 0]
        return gathered[:, :-1], gathered[:, -1].long()
