"""Which ranks a learned update is given, and how good its factors are."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, convert_to_lora, get_peft_model
from torch import nn

from lrlora import LrLoraConfig
from lrlora.adapters import factorize
from lrlora.adapters.factorize import kept_energy, parameters_of_rank, svd_of_product
from lrlora.tuner import LrLoraLayer

from ..conftest import TinyModel


def deltas(model: nn.Module) -> dict[str, torch.Tensor]:
    return {
        path.removeprefix("base_model.model."): layer.get_delta_weight("default")
        for path, layer in model.named_modules()
        if isinstance(layer, LrLoraLayer)
    }


def one_layer(m: int, n: int, r: int = 8) -> Any:
    """A linear layer with a full-rank update: a random BA through a curved φ."""
    torch.manual_seed(0)
    model = get_peft_model(nn.Sequential(nn.Linear(n, m, bias=False)), LrLoraConfig(r=r, target_modules=["0"]))
    layer = model.base_model.model[0]
    with torch.no_grad():
        layer.lrlora_B["default"].weight.normal_(0, 0.02)
        layer.lrlora_phi["default"].amplitude.normal_(0, 0.1)
    return model


@pytest.mark.parametrize("energy", [0.5, 0.9, 0.99, 0.999])
@pytest.mark.parametrize("family", ["bert", "gpt2", "llama"])
def test_equals_peft_s_conversion_at_the_same_energy(train: Callable[..., Any], family: str, energy: float) -> None:
    _, model = train(family)
    config, theirs = convert_to_lora(model, rank=energy)
    for part in factorize(model, energy=energy):
        A, B = (theirs[f"base_model.model.{part.module}.lora_{side}.weight"] for side in "AB")
        assert part.rank == len(A) == config.rank_pattern.get(part.module, config.r)
        # Two SVDs in float32, for Conv1D one of the transpose: singular vectors differ by rounding over the gap.
        assert (part.B @ part.A - B @ A).norm() <= 1e-4 * (B @ A).norm()


def test_says_exactly_how_much_energy_is_kept(train: Callable[..., Any]) -> None:
    _, model = train("llama")
    updates = deltas(model)
    factors = factorize(model, max_rank=3)
    for part in factors:
        delta = updates[part.module]
        lost = (delta - part.B @ part.A).square().sum() / delta.square().sum()
        assert part.rank == 3
        assert part.kept == pytest.approx(1 - lost.item(), abs=1e-5)
    total = sum(delta.square().sum() for delta in updates.values())
    lost = sum((updates[part.module] - part.B @ part.A).square().sum() for part in factors)
    assert kept_energy(factors) == pytest.approx(1 - (lost / total).item(), abs=1e-5)


def test_a_budget_is_kept_to_and_spent_where_it_holds_most(train: Callable[..., Any]) -> None:
    _, model = train("bert")
    budget = parameters_of_rank(model, 3)
    plain = get_peft_model(TinyModel("bert").build(), LoraConfig(r=3, target_modules="all-linear", task_type="SEQ_CLS"))
    assert budget == sum(p.numel() for name, p in plain.named_parameters() if "lora_" in name)
    factors = factorize(model, budget=budget)
    assert sum(part.parameters for part in factors) <= budget
    assert kept_energy(factors) > kept_energy(factorize(model, max_rank=3))
    # No direction that was left out holds more for its parameters than one that was taken.
    taken, left = [], []
    for part in factors:
        worth = torch.linalg.svdvals(deltas(model)[part.module]).square() / part.parameters_per_rank
        taken += worth[: part.rank].tolist()
        left += worth[part.rank : part.rank + 1].tolist()
    assert min(taken) >= max(left) * (1 - 1e-4)


def test_a_small_budget_leaves_modules_out(train: Callable[..., Any]) -> None:
    _, model = train("llama")
    factors = factorize(model, budget=parameters_of_rank(model, 1) // 4)
    assert {part.rank for part in factors} >= {0}
    assert any(part.rank for part in factors)
    assert all(part.kept == 0 for part in factors if not part.rank)


@pytest.mark.parametrize("shape", [(600, 2000), (2000, 600)])
def test_a_large_layer_without_a_full_svd(shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    model = one_layer(*shape)
    delta = deltas(model)["0"]
    exact = torch.linalg.svdvals(delta.double()).square()
    full = torch.linalg.svd
    monkeypatch.setattr(torch.linalg, "svd", lambda a, **options: full(a, **options) if min(a.shape) < 600 else 1 / 0)
    (part,) = factorize(model, max_rank=64)
    lost = (delta - part.B @ part.A).double().square().sum() / exact.sum()
    assert part.kept == pytest.approx(1 - lost.item(), abs=1e-5)
    assert part.kept >= 0.995 * (exact[:64].sum() / exact.sum()).item()
    budget = 70 * sum(shape)  # more than is computed at first
    assert factorize(model, budget=budget)[0].rank == 70
    assert torch.equal(factorize(model, max_rank=64)[0].A, part.A)


@pytest.mark.parametrize("family", ["bert", "gpt2", "llama"])
def test_an_expansion_is_exported_exactly_and_never_formed(
    train: Callable[..., Any], family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, model = train(family, form="expansion", num_terms=4)
    updates = deltas(model)
    monkeypatch.setattr(LrLoraLayer, "get_delta_weight", lambda *_: 1 / 0)
    for part in factorize(model, energy=1.0):
        delta, layer = updates[part.module], model.get_submodule(f"base_model.model.{part.module}")
        assert part.rank <= 2 * 4
        assert (layer._in_layout(part.B @ part.A) - delta).norm() <= 1e-6 * delta.norm()
    for part in factorize(model, max_rank=2):
        best = torch.linalg.svdvals(updates[part.module].double()).square()
        assert part.kept == pytest.approx((best[:2].sum() / best.sum()).item(), abs=1e-6)


@pytest.mark.parametrize(("m", "k", "n"), [(40, 6, 30), (30, 6, 40), (5, 9, 7), (8, 9, 3), (4, 1, 4)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_the_svd_of_a_product(m: int, k: int, n: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    U, V = torch.randn(m, k).to(dtype), torch.randn(k, n).to(dtype)
    left, sigma, right = svd_of_product(U, V)
    product = U.double() @ V.double()
    assert sigma.shape == (min(m, k, n),)
    torch.testing.assert_close(sigma, torch.linalg.svdvals(product)[: len(sigma)])
    torch.testing.assert_close((left * sigma) @ right.T, product)
    for vectors in (left, right):
        torch.testing.assert_close(vectors.T @ vectors, torch.eye(len(sigma), dtype=torch.float64))


def test_zeros_of_the_spectrum_are_not_exported() -> None:
    model = one_layer(40, 30, r=2)
    with torch.no_grad():
        model.base_model.model[0].lrlora_phi["default"].amplitude.zero_()
    (part,) = factorize(model, max_rank=20)
    assert part.rank == 2
    assert factorize(model, energy=1.0)[0].rank == 2


@pytest.mark.refused
@pytest.mark.parametrize(
    ("truncation", "message"),
    [
        ({}, r"energy, budget, .*max_rank .*got none"),
        ({"energy": 0.9, "budget": 100}, "got energy and budget"),
        ({"energy": 0.0}, r"energy .*\(0, 1\], got 0\.0"),
        ({"energy": 1.5}, r"energy .*\(0, 1\], got 1\.5"),
        ({"budget": 10}, r"\b10 parameters .*minimum of 70\b"),
        ({"max_rank": 0}, r"max_rank .*≥ 1, got 0"),
    ],
)
def test_refuses_what_makes_no_sense(truncation: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        factorize(one_layer(40, 30), **truncation)


@pytest.mark.refused
def test_refuses_what_cannot_be_exported(tiny_bert: TinyModel, tmp_path: Path) -> None:
    untrained = get_peft_model(tiny_bert.build(), LrLoraConfig(**tiny_bert.targets))
    with pytest.raises(ValueError, match="updates are zero"):
        factorize(untrained, energy=0.9)
    with pytest.raises(ValueError, match="has no adapter"):
        factorize(tiny_bert.build(), energy=0.9)
    with pytest.raises(ValueError, match=r"'other'.*: default"):
        factorize(untrained, energy=0.9, adapter="other")
    diverged = one_layer(40, 30)
    with torch.no_grad():
        diverged.base_model.model[0].lrlora_B["default"].weight[0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"\b0 contains NaN .*diverged"):
        factorize(diverged, energy=0.9)
    embedding = get_peft_model(tiny_bert.build(), LrLoraConfig(target_modules=["word_embeddings"]))
    with pytest.raises(ValueError, match=r"linear .*\.word_embeddings"):
        factorize(embedding, energy=0.9)
