"""Other criteria for the ranks at the cut of `FittedRanks`, in the same course of training."""

from __future__ import annotations

import torch

from lrlora.adapters import Factors
from lrlora.learned import LossCurve
from lrlora.learned.directions import Criterion, directions

_BISECTIONS = 50


def own_share(curve: LossCurve, budget: int, max_rank: int | None) -> list[Factors]:
    """Each module keeps the fewest directions that hold a share of its own predicted rise.

    The criterion of GRIT (arXiv:2601.00231) on the moments of fitted ranks. The share is that of all modules, the
    largest that the budget allows. GRIT's own moments, projections and preconditioned gradients are not part of it.
    """
    shares = [(of.rises.cumsum(0) / of.rises.sum().clamp(min=1e-300))[:max_rank] for of in curve.modules]
    costs = [of.whole.parameters_per_rank for of in curve.modules]

    def ranks(share: float) -> list[int]:
        return [min(int((of < share).sum()) + 1, len(of)) if of[-1] > 0 else 0 for of in shares]

    low, high = 0.0, 1.0
    for _ in range(_BISECTIONS):
        share = (low + high) / 2
        fits = sum(cost * rank for cost, rank in zip(costs, ranks(share), strict=True)) <= budget
        low, high = (share, high) if fits else (low, share)
    return [of.factors(rank) for of, rank in zip(curve.modules, ranks(low), strict=True)]


@torch.no_grad()
def equal_ranks(curve: LossCurve, budget: int, max_rank: int | None) -> list[Factors]:
    """Each module keeps the same number of singular values, by truncated SVD: LoRA-Squeeze (arXiv:2602.10993)."""
    rank = budget // sum(of.whole.parameters_per_rank for of in curve.modules)
    return [directions(of.whole, None, 1).factors(min(rank, max_rank or rank)) for of in curve.modules]


CRITERIA: dict[str, Criterion] = {"own-share": own_share, "equal": equal_ranks}
