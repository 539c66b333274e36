"""Share of the updates' total energy that an export keeps at smaller sizes, from the spectra of a report."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..adapters.factorize import best_per_parameter
from ..ranks import RankReport, Spectrum

SIZES = 60


class Kept(NamedTuple):
    """What a run keeps at one size.

    Attributes:
        share: share of ‖ΔW‖²_F, all modules together.
        parameters: parameters used, at most the budget.
        smallest, mean, largest: rank of a module.

    """

    share: float
    parameters: int
    smallest: int
    mean: float
    largest: int


def kept_over_size(reports: Sequence[RankReport], sizes: int = SIZES) -> tuple[list[int], list[list[Kept]]]:
    """At most `sizes` parameter budgets, and what `factorize(budget=...)` keeps of each report at each budget.

    The budgets are shared by all reports and log-spaced, from one rank of a module to all ranks of the largest report.
    A report without spectra has an empty list.
    """
    energies, costs = [_energies(report) for report in reports], [_costs(report) for report in reports]
    known = [(e, c) for e, c in zip(energies, costs, strict=True) if any(map(len, e))]
    if not known:
        return [], [[] for _ in reports]
    first = max(min(cost for values, cost in zip(*run, strict=True) if len(values)) for run in known)
    last = max(sum(len(values) * cost for values, cost in zip(*run, strict=True)) for run in known)
    budgets = sorted({_round_up(budget) for budget in np.geomspace(first, last, sizes).tolist()})
    return budgets, [
        [_kept(e, c, budget) for budget in budgets] if any(map(len, e)) else []
        for e, c in zip(energies, costs, strict=True)
    ]


def singular_values(spectrum: Spectrum) -> Tensor:
    """All singular values; omitted ones are interpolated linearly in log σ over log number."""
    if not spectrum.number:
        return torch.zeros(0, dtype=torch.float64)
    number, sigma = np.log(spectrum.number), np.log(spectrum.sigma)
    return torch.from_numpy(np.exp(np.interp(np.log(np.arange(1, spectrum.number[-1] + 1)), number, sigma)))


def _energies(report: RankReport) -> list[Tensor]:
    spectra = [report.spectra.get(row.module, Spectrum([], [])) for row in report.rows]
    return [singular_values(spectrum).square() for spectrum in spectra]


def _costs(report: RankReport) -> list[int]:
    return [row.m + row.n for row in report.rows]


def _kept(energies: Sequence[Tensor], costs: Sequence[int], budget: int) -> Kept:
    ranks = best_per_parameter(energies, costs, budget)
    held = sum(values[:rank].sum().item() for values, rank in zip(energies, ranks, strict=True))
    return Kept(
        share=held / sum(values.sum().item() for values in energies),
        parameters=sum(rank * cost for rank, cost in zip(ranks, costs, strict=True)),
        smallest=min(ranks),
        mean=sum(ranks) / len(ranks),
        largest=max(ranks),
    )


def _round_up(budget: float) -> int:
    """Round up to three digits, which are easy to copy."""
    whole = math.ceil(budget)
    step = 10 ** max(0, len(str(whole)) - 3)
    return -(-whole // step) * step
