"""Reference implementation of the formulas, for reading and for tests."""

from __future__ import annotations

import math

from torch import Tensor

from .expansion import Expansion
from .transfer import INPUT_RMS, Transfer


def reference_delta_weight(
    A: Tensor, B: Tensor, transfer: Transfer, *, scaling: float, input_gain: float | None
) -> Tensor:
    """ΔW = (s/g) · φ(g·BA), elementwise.

    Args:
        A: (r, n), any float dtype.
        B: (m, r).
        transfer: φ.
        scaling: s, usually α/r.
        input_gain: g > 0, or None: c / rms(BA), without a gradient.

    Returns:
        (m, n), float64. Autograd saves an m×n×N tensor.

    """
    product = B.double() @ A.double()
    gain = INPUT_RMS / product.square().mean().sqrt().item() if input_gain is None else input_gain
    return (scaling / gain) * transfer(gain * product)


def reference_expansion_delta(A: Tensor, B: Tensor, expansion: Expansion, *, scaling: float) -> Tensor:
    """ΔW = s · (P Rᵀ / √Q) ∘ BA for A (r, n) and B (m, r): (m, n), float64."""
    P = expansion.output_signs(len(B), B.device).double()
    R = expansion.input_signs(A.shape[1], A.device).double().T
    return scaling * (P @ R.T / math.sqrt(expansion.num_terms)) * (B.double() @ A.double())
