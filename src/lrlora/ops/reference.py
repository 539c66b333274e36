"""The method as it is written on paper, for reading and for testing everything else against."""

from __future__ import annotations

import math

import torch.nn.functional as F
from torch import Tensor

from .expansion import Expansion
from .transfer import Transfer


def reference_delta_weight(A: Tensor, B: Tensor, transfer: Transfer, *, scaling: float, input_gain: float) -> Tensor:
    """ΔW = (s/g) · φ(g·BA), entry by entry.

    Args:
        A: (r, n), any float dtype.
        B: (m, r).
        transfer: φ.
        scaling: s, usually α/r.
        input_gain: g > 0. Entries of BA are tiny beside the structure of φ; g scales them to it.

    Returns:
        (m, n), float64. Autograd keeps an m×n×N tensor for it.

    """
    return (scaling / input_gain) * transfer(input_gain * (B.double() @ A.double()))


def reference_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    A: Tensor,
    B: Tensor,
    transfer: Transfer,
    *,
    scaling: float,
    input_gain: float,
) -> Tensor:
    """Y = x (W + ΔW)ᵀ + b for x of shape (..., n) and W of shape (m, n); returns (..., m), float64."""
    delta = reference_delta_weight(A, B, transfer, scaling=scaling, input_gain=input_gain)
    return F.linear(x.double(), weight.double() + delta, None if bias is None else bias.double())


def reference_expansion_delta(A: Tensor, B: Tensor, expansion: Expansion, *, scaling: float) -> Tensor:
    """ΔW = s · (P Rᵀ / √Q) ∘ BA; A (r, n) and B (m, r) as above, (m, n), float64."""
    P = expansion.output_signs(len(B), B.device).double()
    R = expansion.input_signs(A.shape[1], A.device).double().T
    return scaling * (P @ R.T / math.sqrt(expansion.num_terms)) * (B.double() @ A.double())
