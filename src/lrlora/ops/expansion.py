"""Expansion: a fixed sign pattern that multiplies BA elementwise, for a rank above r without an m×n matrix.

    ΔW = s · M ∘ BA,    M = P Rᵀ / √Q,    P (m×Q) and R (n×Q) fixed random signs, their first columns ones

M has rank up to Q and ΔW rank up to r·Q, with the r(m+n) parameters of A and B. ΔW is a plain LoRA of rank r·Q and is
computed as one, in two thin matmuls. With a_k (n,) and b_k (m,) the factors of BA, k = 1..r, and q = 1..Q:

    y = x Vᵀ Uᵀ,    V (rQ×n), with the rows R_q ∘ a_k,    U (m×rQ), with the columns s·P_q ∘ b_k / √Q

The expansion is not part of the paper. It gained most, at LoRA's cost, where rank limits the update (docs/capacity.md).
"""

from __future__ import annotations

import functools
import hashlib
import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from .form import Form
from .thin import columns, expansion_delta, expansion_factors, expansion_linear, rows


class Expansion(Form):
    """M, which replaces φ in a layer. Has no parameters.

    Args:
        num_terms: Q ≥ 1.
        seed: seed of the random signs.

    """

    is_product = True

    def __init__(self, num_terms: int, seed: int = 0) -> None:
        super().__init__()
        self.num_terms, self.seed = num_terms, seed

    def linear(
        self, x: Tensor, A: Tensor, B: Tensor, *, scaling: float, gain: float, added_to: Tensor | None = None
    ) -> Tensor:
        return expansion_linear(x, A, B, self, scaling=scaling, added_to=added_to)

    def delta(self, A: Tensor, B: Tensor, *, scaling: float, gain: float, rows: Tensor | None = None) -> Tensor:
        if rows is None:
            return expansion_delta(A, B, self, scaling=scaling)
        basis = self.output_signs(len(B), B.device)[rows]
        return expansion_delta(A, F.embedding(rows, B), self, scaling=scaling, basis=basis)

    def factors(self, A: Tensor, B: Tensor, *, scaling: float) -> tuple[Tensor, Tensor]:
        return expansion_factors(A, B, self, scaling=scaling)

    def right(self, A: Tensor) -> Tensor:
        """V: A (..., r, n) → (..., r·Q, n), in the dtype of A."""
        return rows(A, self.input_signs(A.shape[-1], A.device).to(A.dtype))

    def left(self, B: Tensor, basis: Tensor | None = None) -> Tensor:
        """U without s: B (..., m, r) → (..., m, r·Q), in the dtype of B.

        Args:
            B: all rows of a layer's B, or a subset.
            basis: matching rows of P, (..., m, Q); default: all.

        """
        if basis is None:
            basis = self.output_signs(B.shape[-2], B.device)
        return columns(B, (basis * self.num_terms**-0.5).to(B.dtype))

    def output_signs(self, m: int, device: torch.device) -> Tensor:
        """P (m, Q), float32."""
        return self._basis_of(m, "output", device)

    def input_signs(self, n: int, device: torch.device) -> Tensor:
        """Rᵀ (Q, n), float32, contiguous in products with rows of A."""
        return self._basis_of(n, "input", device)

    def _basis_of(self, size: int, side: str, device: torch.device) -> Tensor:
        make = _basis_operator if torch.compiler.is_compiling() else _basis
        return make(size, self.num_terms, f"{side}, {self.seed}, {size}", device, side == "input")

    def extra_repr(self) -> str:
        return f"num_terms={self.num_terms}, seed={self.seed}"


def signs(size: int, terms: int, name: str) -> Tensor:
    """Random ±1, (size, terms), float32: identical for a name on every platform, unlike torch's generators."""
    count = size * terms
    bits = np.unpackbits(np.frombuffer(hashlib.shake_128(name.encode()).digest(math.ceil(count / 8)), np.uint8))
    return torch.from_numpy(2.0 * bits[:count].astype(np.float32) - 1).view(size, terms)


@functools.cache
def _basis(size: int, terms: int, name: str, device: torch.device, is_transposed: bool) -> Tensor:
    """Signs shared by all layers of one size, stored once."""
    with torch.inference_mode(False):
        basis = signs(size, terms, name)
        basis[:, 0] = 1
        return (basis.T.contiguous() if is_transposed else basis).to(device)


# Custom operator, because torch.compile cannot trace how the signs are generated.
@torch.library.custom_op("lrlora::expansion_basis", mutates_args=())
def _basis_operator(size: int, terms: int, name: str, device: torch.device, is_transposed: bool) -> Tensor:
    return _basis(size, terms, name, device, is_transposed).clone()


@_basis_operator.register_fake
def _(size: int, terms: int, name: str, device: torch.device, is_transposed: bool) -> Tensor:
    return torch.empty(*((terms, size) if is_transposed else (size, terms)), device=device)
