"""Layers, one file a paper's family."""

from normkit.nn.layer_norm import LayerNorm
from normkit.nn.rms_norm import CRMSNorm, RMSNorm

__all__ = ["CRMSNorm", "LayerNorm", "RMSNorm"]
