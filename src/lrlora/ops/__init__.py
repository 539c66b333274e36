"""y = x (W + ΔW)ᵀ + b: reference formula in `reference`, fused φ(BA) in `linear`, expansion in `thin`."""

from .linear import adapted_linear, delta_weight
from .precision import at_least_float32
from .thin import expansion_delta, expansion_factors, expansion_linear, singular_values_of_product, svd_of_product

__all__ = [
    "adapted_linear",
    "at_least_float32",
    "delta_weight",
    "expansion_delta",
    "expansion_factors",
    "expansion_linear",
    "singular_values_of_product",
    "svd_of_product",
]
