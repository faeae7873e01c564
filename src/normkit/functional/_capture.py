"""What captures the operations that run: torch.compile, torch.export, or nothing.

A compiled graph for the CPU may call kernels of torch that its compiler would take to pieces; an
exported program consists of torch's own operators.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

_LIBRARY = torch.library.Library("normkit", "FRAGMENT")  # type: ignore[no-untyped-call]

# Absent before torch 2.7, where compiled graphs call no kernel then.
_is_exporting = getattr(torch.compiler, "is_exporting", torch.compiler.is_compiling)


def compiled_for_cpu(x: Tensor) -> bool:
    """Whether torch.compile traces, for a tensor on the CPU."""
    return torch.compiler.is_compiling() and not _is_exporting() and x.device.type == "cpu"


def eager_on_cpu(x: Tensor) -> bool:
    """Whether operations on a tensor on the CPU run as they are called."""
    return not torch.compiler.is_compiling() and x.device.type == "cpu"


def graph_operator(schema: str, run: Callable[..., Any], shape: Callable[..., Any]) -> Any:
    """Make an operator of a CPU function, for compiled graphs to call as it is.

    ``torch.library.custom_op`` does the same with more care, which takes longer than small sums do.

    Args:
        schema: name and signature, as ``"name(Tensor x) -> Tensor"``.
        run: what is called; it changes none of its arguments and returns none of them.
        shape: returns empty tensors shaped and typed as those of ``run``.

    Returns:
        The operator.
    """
    name = schema.partition("(")[0]
    _LIBRARY.define(schema)  # type: ignore[no-untyped-call]
    _LIBRARY.impl(name, run, "CPU")  # type: ignore[no-untyped-call]
    torch.library.register_fake(f"normkit::{name}", shape, lib=_LIBRARY)
    return getattr(torch.ops.normkit, name).default
