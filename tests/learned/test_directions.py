"""What is kept of an adapter by what the loss says, and the search for the smallest size."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from lrlora.adapters import Factors, factorize
from lrlora.learned import Kept, LossCurve, energy_curve, model_loss, smallest
from lrlora.lora.live import lora_factors, put

from ..conftest import TinyModel
from .test_moments import curve_of, language_batches, loss_with


def as_it_is(model: Any, batch: Any) -> tuple[Tensor, Tensor]:
    """The model's loss, whose labels are not sampled where they are learned by heart."""
    return model_loss(model, batch)


@pytest.fixture(scope="module")
def trained() -> tuple[TinyModel, Any, list[Factors], LossCurve]:
    """A tiny language model that has learned two sentences by heart, and the curve of its adapter."""
    tiny = TinyModel("llama")
    model = get_peft_model(tiny.build(), LoraConfig(r=4, lora_alpha=8, target_modules="all-linear"))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(40):
        optimizer.zero_grad()
        model(**language_batches(tiny)[0]).loss.backward()
        optimizer.step()
    return tiny, model, lora_factors(model, "default"), curve_of(model, language_batches(tiny), as_it_is)


class TwoSides(nn.Module):
    """A linear layer, half of whose inputs are always zero."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 4, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x * torch.tensor([1.0] * 4 + [0.0] * 4))


def loss_of(model: Any, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    return F.cross_entropy(model(batch[0]), batch[1], reduction="none"), torch.ones(len(batch[1]))


def test_factors_stay_when_the_live_adapter_changes(trained: tuple[TinyModel, Any, list[Factors], LossCurve]) -> None:
    model = copy.deepcopy(trained[1])
    factors = lora_factors(model, "default")
    copies = copy.deepcopy(factors)
    put(model, "default", [module.factors(0) for module in trained[3].modules])
    for pair, expected in zip(factors, copies, strict=True):
        assert torch.equal(pair.A, expected.A)
        assert torch.equal(pair.B, expected.B)


def test_what_is_large_and_never_used_goes_first() -> None:
    torch.manual_seed(0)
    model = get_peft_model(TwoSides(), LoraConfig(r=2, lora_alpha=2, target_modules=["layer"]))
    layer = model.base_model.model.layer
    with torch.no_grad():
        layer.lora_A["default"].weight.copy_(torch.tensor([[1.0] * 4 + [0.0] * 4, [0.0] * 4 + [1.0] * 4]))
        layer.lora_B["default"].weight.copy_(torch.tensor([[1.0, -1, 1, -1], [9.0, 9, -9, -9]]).T)
    x = torch.randn(64, 8)
    batches = [(x, model(x).argmax(-1))]
    as_it_was = loss_with(model, lora_factors(model, "default"), batches, loss_of)
    by_loss = curve_of(model, batches, loss_of).within(12)
    by_energy = energy_curve(lora_factors(model, "default")).within(12)
    for found, expected in zip(by_energy, factorize(model, budget=12), strict=True):
        torch.testing.assert_close(found.B @ found.A, expected.B @ expected.A)
    assert [part.rank for part in (*by_loss, *by_energy)] == [1, 1]
    assert loss_with(model, by_loss, batches, loss_of) < as_it_was + 0.02  # damping leaves a trace of it
    assert loss_with(model, by_energy, batches, loss_of) > as_it_was + 0.1
    assert by_loss[0].kept < 0.1


@pytest.mark.parametrize("keep", [0.9, 0.5, 0.1])
def test_the_smallest_size_is_between_two_that_were_measured(
    trained: tuple[TinyModel, Any, list[Factors], LossCurve], keep: float
) -> None:
    *_, curve = trained
    measured: list[int] = []

    def measure(factors: Sequence[Factors]) -> Kept:
        measured.append(sum(part.parameters for part in factors))
        share = measured[-1] / curve.parameters
        return Kept(1.0, share, 1.0)  # the lower bound decides

    chosen, points = smallest(curve, measure, keep)
    size = sum(part.parameters for part in chosen)
    assert size / curve.parameters >= keep
    beyond = max((point.parameters for point in points if point.kept.low < keep), default=0)
    # The next step down is one direction, or a few percent.
    assert size - beyond <= max(0.06 * size, 2 * 96)
    assert len(measured) == len(set(measured)) <= 12
    assert [point.parameters for point in points] == sorted(measured, reverse=True)


@pytest.mark.refused
def test_a_share_that_nothing_keeps(trained: tuple[TinyModel, Any, list[Factors], LossCurve]) -> None:
    *_, curve = trained
    with pytest.raises(ValueError, match=r"all directions, 98\.0% \(97\.0% to 99\.0%\).*\b0\.975 "):
        smallest(curve, lambda factors: Kept(0.98, 0.97, 0.99), 0.975)


def test_a_budget_that_the_first_direction_exceeds_goes_to_others(
    trained: tuple[TinyModel, Any, list[Factors], LossCurve],
) -> None:
    *_, curve = trained
    for budget in (curve.fewest, curve.fewest + 10):
        assert sum(part.rank for part in curve.within(budget)) == 1
    with pytest.raises(ValueError, match=r"\b5 parameters .*minimum of 64\b"):
        curve.within(5)


def test_the_unit_of_the_loss_does_not_matter(trained: tuple[TinyModel, Any, list[Factors], LossCurve]) -> None:
    """Damping too is a share of what is there."""
    tiny, model, _, curve = trained

    def scaled(base: nn.Module, batch: Any) -> tuple[Tensor, Tensor]:
        value, terms = model_loss(base, batch)
        return 1024 * value, terms  # a power of two, which does not round

    other = curve_of(model, language_batches(tiny), scaled)
    for one, two in zip(curve.modules, other.modules, strict=True):
        expected = 1024**2 * one.rises
        torch.testing.assert_close(two.rises, expected, rtol=1e-5, atol=1e-7 * expected.max().item())
        assert torch.allclose(two.B @ two.A, one.B @ one.A, atol=1e-5)


def test_a_search_ends_after_twelve_measurements() -> None:
    measured: list[int] = []

    def measure(factors: Sequence[Factors]) -> Kept:
        measured.append(sum(part.parameters for part in factors))
        return Kept(1.0, 1.0, 1.0)

    torch.manual_seed(0)
    model = get_peft_model(
        nn.Sequential(*(nn.Linear(64, 64) for _ in range(160))),
        LoraConfig(r=64, init_lora_weights=False, target_modules=[str(i) for i in range(160)]),
    )
    smallest(energy_curve(factorize(model, energy=1.0)), measure, 0.5)
    assert len(measured) == 12
