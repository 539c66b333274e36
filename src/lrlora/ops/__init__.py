"""y = x (W + ΔW)ᵀ + b: reference formula in `reference`, φ(BA) in `transfer`, the expansion in `expansion`."""
