"""Expansion: a fixed sign pattern that multiplies BA elementwise, for a rank above r without an m×n matrix.

    ΔW = s · M ∘ BA,    M = P Rᵀ / √Q,    P (m×Q) and R (n×Q) fixed random signs, their first columns ones

M has rank up to Q and ΔW rank up to r·Q, with the r(m+n) parameters of A and B. ΔW is a plain LoRA of rank r·Q and is
computed as one, in two thin matmuls. With a_k (n,) and b_k (m,) the factors of BA, k = 1..r, and q = 1..Q:

    y = x Vᵀ Uᵀ,    V (rQ×n), with the rows R_q ∘ a_k,    U (m×rQ), with the columns s·P_q ∘ b_k / √Q

The expansion is not part of the paper. It helps most where rank limits the update, at about LoRA's cost
(docs/capacity.md).
"""

from __future__ import annotations

import functools
import hashlib
import math
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from .form import Form, at_least_float32, without_autocast


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
        self, x: Tensor, A: Tensor, B: Tensor, *, scaling: float, gain: float | None, added_to: Tensor | None = None
    ) -> Tensor:
        """Compute y = y₀ + x ΔWᵀ.

        In bfloat16, and under autocast, U and V are formed in float32 and rounded, like ΔW of φ(BA), and multiplied in
        the lower precision. float16 without autocast has too small a range: it is promoted to the dtype of A.

        Args:
            x: (..., n), any float dtype.
            A: (r, n).
            B: (m, r).
            scaling: s.
            gain: not used.
            added_to: y₀ (..., m), the base layer's output; default: zero.

        Returns:
            (..., m), in the dtype of the products, or the wider of it and that of y₀.

        """
        is_half = x.dtype == torch.bfloat16 or (x.dtype == torch.float16 and torch.is_autocast_enabled(x.device.type))
        x = x.to(x.dtype if is_half else torch.promote_types(x.dtype, A.dtype))
        P, R = self.output_signs(len(B), B.device), self.input_signs(A.shape[1], A.device)
        with without_autocast(x.device.type):
            # Apply the signs to the smaller operand: the tokens, or the r rows of A.
            if x[..., 0].numel() <= len(A) or torch._C._are_functorch_transforms_active():
                # Σ_q P_q ∘ B A (R_q ∘ x) / √Q = x ΔWᵀ / s, without U and V.
                h = F.linear(x.unsqueeze(-2) * R.to(x.dtype), A.to(x.dtype))  # (..., Q, r)
                terms = F.linear(h, B.to(x.dtype)) * P.to(x.dtype).T
                y = scaling * (terms.sum(-2) * self.num_terms**-0.5)
                return y if added_to is None else added_to + y
            A, B = at_least_float32(A), at_least_float32(B)
            is_one_matmul = added_to is not None and added_to.dtype == x.dtype
            base = added_to if is_one_matmul else x.new_zeros(())
            c = scaling * self.num_terms**-0.5
            y = _ThinLinear.apply(x, base, A, B, P.to(B.dtype), R.to(A.dtype), c)
            return y if is_one_matmul or added_to is None else added_to + y

    def delta(self, A: Tensor, B: Tensor, *, scaling: float, gain: float | None, rows: Tensor | None = None) -> Tensor:
        """ΔW = s · M ∘ BA = U V, differentiable.

        Args:
            A: (..., r, n).
            B: (..., m, r), with the same leading dimensions.
            scaling: s.
            gain: not used.
            rows: indices of the rows to compute, for B (m, r); default: all.

        Returns:
            (..., m, n), or (len(rows), n); float32, or float64 if A or B are.

        """
        with without_autocast(A.device.type):
            U, V = self.factors(A, B, scaling=scaling, rows=rows)
            return U @ V

    def factors(self, A: Tensor, B: Tensor, *, scaling: float, rows: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """U (..., m, r·Q) and V (..., r·Q, n) with ΔW = U V; arguments and dtypes as in `delta`."""
        P, R = self.output_signs(B.shape[-2], B.device), self.input_signs(A.shape[-1], A.device)
        if rows is not None:
            P, B = P[rows], F.embedding(rows, B)
        A, B = at_least_float32(A), at_least_float32(B)
        return scaling * _columns(B, (P * self.num_terms**-0.5).to(B.dtype)), _rows(A, R.to(A.dtype))

    def output_signs(self, m: int, device: torch.device) -> Tensor:
        """P (m, Q), float32."""
        return self._signs_of(m, "output", device)

    def input_signs(self, n: int, device: torch.device) -> Tensor:
        """Rᵀ (Q, n), float32, contiguous in products with rows of A."""
        return self._signs_of(n, "input", device)

    def _signs_of(self, size: int, side: str, device: torch.device) -> Tensor:
        make = _basis_operator if torch.compiler.is_compiling() else _basis
        return make(size, self.num_terms, f"{side}, {self.seed}, {size}", device, side == "input")

    def extra_repr(self) -> str:
        return f"num_terms={self.num_terms}, seed={self.seed}"


def _rows(A: Tensor, R: Tensor) -> Tensor:
    """Rows R_q ∘ a_k of V, (..., r·Q, n), from A (..., r, n) and Rᵀ (Q, n)."""
    return (A.unsqueeze(-2) * R).flatten(-3, -2)


def _columns(B: Tensor, P: Tensor) -> Tensor:
    """Columns P_q ∘ b_k of U, (..., m, r·Q), from B (..., m, r) and P (..., m, Q)."""
    return (B.unsqueeze(-1) * P.unsqueeze(-2)).flatten(-2)


class _ThinLinear(torch.autograd.Function):
    """y = y₀ + c·x Vᵀ Uᵀ for x (tokens, n), with the rows R_q ∘ a_k of V and the columns P_q ∘ b_k of U, c = s/√Q.

    With h = x Vᵀ, G = ∂L/∂y:  ∂L/∂x = c G U V,  ∂L/∂a_k = c Σ_q R_q ∘ ((G U)ᵀ x)_kq,  ∂L/∂b_k = c Σ_q P_q ∘ (Gᵀ h)_kq

    y₀ is (tokens, m), or a single zero. Saves x, h (tokens, r·Q), A and B; U and V are recomputed. All products are in
    the dtype of x, the sums over q in that of A and B.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, base: Tensor, A: Tensor, B: Tensor, P: Tensor, R: Tensor, c: float) -> Tensor:
        m = len(B)
        h = x.reshape(-1, x.shape[-1]) @ _rows(A, R).to(x.dtype).T
        ctx.save_for_backward(x, h, A, B, P, R)
        ctx.c = c
        y = torch.addmm(base.reshape(-1, m) if base.dim() else base, h, _columns(B, P).to(x.dtype).T, alpha=c)
        return y.view(*x.shape[:-1], m)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, h, A, B, P, R = ctx.saved_tensors
        if torch.is_grad_enabled():  # for second derivatives, h must depend on x and A
            h = x.reshape(-1, x.shape[-1]) @ _rows(A, R).to(x.dtype).T
        needs_x, needs_base, needs_A, needs_B = ctx.needs_input_grad[:4]
        G = grad.reshape(-1, len(B))
        GU = G @ _columns(ctx.c * B, P).to(x.dtype)
        grad_x = grad_A = grad_B = None
        if needs_x:
            grad_x = (GU @ _rows(A, R).to(x.dtype)).view(x.shape)
        if needs_A:
            terms = (GU.T @ x.reshape(-1, x.shape[-1])).view(len(A), len(R), -1)
            grad_A = (terms * R.to(x.dtype)).sum(1, dtype=A.dtype)
        if needs_B:
            terms = (G.T @ h).view(len(B), -1, len(R))
            grad_B = ctx.c * (terms * P.to(x.dtype).unsqueeze(1)).sum(2, dtype=B.dtype)
        return grad_x, grad if needs_base else None, grad_A, grad_B, None, None, None


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
