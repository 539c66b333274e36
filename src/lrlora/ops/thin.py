"""Updates ΔW = U V that are a product of thin factors, and are never formed: of an expansion, and of plain LoRA."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..expansion import Expansion
from .linear import without_autocast


def expansion_linear(x: Tensor, A: Tensor, B: Tensor, expansion: Expansion, *, scaling: float) -> Tensor:
    """Y = x ΔWᵀ.

    Args:
        x: (..., n), any float dtype; autocast acts on both matmuls.
        A: (r, n).
        B: (m, r).
        expansion: M.
        scaling: s.

    Returns:
        (..., m), in the wider of the dtypes of x and A, as in PEFT's LoRA, or in that of autocast.

    """
    U, V = expansion_factors(A, B, expansion, scaling=scaling)
    dtype = torch.promote_types(x.dtype, A.dtype)
    return F.linear(F.linear(x.to(dtype), V.to(dtype)), U.to(dtype))


def expansion_factors(
    A: Tensor, B: Tensor, expansion: Expansion, *, scaling: float, basis: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """U (..., m, r·Q) and V (..., r·Q, n) with ΔW = U V, differentiable; arguments as of `expansion_delta`."""
    return scaling * expansion.left(B, basis), expansion.right(A)


def expansion_delta(
    A: Tensor, B: Tensor, expansion: Expansion, *, scaling: float, basis: Tensor | None = None
) -> Tensor:
    """ΔW = s·U V, differentiable.

    Args:
        A: (..., r, n).
        B: (..., m, r), with the same leading dimensions.
        expansion: M.
        scaling: s.
        basis: the rows of P that go with those of B, where these are not all of the layer's.

    Returns:
        (..., m, n), float32, or float64 if A or B are.

    """
    with without_autocast(A):
        U, V = expansion_factors(at_least_float32(A), at_least_float32(B), expansion, scaling=scaling, basis=basis)
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
