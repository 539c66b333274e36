"""The expansion: a fixed pattern of signs that multiplies BA entry by entry, for a rank above r without an m×n matrix.

    ΔW = s · M ∘ BA,    M = P Rᵀ / √Q,    P (m×Q) and R (n×Q) fixed random signs, their first columns ones

M has a rank of up to Q, ΔW one of up to r·Q, for the r(m+n) parameters of A and B. ΔW is a plain LoRA of rank r·Q, and
is computed as one, by two thin matmuls. With a_k (n,) and b_k (m,) the factors of BA, k = 1..r, and q = 1..Q:

    y = x Vᵀ Uᵀ,    V (rQ×n), with the rows R_q ∘ a_k,    U (m×rQ), with the columns s·P_q ∘ b_k / √Q

It is not the paper's: it is what gained most, at LoRA's cost, where the rank of an update binds (docs/capacity.md).
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
    """M, which takes the place of φ in a layer. It has no parameters.

    Args:
        num_terms: Q ≥ 1.
        seed: of the random signs.

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
            B: all rows of a layer's, or some.
            basis: the rows of P that go with these, (..., m, Q); default: all.

        """
        if basis is None:
            basis = self.output_signs(B.shape[-2], B.device)
        return columns(B, (basis * self.num_terms**-0.5).to(B.dtype))

    def output_signs(self, m: int, device: torch.device) -> Tensor:
        """P (m, Q), float32."""
        return self._basis_of(m, "output", device)

    def input_signs(self, n: int, device: torch.device) -> Tensor:
        """Rᵀ (Q, n), float32, laid out so that its products with rows of A are contiguous."""
        return self._basis_of(n, "input", device)

    def _basis_of(self, size: int, side: str, device: torch.device) -> Tensor:
        make = _basis_operator if torch.compiler.is_compiling() else _basis
        return make(size, self.num_terms, f"{side}, {self.seed}, {size}", device, side == "input")

    def extra_repr(self) -> str:
        return f"num_terms={self.num_terms}, seed={self.seed}"


def signs(size: int, terms: int, name: str) -> Tensor:
    """Random ±1, (size, terms), float32: the same for a name everywhere, as no random generator of torch promises."""
    count = size * terms
    bits = np.unpackbits(np.frombuffer(hashlib.shake_128(name.encode()).digest(math.ceil(count / 8)), np.uint8))
    return torch.from_numpy(2.0 * bits[:count].astype(np.float32) - 1).view(size, terms)


@functools.cache
def _basis(size: int, terms: int, name: str, device: torch.device, is_transposed: bool) -> Tensor:
    """The same for all layers of one size: it costs no memory in each."""
    with torch.inference_mode(False):
        basis = signs(size, terms, name)
        basis[:, 0] = 1
        return (basis.T.contiguous() if is_transposed else basis).to(device)


# An operator of its own, for torch.compile, which cannot trace the making of the signs.
@torch.library.custom_op("lrlora::expansion_basis", mutates_args=())
def _basis_operator(size: int, terms: int, name: str, device: torch.device, is_transposed: bool) -> Tensor:
    return _basis(size, terms, name, device, is_transposed).clone()


@_basis_operator.register_fake
def _(size: int, terms: int, name: str, device: torch.device, is_transposed: bool) -> Tensor:
    return torch.empty(*((terms, size) if is_transposed else (size, terms)), device=device)
