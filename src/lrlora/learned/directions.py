"""Directions of all modules of an adapter, ranked by their effect on the loss.

Replacing B A by B P A raises the mean loss by about

    ½ ‖M_h^½ (I − P) M_z^½‖²_F

the quadratic model of K-FAC (arXiv:1503.05671) for a low-rank update. With M_h^½ M_z^½ = U Σ Vᵀ the best P of rank k is
M_h^−½ U_k Σ_k V_kᵀ M_z^−½ (Eckart–Young), so that

    B′ = B M_h^−½ U_k Σ_k^½,     A′ = Σ_k^½ V_kᵀ M_z^−½ A,     and the rise is ½ Σ_{i>k} σ_i²

The σ² of all modules share one unit; directions with the most σ² per m + n parameters are kept. σ² and B′ A′ do not
depend on how an update is split into B and A, and neither does damping, which adds to M_z and M_h a share δ of AAᵀ and
BᵀB, scaled to have their mean over the update. This is the optimum of the m × n problem, weighted by the moments of
inputs and output gradients, without an m × n matrix.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..lora.factors import Factors, best_per_parameter
from .moments import Moments, grams, sides

DAMPING = 1e-3
_TINY = 1e-30  # keeps a direction of zeros from dividing by zero


@dataclass(frozen=True)
class Directions:
    """Directions of one module, most important first.

    Attributes:
        whole: the original factors.
        A, B: (k, n) and (m, k); the first rows and columns are the best LoRA of each rank.
        rises: approximate rise of the mean loss if a direction is dropped, ½ σ², (k,), float64, descending.

    """

    whole: Factors
    A: Tensor
    B: Tensor
    rises: Tensor

    def factors(self, rank: int) -> Factors:
        """Best of this rank."""
        A, B = self.A[:rank], self.B[:, :rank]
        # Balance the norms of both sides, to fit the range of half precision.
        scale = ((B.double().norm(dim=0) + _TINY) / (A.double().norm(dim=1) + _TINY)).sqrt()
        lost = _difference(self.whole, A, B) / self.whole.energy if self.whole.energy else 0.0
        kept = max(0.0, self.whole.kept - lost) if rank else 0.0
        return replace(self.whole, A=(scale[:, None] * A).to(A), B=(B / scale).to(B), kept=kept)


def _difference(whole: Factors, A: Tensor, B: Tensor) -> float:
    """‖BA − B′A′‖²_F, without forming the products."""
    left, right = torch.cat([whole.B, -B], dim=1).double(), torch.cat([whole.A, A]).double()
    return ((left.T @ left) * (right @ right.T)).sum().clamp(min=0).item()


@dataclass(frozen=True)
class LossCurve:
    """Importance of an adapter's directions for the loss."""

    modules: list[Directions]

    @property
    def parameters(self) -> int:
        """Total parameters."""
        return sum(module.whole.parameters for module in self.modules)

    @property
    def fewest(self) -> int:
        """Parameters of one direction of the smallest module."""
        return min(module.whole.parameters_per_rank for module in self.modules)

    def within(self, budget: int, max_rank: int | None = None) -> list[Factors]:
        """Factors within a parameter budget that raise the loss least.

        Raises:
            ValueError: the budget is less than one rank of the smallest module.

        """
        costs = [module.whole.parameters_per_rank for module in self.modules]
        ranks = best_per_parameter([module.rises[:max_rank] for module in self.modules], costs, budget)
        return [module.factors(rank) for module, rank in zip(self.modules, ranks, strict=True)]

    def predicted_rise(self, factors: Sequence[Factors]) -> float:
        """Predicted rise of the mean loss with these factors."""
        return sum(module.rises[pair.rank :].sum().item() for module, pair in zip(self.modules, factors, strict=True))

    def predicted(self, max_rank: int | None = None) -> tuple[Tensor, Tensor]:
        """Sizes in parameters, ascending, and the predicted rise of the loss at each; both (directions,)."""
        rises = [module.rises[:max_rank] for module in self.modules]
        cost = torch.cat(
            [
                torch.full((len(r),), module.whole.parameters_per_rank)
                for r, module in zip(rises, self.modules, strict=True)
            ]
        )
        worth = torch.cat(rises)
        order = (worth / cost).argsort(descending=True, stable=True)
        total = sum(module.rises.sum() for module in self.modules)
        return cost[order].cumsum(0), (total - worth[order].cumsum(0)).clamp(min=0)


# Criterion of the ranks at a cut: `criterion(curve, budget, max_rank)` returns the factors of all modules, in the order
# of `curve.modules`, with at most `budget` parameters in total and at most `max_rank` directions each (None: no limit).
# It may read `curve.modules` alone; on several processes, only the first one's result counts.
Criterion = Callable[[LossCurve, int, int | None], list[Factors]]


@torch.no_grad()
def directions(pair: Factors, moments: Moments | None, terms: int, damping: float = DAMPING) -> Directions:
    """Directions of a module, ranked by the loss; by size, with zero rise, if no gradient reached it."""
    (into, out), (AAt, BtB) = sides(pair), grams(pair)
    energy = (AAt * BtB).sum()
    if not energy:
        return Directions(pair, pair.A, pair.B, torch.zeros(pair.rank, dtype=torch.float64))
    if has_moments := moments is not None and bool(moments.weight):
        M_z, M_h = (moments.inputs / moments.weight).to(AAt), (moments.gradients / terms).to(BtB)
    else:
        M_z, M_h = AAt, BtB
    z, z_inverse = _roots(M_z + damping * ((BtB * M_z).sum() / energy) * AAt)
    h, h_inverse = _roots(M_h + damping * ((AAt * M_h).sum() / energy) * BtB)
    U, sigma, Vh = torch.linalg.svd(h @ z.T)
    root = sigma.sqrt()
    left, right = out @ h_inverse @ (U * root), (root[:, None] * Vh) @ z_inverse.T @ into
    B, A = (right.T, left.T) if pair.layout.is_embedding else (left, right)
    return Directions(pair, A.to(pair.A), B.to(pair.B), sigma.square() / 2 * has_moments)


def _roots(moment: Tensor) -> tuple[Tensor, Tensor]:
    """W with WᵀW = M, and its pseudo-inverse."""
    values, vectors = torch.linalg.eigh(moment)
    root = values.clamp(min=0).sqrt()
    inverse = torch.where(values > values[-1] * 1e-12, 1 / root, 0.0)
    return root[:, None] * vectors.T, vectors * inverse


def energy_curve(factors: Sequence[Factors]) -> LossCurve:
    """Curve that keeps the largest directions, regardless of the loss: σ² of ΔW replaces the rise."""
    modules = [directions(pair, None, 1) for pair in factors]  # by size
    return LossCurve(
        [
            replace(module, rises=(module.A.double().norm(dim=1) * module.B.double().norm(dim=0)).square())
            for module in modules
        ]
    )
