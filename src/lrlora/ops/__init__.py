"""y = x (W + ΔW)ᵀ + b: the formula in `reference`, the lean path of φ(BA) in `linear`, patterns in `thin`."""

from .linear import adapted_linear, delta_weight
from .thin import pattern_delta, pattern_factors, pattern_linear, svd_of_product

__all__ = [
    "adapted_linear",
    "delta_weight",
    "pattern_delta",
    "pattern_factors",
    "pattern_linear",
    "svd_of_product",
]
