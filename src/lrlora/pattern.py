"""M, a pattern that multiplies BA entry by entry: a rank above r that needs no m×n matrix.

With a_k (n,) and b_k (m,) the factors of BA, k = 1..r:

    ΔW = s · Σ_k M_k ∘ (b_k a_kᵀ),    M_k = P C_k Rᵀ,    P (m×Q) and R (n×Q) fixed,    C_k (Q×Q) learned

M_k has a rank of up to Q, ΔW one of up to r·Q, for r(m+n) parameters and those of C. Every such update is a plain LoRA
of rank r·Q, and is computed as one, by two thin matmuls:

    y = x Vᵀ Uᵀ,    V (rQ×n), with the rows R_q ∘ a_k,    U (m×rQ), with the columns s·(P C_k)_q ∘ b_k

`form` chooses the bases, `weights` what of C is learned:

    expansion   P and R are random signs, their first columns ones; C_k has norm 1. start = "even": C_k = I/√Q, all
                directions at once; "lora": C_k is 1 in its first place alone, which is LoRA
    blocks      P and R tell Q blocks of rows and columns apart; C_k is full and starts at all ones, which is LoRA
                (BoRA, arXiv:2508.06953)
    weights     of the expansion. "fixed": C stays as it starts, the best of them where it was measured; "term": one
                diagonal C for all factors, Q numbers; "factor": a diagonal C_k for each, r·Q numbers; "full": a full
                C_k for each, r·Q² numbers

None of this is the paper's: it is what was found where the rank of an update binds (docs/capacity.md).
"""

from __future__ import annotations

import functools
import hashlib
import math
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .transfer import KeepsFloat32

PATTERN_FORMS = ("expansion", "blocks")
WEIGHTS = ("fixed", "term", "factor", "full")
STARTS = ("even", "lora")


@dataclass(frozen=True)
class PatternSpec:
    """All of M that is not learned.

    Args:
        form: one of `PATTERN_FORMS`.
        num_terms: Q ≥ 1.
        weights: one of `WEIGHTS`; "blocks" has "full" ones.
        start: one of `STARTS`, of the expansion.
        seed: of the random signs.
        lr_multiplier: μ > 0, how much faster than A and B the weights learn.

    """

    form: str = "expansion"
    num_terms: int = 16
    weights: str = "fixed"
    start: str = "even"
    seed: int = 0
    lr_multiplier: float = 1.0

    @property
    def is_learned(self) -> bool:
        return self.weights != "fixed"

    def initial_weights(self, r: int) -> Tensor:
        """C at the start: (Q,), (r, Q) or (r, Q, Q), as `weights` says, float32."""
        q = self.num_terms
        if self.form == "blocks":
            return torch.ones(r, q, q, dtype=torch.float32)
        c = torch.eye(q, dtype=torch.float32)[0]
        if self.start == "even":
            c = torch.full_like(c, q**-0.5)
        if self.weights == "full":
            return torch.diag(c).repeat(r, 1, 1)
        return c.repeat(r, 1) if self.weights == "factor" else c

    def basis(self, size: int, side: str, device: torch.device) -> Tensor:
        """P (m, Q) for side "output" and size m, R (n, Q) for "input" and n; float32."""
        make = _basis_operator if torch.compiler.is_compiling() else _basis
        return make(self.form, size, self.num_terms, f"{side}, {self.seed}, {size}", device)


class Pattern(KeepsFloat32):
    """M with its learned weights, for the factors of one layer, or of several of the same r.

    Attributes:
        spec: everything about M that is fixed.
        weight: float32 parameter of the shape of C, zero at the start: C = C⁰ + μ·weight, so that weight decay pulls
            to the start; None if C is fixed.

    """

    weight: nn.Parameter | None

    def __init__(self, spec: PatternSpec, r: int) -> None:
        super().__init__()
        self.spec, self.r = spec, r
        weight = nn.Parameter(torch.zeros_like(spec.initial_weights(r))) if spec.is_learned else None
        self.register_parameter("weight", weight)

    def weights(self) -> Tensor:
        """C, differentiable: (Q,), (r, Q) or (r, Q, Q), float32; on the CPU if it is fixed."""
        c = self.spec.initial_weights(self.r)
        if self.weight is None:
            return c
        c = c.to(self.weight.device) + self.spec.lr_multiplier * self.weight
        if self.spec.form == "blocks":
            return c
        # Of norm 1, for each factor where it has weights of its own: B has the scale. Left free, c shrank as B grew,
        # and with it the steps that B takes (docs/capacity.md).
        return F.normalize(c.flatten(-2) if self.spec.weights == "full" else c, dim=-1).view_as(c)

    def terms(self) -> float:
        """(Σσ²)²/Σσ⁴ of the singular values of C, mean over factors: over how many terms a factor is spread, 1 to Q."""
        c = self.weights().detach().double()
        sigma = torch.linalg.svdvals(c) if self.spec.weights == "full" else c.abs().view(-1, self.spec.num_terms)
        energies = sigma.square()
        return (energies.sum(-1).square() / energies.square().sum(-1)).mean().item()

    def right(self, A: Tensor) -> Tensor:
        """V: A (..., r, n) → (..., r·Q, n), in the dtype of A."""
        basis = self.spec.basis(A.shape[-1], "input", A.device).to(A.dtype)
        return (A.unsqueeze(-2) * basis.T).flatten(-3, -2)

    def left(self, B: Tensor, basis: Tensor | None = None) -> Tensor:
        """U without s: B (..., m, r) → (..., m, r·Q), in the dtype of B.

        Args:
            B: all rows of a layer's, or some.
            basis: the rows of P that go with these, (..., m, Q); default: all.

        """
        if basis is None:
            basis = self.spec.basis(B.shape[-2], "output", B.device)
        c = self.weights().to(B.device)
        # P C_k, (..., m, r or 1, Q)
        is_full = self.spec.weights == "full"
        mixed = torch.einsum("...p,kpq->...kq", basis, c) if is_full else basis.unsqueeze(-2) * c
        return (B.unsqueeze(-1) * mixed.to(B.dtype)).flatten(-2)

    def extra_repr(self) -> str:
        spec = self.spec
        return f"form={spec.form!r}, num_terms={spec.num_terms}, weights={spec.weights!r}, start={spec.start!r}"


def signs(rows: int, columns: int, name: str) -> Tensor:
    """Random ±1, (rows, columns), float32: the same for a name everywhere, as no random generator of torch promises."""
    count = rows * columns
    bits = np.unpackbits(np.frombuffer(hashlib.shake_128(name.encode()).digest(math.ceil(count / 8)), np.uint8))
    return torch.from_numpy(2.0 * bits[:count].astype(np.float32) - 1).view(rows, columns)


@functools.cache
def _basis(form: str, size: int, terms: int, name: str, device: torch.device) -> Tensor:
    """The same for all layers of one size: it costs no memory in each."""
    with torch.inference_mode(False):
        if form == "blocks":
            basis = F.one_hot(torch.arange(size) * terms // size, terms).float()
        else:
            basis = signs(size, terms, name)
            basis[:, 0] = 1
        return basis.to(device)


# An operator of its own, for torch.compile, which cannot trace the making of the signs.
@torch.library.custom_op("lrlora::pattern_basis", mutates_args=())
def _basis_operator(form: str, size: int, terms: int, name: str, device: torch.device) -> Tensor:
    return _basis(form, size, terms, name, device).clone()


@_basis_operator.register_fake
def _(form: str, size: int, terms: int, name: str, device: torch.device) -> Tensor:
    return torch.empty(size, terms, device=device)
