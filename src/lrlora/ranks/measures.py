"""Rank measures of an update.

With σ₁ ≥ σ₂ ≥ … the singular values of an update ΔW:

    stable rank      ‖ΔW‖²_F / σ₁²                                             (arXiv:2606.04325)
    effective rank   exp(H(p)), p_i = σ_i / Σσ, H the Shannon entropy           (Roy & Vetterli, EUSIPCO 2007)
    energy rank      the smallest k with σ₁² + … + σ_k² ≥ 90 % or 99 % of ‖ΔW‖²_F

All are 0 if ΔW = 0. Algebraic rank is not reported: at any tiny tolerance it is near full even if nothing was learned.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from ..adapters.factorize import rank_for


def spectrum(delta: Tensor) -> Tensor:
    """Squared singular values of `delta` (m, n), descending, (min(m, n),), float64.

    Computed from the eigenvalues of the smaller of ΔW ΔWᵀ and ΔWᵀ ΔW, several times cheaper than an SVD. Values below
    the rounding error of the largest are set to 0.
    """
    delta = delta.detach().double()
    gram = delta @ delta.T if delta.shape[0] <= delta.shape[1] else delta.T @ delta
    energies = torch.linalg.eigvalsh(gram).flip(0)
    return torch.where(energies > len(energies) * torch.finfo(energies.dtype).eps * energies[0], energies, 0.0)


def stable_rank(energies: Tensor) -> float:
    """‖ΔW‖²_F / σ₁² from the squared singular values, descending."""
    return (energies.sum() / energies[0]).item() if energies[0] > 0 else 0.0


def effective_rank(energies: Tensor) -> float:
    """Exponential of the entropy of σ / Σσ; takes σ²."""
    sigma = energies.sqrt()
    return torch.special.entr(sigma / sigma.sum()).sum().exp().item() if sigma.sum() > 0 else 0.0


def energy_rank(energies: Tensor, fraction: float) -> int:
    """Smallest number of leading directions that hold `fraction` of ‖ΔW‖²_F, from σ² descending."""
    if energies[0] <= 0:
        return 0
    return rank_for(energies.cumsum(0) / energies.sum(), fraction)


def curvature(inputs: Tensor, outputs: Tensor) -> float:
    """1 − R² of the best linear fit of outputs to inputs: 0 for a line, 0 if either is constant."""
    x, y = inputs.detach().double().flatten(), outputs.detach().double().flatten()
    x, y = x - x.mean(), y - y.mean()
    scale = x.dot(x) * y.dot(y)
    return max(0.0, 1 - (x.dot(y).square() / scale).item()) if scale > 0 else 0.0


class Measure(NamedTuple):
    """A rank measure: its display texts and its function.

    Attributes:
        label: label of axes and headings.
        heading: short label of terminal columns.
        digits: decimal places.
        about: short description.
        compute: squared singular values, descending → the measure.

    """

    label: str
    heading: str
    digits: int
    about: str
    compute: Callable[[Tensor], float]


# Keyed by field name in `RankRow`.
MEASURES = {
    "stable_rank": Measure(
        "stable rank", "stable", 1, "‖ΔW‖² / σ₁²: number of directions as strong as the strongest", stable_rank
    ),
    "effective_rank": Measure(
        "effective rank", "effect.", 1, "exp of the entropy of the singular values", effective_rank
    ),
    "energy90_rank": Measure(
        "energy-90 rank", "e-90", 0, "number of directions that hold 90 % of ‖ΔW‖²", partial(energy_rank, fraction=0.90)
    ),
    "energy99_rank": Measure(
        "energy-99 rank", "e-99", 0, "number of directions that hold 99 % of ‖ΔW‖²", partial(energy_rank, fraction=0.99)
    ),
}
