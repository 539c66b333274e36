"""Reference implementation of the formulas, for reading and for tests."""

from __future__ import annotations

import math

from torch import Tensor

from .expansion import Expansion
from .transfer import INPUT_RMS, LEAST_RMS, Transfer


def reference_delta_weight(
    A: Tensor, B: Tensor, transfer: Transfer, *, scaling: float, input_gain: float | None
) -> Tensor:
    """ΔW = (s/g) · φ(g·BA), elementwise.

    Args:
        A: (r, n), any float dtype.
        B: (m, r).
        transfer: φ.
        scaling: s, usually α/r.
        input_gain: g > 0, or None: c / rms(BA), of the rows of B that are not zero, without a gradient.

    Returns:
        (m, n), float64. Autograd saves an m×n×N tensor.

    """
    product = B.double() @ A.double()
    if input_gain is None:
        used = product.detach()[(B != 0).any(1)]
        input_gain = INPUT_RMS / max(used.square().mean().sqrt().item(), LEAST_RMS) if len(used) else 1 / LEAST_RMS
    return (scaling / input_gain) * transfer(input_gain * product)


def reference_expansion_delta(A: Tensor, B: Tensor, expansion: Expansion, *, scaling: float) -> Tensor:
    """ΔW = s · (P Rᵀ / √Q) ∘ BA for A (r, n) and B (m, r): (m, n), float64."""
    P = expansion.output_signs(len(B), B.device).double()
    R = expansion.input_signs(A.shape[1], A.device).double().T
    return scaling * (P @ R.T / math.sqrt(expansion.num_terms)) * (B.double() @ A.double())
