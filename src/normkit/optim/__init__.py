"""What stands between gradients and parameters: optimizers and corrections of gradients."""

from normkit.optim.clipping_bias import BiasNorms, ClippingBias

__all__ = ["BiasNorms", "ClippingBias"]
