"""Layers, one file a paper's family."""

from normkit.nn.layer_norm import LayerNorm
from normkit.nn.power_norm import PowerNorm
from normkit.nn.recurrent import LNGRU, LNLSTM, LNGRUCell, LNLSTMCell
from normkit.nn.residual import PLACEMENTS, Residual, Transformer, TransformerBlock
from normkit.nn.rms_norm import CRMSNorm, RMSNorm
from normkit.nn.unified_norm import UnifiedNorm

__all__ = [
    "LNGRU",
    "LNLSTM",
    "PLACEMENTS",
    "CRMSNorm",
    "LNGRUCell",
    "LNLSTMCell",
    "LayerNorm",
    "PowerNorm",
    "RMSNorm",
    "Residual",
    "Transformer",
    "TransformerBlock",
    "UnifiedNorm",
]
