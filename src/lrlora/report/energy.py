"""How much of the energy of all updates together would be kept at a smaller size, from the spectra of a report.

As in `export.factorize(budget=...)`, the singular values of all modules compete: one rank of an m × n module costs
m + n parameters, and the best σ² / (m + n) are taken first, as long as the sum fits.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..rank import RankReport, Spectrum

SIZES = 60


class Kept(NamedTuple):
    """What a run keeps at one size.

    Attributes:
        share: of ‖ΔW‖²_F of all modules together.
        parameters: that it takes, at most as many as it may.
        smallest, mean, largest: rank of a module.

    """

    share: float
    parameters: int
    smallest: int
    mean: float
    largest: int


def kept_over_size(reports: Sequence[RankReport], sizes: int = SIZES) -> tuple[list[int], list[list[Kept]]]:
    """At most so many budgets of parameters, and what each report keeps at each of them.

    The budgets are the same for all reports and evenly spaced on a logarithmic axis, from one at which each of them
    keeps something to one at which each keeps all. Of a report without spectra nothing is known, and its list is empty.
    """
    greedy = [_Greedy(report) for report in reports]
    known = [run for run in greedy if len(run.spent)]
    if not known:
        return [], [[] for _ in reports]
    first, last = max(run.spent[0] for run in known), max(run.spent[-1] for run in known)
    budgets = sorted({_round_up(budget) for budget in np.geomspace(first, last, sizes).tolist()})
    return budgets, [[run.within(budget) for budget in budgets] if len(run.spent) else [] for run in greedy]


def singular_values(spectrum: Spectrum) -> NDArray[np.float64]:
    """All of them: log σ of those that a spectrum leaves out is taken as linear in log number between two it has."""
    if not spectrum.number:
        return np.zeros(0)
    number, sigma = np.log(spectrum.number), np.log(spectrum.sigma)
    return np.exp(np.interp(np.log(np.arange(1, spectrum.number[-1] + 1)), number, sigma))


class _Greedy:
    """The order in which the ranks of all modules are taken.

    Attributes:
        owner: module of each.
        held, spent: energy and parameters of it and all before it.

    """

    def __init__(self, report: RankReport) -> None:
        self.modules = len(report.rows)
        prices = [row.m + row.n for row in report.rows]
        spectra = [report.spectra.get(row.module, Spectrum([], [])) for row in report.rows]
        energies = [singular_values(spectrum) ** 2 for spectrum in spectra]
        owner = np.repeat(np.arange(self.modules), [len(values) for values in energies])
        energy, price = np.concatenate(energies), np.array(prices)[owner]
        order = np.argsort(-energy / price, kind="stable")
        self.owner, self.held, self.spent = owner[order], energy[order].cumsum(), price[order].cumsum()

    def within(self, budget: int) -> Kept:
        taken = int(np.searchsorted(self.spent, budget, side="right"))
        ranks = np.bincount(self.owner[:taken], minlength=self.modules)
        return Kept(
            share=float(self.held[taken - 1] / self.held[-1]) if taken else 0.0,
            parameters=int(self.spent[taken - 1]) if taken else 0,
            smallest=int(ranks.min()),
            mean=float(ranks.mean()),
            largest=int(ranks.max()),
        )


def _round_up(budget: float) -> int:
    """To three digits: a number that is easy to copy, and no less."""
    whole = math.ceil(budget)
    step = 10 ** max(0, len(str(whole)) - 3)
    return -(-whole // step) * step
