"""Layers, one file a paper's family."""

from normkit.nn.layer_norm import LayerNorm
from normkit.nn.recurrent import LNGRU, LNLSTM, LNGRUCell, LNLSTMCell
from normkit.nn.rms_norm import CRMSNorm, RMSNorm

__all__ = ["LNGRU", "LNLSTM", "CRMSNorm", "LNGRUCell", "LNLSTMCell", "LayerNorm", "RMSNorm"]
