"""The update of a pattern, ΔW = s·U V: two thin matmuls, differentiated by autograd."""

from __future__ import annotations

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
        (..., m), in the dtype of x, or of autocast.

    """
    V, U = pattern.right(A), scaling * pattern.left(B)
    return F.linear(F.linear(x, V.to(x.dtype)), U.to(x.dtype))


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
        return scaling * pattern.left(B, basis) @ pattern.right(A)
