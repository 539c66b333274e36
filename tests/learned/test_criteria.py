"""Criteria of the ranks at a cut: each passes the same checks. A new one in `rivals.CRITERIA` gets them all."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model

from lrlora.adapters import Factors
from lrlora.learned import LossCurve
from lrlora.learned.directions import Criterion, Directions, directions
from lrlora.lora.live import lora_layers, lora_weights
from lrlora_lab import rivals

from ..conftest import TinyModel
from .test_fitted_ranks import fit, trained, with_lora
from .test_moments import curve_of, language_batches

CRITERIA: dict[str, Criterion] = {"loss": LossCurve.within, **rivals.CRITERIA}


@pytest.fixture(params=CRITERIA)
def criterion(request: pytest.FixtureRequest) -> Criterion:
    return CRITERIA[request.param]


@pytest.fixture(scope="module")
def adapter() -> Any:
    """A tiny language model that has learned two sentences by heart, with unlike ranks."""
    tiny = TinyModel("llama")
    config = LoraConfig(r=4, lora_alpha=8, rank_pattern={"v_proj": 3}, target_modules="all-linear")
    model = get_peft_model(tiny.build(), config)
    optimizer = torch.optim.AdamW(trained(model), lr=1e-2)
    for _ in range(40):
        model(**language_batches(tiny)[0]).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


@pytest.fixture(scope="module")
def curve(adapter: Any) -> LossCurve:
    return curve_of(adapter, language_batches(TinyModel("llama")))


def budget_of(curve: LossCurve, rank: int) -> int:
    return sum(rank * of.whole.parameters_per_rank for of in curve.modules)


def size_of(factors: list[Factors]) -> int:
    return sum(part.parameters for part in factors)


def require_fitting(factors: list[Factors], curve: LossCurve, budget: int, max_rank: int | None) -> None:
    """What `FittedRanks` asks of a criterion, and what the factors say of themselves."""
    assert [part.module for part in factors] == [of.whole.module for of in curve.modules]
    assert 0 < size_of(factors) <= budget
    for part, of in zip(factors, curve.modules, strict=True):
        whole = of.whole.B @ of.whole.A
        assert part.rank <= min(max_rank or 4, of.whole.rank)
        if of.whole.energy:
            lost = (whole - part.B @ part.A).square().sum() / whole.square().sum()
            assert part.kept == pytest.approx(1 - lost.item(), abs=1e-4)
        assert torch.allclose(part.A.norm(dim=1), part.B.norm(dim=0), rtol=1e-3)  # for half precision


@pytest.mark.parametrize("max_rank", [None, 1, 2])
def test_it_keeps_to_the_size_and_the_largest_rank(
    criterion: Criterion, curve: LossCurve, max_rank: int | None
) -> None:
    for rank in (1, 2, 3, 4):
        budget = budget_of(curve, rank)
        require_fitting(criterion(curve, budget, max_rank), curve, budget, max_rank)


def test_more_parameters_never_predict_a_larger_loss(criterion: Criterion, curve: LossCurve) -> None:
    chosen = [criterion(curve, budget_of(curve, rank), None) for rank in (1, 2, 3, 4)]
    rises = [curve.predicted_rise(factors) for factors in chosen]
    assert rises == sorted(rises, reverse=True)
    assert rises[0] > rises[-1] == pytest.approx(0, abs=1e-9 * rises[0])
    assert size_of(chosen[-1]) <= curve.parameters


def test_how_an_update_is_split_does_not_matter(criterion: Criterion, adapter: Any, curve: LossCurve) -> None:
    model = copy.deepcopy(adapter)
    for layer in lora_layers(model, "default").values():
        A, B = lora_weights(layer, "default")
        turn = torch.eye(len(A)) + 0.5 * torch.ones(len(A), len(A)).tril(-1)
        A.data, B.data = turn @ A.data, B.data @ turn.inverse()
    other = curve_of(model, language_batches(TinyModel("llama")))
    for one, two in zip(*(criterion(of, budget_of(of, 2), None) for of in (curve, other)), strict=True):
        assert one.rank == two.rank
        torch.testing.assert_close(one.B @ one.A, two.B @ two.A, rtol=1e-3, atol=1e-4)


def test_the_unit_of_the_loss_does_not_matter(criterion: Criterion, curve: LossCurve) -> None:
    other = LossCurve([replace(of, rises=1024 * of.rises) for of in curve.modules])
    ranks = [[part.rank for part in criterion(of, budget_of(of, 2), None)] for of in (curve, other)]
    assert ranks[0] == ranks[1]


@pytest.mark.parametrize("is_zero", [False, True])
def test_a_module_that_no_gradient_reached(criterion: Criterion, curve: LossCurve, is_zero: bool) -> None:
    def idle(part: Factors) -> Directions:
        return directions(replace(part, B=0 * part.B, energy=0.0) if is_zero else part, None, 1)

    other = LossCurve([idle(of.whole) if of.whole.module.endswith("up_proj") else of for of in curve.modules])
    budget = budget_of(other, 2)
    require_fitting(criterion(other, budget, None), other, budget, None)


@pytest.mark.parametrize("max_rank", [None, 1])
def test_an_adapter_is_cut_while_it_trains(criterion: Criterion, max_rank: int | None, tmp_path: Path) -> None:
    tiny, model = with_lora("llama")
    wide = sum(p.numel() for p in trained(model))
    learned = fit(tiny, model, max_rank=max_rank, criterion=criterion)
    assert learned.ranks is not None
    assert max(learned.ranks.values()) <= (max_rank or 8)
    assert 0 < sum(p.numel() for p in trained(model)) == learned.parameters <= wide / 4
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny.build(), tmp_path).eval()
    assert torch.equal(tiny.logits(loaded), tiny.logits(model))


@pytest.mark.parametrize(
    ("max_rank", "criterion", "told"),
    [
        (None, lambda curve, budget, _: curve.within(2 * budget, None), "got .* parameters"),
        (1, lambda curve, budget, _: curve.within(budget, None), "max_rank=1, got .* largest rank of [2-9]"),
        (1, lambda curve, *limits: curve.within(*limits)[::-1], r"in the order of curve\.modules"),
        (1, lambda curve, *limits: curve.within(*limits)[1:], "factors of all modules"),
    ],
)
def test_one_that_does_not_is_refused_and_nothing_is_cut(max_rank: int | None, criterion: Any, told: str) -> None:
    tiny, model = with_lora("llama")
    before = sum(p.numel() for p in trained(model))
    with pytest.raises(ValueError, match=f"criterion must .*{told}"):
        fit(tiny, model, max_rank=max_rank, criterion=criterion)
    assert sum(p.numel() for p in trained(model)) == before
