"""y = x (W + s·φ(BA))ᵀ + b: the formula in `reference`, the lean path in `linear`."""

from .linear import adapted_linear, delta_weight

__all__ = ["adapted_linear", "delta_weight"]
