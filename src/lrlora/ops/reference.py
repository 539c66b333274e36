"""The method as it is written on paper, for reading and for testing everything else against."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..pattern import Pattern
from ..transfer import Transfer


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


def reference_pattern_delta(A: Tensor, B: Tensor, pattern: Pattern, *, scaling: float) -> Tensor:
    """ΔW = s · Σ_k (P C_k Rᵀ) ∘ (b_k a_kᵀ), factor by factor; A (r, n) and B (m, r) as above, (m, n), float64."""
    P = pattern.spec.basis(len(B), "output", B.device).double()
    R = pattern.spec.basis(A.shape[1], "input", A.device).double()
    C = pattern.weights().double()
    total = torch.zeros(len(B), A.shape[1], dtype=torch.float64, device=A.device)
    for k, (a, b) in enumerate(zip(A.double(), B.double().T, strict=True)):
        C_k = C if C.dim() == 1 else C[k]  # one for all factors, or one each
        total = total + (P @ (C_k.diag() if C_k.dim() == 1 else C_k) @ R.T) * torch.outer(b, a)
    return scaling * total
