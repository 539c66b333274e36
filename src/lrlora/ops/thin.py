"""Updates that are a product of thin factors, ΔW = U V, and are never formed: those of patterns, and of plain LoRA."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..pattern import Pattern
from .linear import without_autocast


def pattern_linear(x: Tensor, A: Tensor, B: Tensor, pattern: Pattern, *, scaling: float) -> Tensor:
    """Y = x ΔWᵀ.

    Args:
        x: (..., n), any float dtype; autocast acts on both matmuls.
        A: (r, n).
        B: (m, r).
        pattern: M.
        scaling: s.

    Returns:
        (..., m), in the wider of the dtypes of x and A, as in PEFT's LoRA, or in that of autocast.

    """
    U, V = pattern_factors(A, B, pattern, scaling=scaling)
    dtype = torch.promote_types(x.dtype, A.dtype)
    return F.linear(F.linear(x.to(dtype), V.to(dtype)), U.to(dtype))


def pattern_factors(
    A: Tensor, B: Tensor, pattern: Pattern, *, scaling: float, basis: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """U (..., m, r·Q) and V (..., r·Q, n) with ΔW = U V, differentiable; arguments as of `pattern_delta`."""
    return scaling * pattern.left(B, basis), pattern.right(A)


def pattern_delta(A: Tensor, B: Tensor, pattern: Pattern, *, scaling: float, basis: Tensor | None = None) -> Tensor:
    """ΔW = s·U V, differentiable.

    Args:
        A: (..., r, n).
        B: (..., m, r), with the same leading dimensions.
        pattern: M.
        scaling: s.
        basis: the rows of P that go with those of B, where these are not all of the layer's.

    Returns:
        (..., m, n), float32, or float64 if A or B are.

    """
    with without_autocast(A):
        U, V = pattern_factors(at_least_float32(A), at_least_float32(B), pattern, scaling=scaling, basis=basis)
        return U @ V


def at_least_float32(matrix: Tensor) -> Tensor:
    """The matrix in float32, or float64 if it is that."""
    return matrix.to(torch.promote_types(matrix.dtype, torch.float32))


def svd_of_product(U: Tensor, V: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The singular triples of U V, which is not formed: by QR of both, and the SVD of a small matrix.

    Args:
        U: (m, k).
        V: (k, n).

    Returns:
        Left singular vectors (m, l), singular values (l,), descending, and right singular vectors (n, l), float64;
        l is the smallest of m, k and n.

    """
    left, right = torch.linalg.qr(U.detach().double()), torch.linalg.qr(V.detach().double().T)
    P, sigma, Qh = torch.linalg.svd(left.R @ right.R.T, full_matrices=False)
    return left.Q @ P, sigma, right.Q @ Qh.T
