"""Change the norms of a model that exists: replace, recenter, fold, freeze; save and load it."""

from normkit.surgery.architectures import STREAMS, Stream
from normkit.surgery.export import export_onnx
from normkit.surgery.fold import fold
from normkit.surgery.freeze import freeze
from normkit.surgery.load import load, save
from normkit.surgery.recenter import bake, recenter, stream_means
from normkit.surgery.replace import replace
from normkit.surgery.report import Report

__all__ = [
    "STREAMS",
    "Report",
    "Stream",
    "bake",
    "export_onnx",
    "fold",
    "freeze",
    "load",
    "recenter",
    "replace",
    "save",
    "stream_means",
]
