"""normkit: normalization in PyTorch, from activations to advantages."""

from __future__ import annotations

__version__ = "0.1.0"
