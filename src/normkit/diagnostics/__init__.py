"""Look at a model that trains."""

from normkit.diagnostics.monitor import Activation, Monitor, activation, gradient_norms, spikes

__all__ = ["Activation", "Monitor", "activation", "gradient_norms", "spikes"]
