"""`Form`: base class of the maps from A and B to ΔW, φ and the expansion. Subclass it for another form.

Also the precision in which forms compute.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Form(nn.Module):
    """ΔW (m, n) from A (r, n) and B (m, r): dense, as thin factors, or as a linear layer.

    `scaling` is s; `gain` is g, the scale of φ's input, or None: set from A and B.
    """

    is_product = False  # whether ΔW is a product of thin factors and is never materialized
    num_terms = 1  # the rank of a product is at most this times r

    def linear(
        self, x: Tensor, A: Tensor, B: Tensor, *, scaling: float, gain: float | None, added_to: Tensor | None = None
    ) -> Tensor:
        """Compute y₀ + x ΔWᵀ (..., m), differentiable; y₀ is zero without `added_to`."""
        raise NotImplementedError

    def fused_linear(
        self,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        A: Tensor,
        B: Tensor,
        *,
        scaling: float,
        gain: float | None,
    ) -> Tensor:
        """Compute y = x (W + ΔW)ᵀ + b, if not a product."""
        return F.linear(x, weight + self.delta(A, B, scaling=scaling, gain=gain).to(weight.dtype), bias)

    def delta(self, A: Tensor, B: Tensor, *, scaling: float, gain: float | None, rows: Tensor | None = None) -> Tensor:
        """ΔW (..., m, n), or the given rows (len(rows), n); differentiable, float32 or float64."""
        raise NotImplementedError

    def factors(self, A: Tensor, B: Tensor, *, scaling: float) -> tuple[Tensor, Tensor] | None:
        """U (..., m, k) and V (..., k, n) with ΔW = U V, or None."""
        return None

    def prepare_forward(self) -> None:
        """Unshard and restore precision before a forward."""


@torch.compiler.assume_constant_result  # PyTorch 2.9 cannot trace it
def has_autocast(device: str) -> bool:
    """Whether a device has autocast."""
    return torch.amp.is_autocast_available(device)


def without_autocast(device: str) -> AbstractContextManager[object]:
    """Disable autocast, which would form BA in half precision."""
    return torch.autocast(device, enabled=False) if has_autocast(device) else nullcontext()


def at_least_float32(matrix: Tensor) -> Tensor:
    """Convert to float32 unless float32 or float64; 8-bit dtypes have no automatic promotion."""
    return matrix.float() if matrix.dtype.itemsize < 4 else matrix
