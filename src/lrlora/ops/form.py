"""`Form`: what makes ΔW of the factors A and B of a layer: φ, or the expansion. A third would be a class of its own."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn


class Form(nn.Module):
    """ΔW (m, n) of A (r, n) and B (m, r), as a matrix, as thin factors, or multiplied with.

    All take s, and g, by which φ's input is scaled.
    """

    is_product = False  # whether ΔW is a product of thin factors, which is never formed
    num_terms = 1  # a product has a rank of up to this times r

    def linear(
        self, x: Tensor, A: Tensor, B: Tensor, *, scaling: float, gain: float, added_to: Tensor | None = None
    ) -> Tensor:
        """Y₀ + x ΔWᵀ of x (..., n), differentiable: (..., m); without `added_to`, y₀ is zero."""
        raise NotImplementedError

    def fused_linear(
        self, x: Tensor, weight: Tensor, bias: Tensor | None, A: Tensor, B: Tensor, *, scaling: float, gain: float
    ) -> Tensor:
        """Y = x (W + ΔW)ᵀ + b, for forms that are not products."""
        return F.linear(x, weight + self.delta(A, B, scaling=scaling, gain=gain).to(weight.dtype), bias)

    def delta(self, A: Tensor, B: Tensor, *, scaling: float, gain: float, rows: Tensor | None = None) -> Tensor:
        """ΔW (..., m, n), differentiable, float32 or float64; or only these rows of it, (len(rows), n)."""
        raise NotImplementedError

    def factors(self, A: Tensor, B: Tensor, *, scaling: float) -> tuple[Tensor, Tensor] | None:
        """U (..., m, k) and V (..., k, n) with ΔW = U V; None where there are none."""
        return None

    def prepare_forward(self) -> None:
        """Before a forward: whole, and in its own precision."""
