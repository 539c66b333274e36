"""Updates ΔW = U V as products of thin factors, never materialized: the expansion and plain LoRA."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .precision import at_least_float32, without_autocast

if TYPE_CHECKING:
    from .expansion import Expansion


def rows(A: Tensor, R: Tensor) -> Tensor:
    """Rows R_q ∘ a_k of V, (..., r·Q, n), from A (..., r, n) and Rᵀ (Q, n)."""
    return (A.unsqueeze(-2) * R).flatten(-3, -2)


def columns(B: Tensor, P: Tensor) -> Tensor:
    """Columns P_q ∘ b_k of U, (..., m, r·Q), from B (..., m, r) and P (..., m, Q)."""
    return (B.unsqueeze(-1) * P.unsqueeze(-2)).flatten(-2)


def expansion_linear(
    x: Tensor, A: Tensor, B: Tensor, expansion: Expansion, *, scaling: float, added_to: Tensor | None = None
) -> Tensor:
    """Compute y = y₀ + x ΔWᵀ.

    In bfloat16, and under autocast, U and V are formed in float32 and rounded, like ΔW of φ(BA), and multiplied in the
    lower precision. float16 without autocast has too small a range and is promoted to float32.

    Args:
        x: (..., n), any float dtype.
        A: (r, n).
        B: (m, r).
        expansion: M.
        scaling: s.
        added_to: y₀ (..., m), the base layer's output; default: zero.

    Returns:
        (..., m), in the dtype of the products, or the wider of it and that of y₀.

    """
    is_half = x.dtype == torch.bfloat16 or (x.dtype == torch.float16 and torch.is_autocast_enabled(x.device.type))
    x = x.to(x.dtype if is_half else torch.promote_types(x.dtype, A.dtype))
    with without_autocast(x.device.type):
        # Apply the signs to the smaller operand: the tokens, or the r rows of A.
        if x[..., 0].numel() <= len(A) or torch._C._are_functorch_transforms_active():
            y = scaling * _with_signs_on_x(x, A.to(x.dtype), B.to(x.dtype), expansion)
            return y if added_to is None else added_to + y
        A, B = at_least_float32(A), at_least_float32(B)
        P = expansion.output_signs(len(B), B.device).to(B.dtype)
        R = expansion.input_signs(A.shape[1], A.device).to(A.dtype)
        is_one_matmul = added_to is not None and added_to.dtype == x.dtype
        base = added_to if is_one_matmul else x.new_zeros(())
        y = _ThinLinear.apply(x, base, A, B, P, R, scaling * expansion.num_terms**-0.5)
        return y if is_one_matmul or added_to is None else added_to + y


def _with_signs_on_x(x: Tensor, A: Tensor, B: Tensor, expansion: Expansion) -> Tensor:
    """Σ_q P_q ∘ B A (R_q ∘ x) / √Q = x ΔWᵀ / s, without U, V, for few tokens."""
    h = F.linear(x.unsqueeze(-2) * expansion.input_signs(A.shape[1], A.device).to(x.dtype), A)  # (..., Q, r)
    P = expansion.output_signs(len(B), B.device).to(x.dtype)
    return (F.linear(h, B) * P.T).sum(-2) * expansion.num_terms**-0.5


class _ThinLinear(torch.autograd.Function):
    """y = y₀ + c·x Vᵀ Uᵀ for x (tokens, n), with the rows R_q ∘ a_k of V and the columns P_q ∘ b_k of U, c = s/√Q.

    With h = x Vᵀ, G = ∂L/∂y:  ∂L/∂x = c G U V,  ∂L/∂a_k = c Σ_q R_q ∘ ((G U)ᵀ x)_kq,  ∂L/∂b_k = c Σ_q P_q ∘ (Gᵀ h)_kq

    y₀ is (tokens, m), or a single zero. Saves x, h (tokens, r·Q), A and B; U and V are recomputed. All products are in
    the dtype of x, the sums over q in that of A and B.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, base: Tensor, A: Tensor, B: Tensor, P: Tensor, R: Tensor, c: float) -> Tensor:
        m = len(B)
        h = x.reshape(-1, x.shape[-1]) @ rows(A, R).to(x.dtype).T
        ctx.save_for_backward(x, h, A, B, P, R)
        ctx.c = c
        y = torch.addmm(base.reshape(-1, m) if base.dim() else base, h, columns(B, P).to(x.dtype).T, alpha=c)
        return y.view(*x.shape[:-1], m)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, h, A, B, P, R = ctx.saved_tensors
        if torch.is_grad_enabled():  # for second derivatives, h must depend on x and A
            h = x.reshape(-1, x.shape[-1]) @ rows(A, R).to(x.dtype).T
        needs_x, needs_base, needs_A, needs_B = ctx.needs_input_grad[:4]
        G = grad.reshape(-1, len(B))
        GU = G @ columns(ctx.c * B, P).to(x.dtype)
        grad_x = grad_A = grad_B = None
        if needs_x:
            grad_x = (GU @ rows(A, R).to(x.dtype)).view(x.shape)
        if needs_A:
            terms = (GU.T @ x.reshape(-1, x.shape[-1])).view(len(A), len(R), -1)
            grad_A = (terms * R.to(x.dtype)).sum(1, dtype=A.dtype)
        if needs_B:
            terms = (G.T @ h).view(len(B), -1, len(R))
            grad_B = ctx.c * (terms * P.to(x.dtype).unsqueeze(1)).sum(2, dtype=B.dtype)
        return grad_x, grad if needs_base else None, grad_A, grad_B, None, None, None


def expansion_factors(
    A: Tensor, B: Tensor, expansion: Expansion, *, scaling: float, basis: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """U (..., m, r·Q) and V (..., r·Q, n) with ΔW = U V, differentiable; arguments as in `expansion_delta`."""
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
        basis: rows of P that match the rows of B; default: all rows of the layer.

    Returns:
        (..., m, n), float32, or float64 if A or B are.

    """
    with without_autocast(A.device.type):
        U, V = expansion_factors(at_least_float32(A), at_least_float32(B), expansion, scaling=scaling, basis=basis)
        return U @ V


def svd_of_product(U: Tensor, V: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """SVD of U V without forming it: QR of both factors, then the SVD of a small matrix.

    Args:
        U: (m, k).
        V: (k, n).

    Returns:
        Left singular vectors (m, l), singular values (l,), descending, and right singular vectors (n, l), float64; l is
        the smallest of m, k and n.

    """
    left, right = torch.linalg.qr(U.detach().double()), torch.linalg.qr(V.detach().double().T)
    P, sigma, Qh = torch.linalg.svd(left.R @ right.R.T, full_matrices=False)
    return left.Q @ P, sigma, right.Q @ Qh.T


def singular_values_of_product(U: Tensor, V: Tensor) -> Tensor:
    """Singular values of U V, at half the cost: (l,), descending, float64; U, V and l as above."""
    left, right = (torch.linalg.qr(factor.detach().double(), mode="r").R for factor in (U, V.T))
    return torch.linalg.svdvals(left @ right.T)
