"""What stands between gradients and parameters: optimizers and corrections of gradients."""

from normkit.optim.clipping_bias import BiasNorms, ClippingBias, correction_factor

__all__ = ["BiasNorms", "ClippingBias", "correction_factor"]
