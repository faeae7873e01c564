"""Pure functions on tensors: no module, no I/O."""
