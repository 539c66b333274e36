"""y = x (W + ΔW)ᵀ + b: the formula in `reference`, that of φ(BA) fused in `linear`, expansions in `thin`."""

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
