"""What is kept at a smaller size, against the allocation that `factorize` makes and one made step by step."""

from __future__ import annotations

import random

import pytest
import torch
from peft import get_peft_model

from lrlora import LrLoraConfig, RankReport, rank_report
from lrlora.adapters import factorize
from lrlora.adapters.factorize import kept_energy
from lrlora.ranks import RankRow, Spectrum
from lrlora.ranks.report import _thinned
from lrlora.views.page import kept_over_size, singular_values

from ..conftest import TinyModel


def report_of(sigmas: list[list[float]], shapes: list[tuple[int, int]]) -> RankReport:
    rows = [
        RankRow(str(i), i, "type", "mlp", m, n, 4, 1.0, 1.0, 1, 1, None, 0.0, 0.0, 4) for i, (m, n) in enumerate(shapes)
    ]
    spectra = {str(i): Spectrum(list(range(1, len(s) + 1)), s) for i, s in enumerate(sigmas) if s}
    return RankReport(rows, spectra=spectra)


def step_by_step(sigmas: list[list[float]], shapes: list[tuple[int, int]], budget: int) -> list[int]:
    """Ranks: again and again, the best next one of any module that could fit at all, until it no longer fits."""
    ranks, fitting = [0] * len(sigmas), [i for i, shape in enumerate(shapes) if sum(shape) <= budget]
    while True:
        open_ones = [i for i in fitting if ranks[i] < len(sigmas[i])]
        if not open_ones:
            return ranks
        best = max(open_ones, key=lambda i: sigmas[i][ranks[i]] ** 2 / sum(shapes[i]))
        budget -= sum(shapes[best])
        if budget < 0:
            return ranks
        ranks[best] += 1


@pytest.mark.parametrize("seed", range(5))
def test_ranks_are_those_of_a_greedy_choice(seed: int) -> None:
    chance = random.Random(seed)
    shapes = [(chance.randint(4, 60), chance.randint(4, 60)) for _ in range(7)]
    # One module is untouched.
    sigmas = [sorted((chance.random() for _ in range(chance.randint(1, 20))), reverse=True) for _ in shapes[1:]] + [[]]
    budgets, [kept] = kept_over_size([report_of(sigmas, shapes)])
    whole = sum(value**2 for sigma in sigmas for value in sigma)
    assert len(budgets) > 40
    for budget, (share, parameters, smallest, mean, largest) in zip(budgets, kept, strict=True):
        ranks = step_by_step(sigmas, shapes, budget)
        energy = sum(value**2 for sigma, rank in zip(sigmas, ranks, strict=True) for value in sigma[:rank])
        assert share == round(energy / whole, 5)
        assert parameters == sum(rank * sum(shape) for rank, shape in zip(ranks, shapes, strict=True)) <= budget
        assert (smallest, largest) == (min(ranks), max(ranks))
        assert mean == round(sum(ranks) / len(ranks), 2)
    assert kept[0][0] > 0
    assert kept[-1][0] == 1


def test_ranks_and_energy_are_those_of_the_export() -> None:
    tiny = TinyModel("llama")
    model = get_peft_model(tiny.build(), LrLoraConfig(r=2, phi_lr_multiplier=100, **tiny.targets))
    tiny.train(model, 5)
    budgets, [kept] = kept_over_size([rank_report(model)])
    for budget, (share, parameters, _, mean, _) in list(zip(budgets, kept, strict=True))[:-1:8]:
        factors = factorize(model, budget=budget)
        ranks = [part.rank for part in factors]
        assert parameters == pytest.approx(sum(part.parameters for part in factors), rel=0.02, abs=100)
        assert share == pytest.approx(kept_energy(factors), abs=1e-3)
        assert mean == pytest.approx(sum(ranks) / len(ranks), abs=0.1)


def test_a_thinned_spectrum_is_filled_in() -> None:
    number = torch.arange(1, 1001, dtype=torch.float64)
    sigma = number**-0.7 * torch.exp(-number / 600)
    thinned = _thinned(sigma, [])
    assert len(thinned.number) < 100
    filled = singular_values(thinned)
    torch.testing.assert_close(filled, sigma, rtol=5e-3, atol=0)
    torch.testing.assert_close(filled.square().cumsum(0), sigma.square().cumsum(0), rtol=1e-3, atol=0)


def test_all_runs_are_asked_at_the_same_sizes() -> None:
    small, large = report_of([[1.0]], [(3, 4)]), report_of([[2.0, 1.0], [1.0] * 30], [(300, 400), (30, 40)])
    budgets, kept = kept_over_size([small, RankReport(small.rows), large])
    assert budgets == sorted(set(budgets))
    assert len(budgets) <= 60
    assert budgets[0] >= 70
    assert [len(points) for points in kept] == [len(budgets), 0, len(budgets)]
    assert {(share, parameters) for share, parameters, *_ in kept[0]} == {(1, 7)}
    assert kept[2][0][0] > 0
    assert kept[2][-1][0] == 1


def test_without_spectra_there_is_nothing_to_tell() -> None:
    assert kept_over_size([report_of([[]], [(3, 4)])]) == ([], [[]])
