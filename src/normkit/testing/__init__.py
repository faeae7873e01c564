"""Contract checkers that users run on their own classes."""

from normkit.testing.layers import LAYER_CHECKS, LayerCase, check_layer

__all__ = ["LAYER_CHECKS", "LayerCase", "check_layer"]
