"""What captures the operations that run: torch.compile, torch.export, or nothing.

A compiled graph for the CPU may call kernels of torch that its compiler would take to pieces; an
exported program consists of torch's own operators.
"""

from __future__ import annotations

import torch
from torch import Tensor

# Absent before torch 2.7, where compiled graphs call no kernel then.
_is_exporting = getattr(torch.compiler, "is_exporting", torch.compiler.is_compiling)


def compiled_for_cpu(x: Tensor) -> bool:
    """Whether torch.compile traces, for a tensor on the CPU."""
    return torch.compiler.is_compiling() and not _is_exporting() and x.device.type == "cpu"


def eager_on_cpu(x: Tensor) -> bool:
    """Whether operations on a tensor on the CPU run as they are called."""
    return not torch.compiler.is_compiling() and x.device.type == "cpu"
