"""Contract checkers that users run on their own classes."""

from normkit.testing.advantage import ADVANTAGE_CHECKS, AdvantageCase, check_advantage
from normkit.testing.layers import LAYER_CHECKS, LayerCase, check_layer

__all__ = [
    "ADVANTAGE_CHECKS",
    "LAYER_CHECKS",
    "AdvantageCase",
    "LayerCase",
    "check_advantage",
    "check_layer",
]
