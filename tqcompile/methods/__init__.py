"""The numerics: pure functions on tensors, no models and no graphs."""
