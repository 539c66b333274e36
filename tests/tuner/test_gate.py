"""Gates on the factors: closed by the penalty, exactly, whatever drives the optimizer; and dropped at the end."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn

from lrlora import LrLoraConfig, rank_report
from lrlora.tuner import LrLoraLayer
from lrlora.tuner.gate import LR_MULTIPLIER, Gate

from ..conftest import TinyModel

R = 6


def adapted(tiny: TinyModel, penalty: float, **options: Any) -> Any:
    torch.manual_seed(0)
    return get_peft_model(tiny.build(), LrLoraConfig(r=R, rank_penalty=penalty, **{**tiny.targets, **options}))


def gates(model: nn.Module) -> list[Tensor]:
    return [module.values().detach() for module in model.modules() if isinstance(module, Gate)]


def close_half(model: nn.Module) -> None:
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, Gate):
                module.weight[::2] = -1.0


def fit(penalty: float, steps: int = 600, accumulate: int = 1, scale: float = 1.0) -> Any:
    """A linear layer trained on batches whose targets an update of rank 2 explains, up to noise."""
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(24, 16, bias=False))
    nn.init.zeros_(base[0].weight)
    model = get_peft_model(base, LrLoraConfig(r=R, lora_alpha=R, target_modules=["0"], rank_penalty=penalty))
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=5e-3, eps=1e-12)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, max(1, steps))
    generator = torch.Generator().manual_seed(0)
    wanted = torch.randn(24, 2, generator=generator) @ torch.randn(2, 16, generator=generator) / 5
    for _ in range(steps):
        x = torch.randn(32, 24, generator=generator)
        y = x @ wanted + 0.1 * torch.randn(32, 16, generator=generator)
        optimizer.zero_grad()
        for part_x, part_y in zip(x.chunk(accumulate), y.chunk(accumulate), strict=True):
            loss = (model(part_x) - part_y).square().mean() / accumulate
            (scale * loss).backward()
        optimizer.step()
        schedule.step()
    x = torch.randn(512, 24, generator=generator)
    with torch.no_grad():
        model.error = ((model(x) - x @ wanted).norm() / (x @ wanted).norm()).item()
    return model


def test_without_a_penalty_there_is_no_gate(tiny: TinyModel) -> None:
    assert not any("lrlora_gate" in name for name in adapter_names(adapted(tiny, 0.0)))


def adapter_names(model: nn.Module) -> list[str]:
    return [name for name, _ in model.named_parameters() if "lrlora_" in name]


def test_open_gates_change_nothing(tiny: TinyModel) -> None:
    model = adapted(tiny, 0.5)
    torch.testing.assert_close(tiny.logits(model), tiny.logits(tiny.build()), rtol=0, atol=0)
    plain = adapted(tiny, 0.0)
    for each in (model, plain):
        with torch.no_grad():
            for name, parameter in each.named_parameters():
                if "lrlora_B" in name:
                    parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)) / 100)
    torch.testing.assert_close(tiny.logits(model), tiny.logits(plain), rtol=1e-5, atol=1e-5)
    for a, b in zip(gradients(tiny, model), gradients(tiny, plain), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-6)


def gradients(tiny: TinyModel, model: nn.Module) -> list[Tensor]:
    parameters = [p for name, p in model.named_parameters() if "lrlora_" in name and "lrlora_gate" not in name]
    return list(torch.autograd.grad(tiny.loss(model), parameters))


def test_the_penalty_finds_the_rank_of_the_task() -> None:
    free, held = fit(0.0), fit(0.5)
    assert rank_report(free).rows[0].active_factors == R
    assert rank_report(held).rows[0].active_factors == 2
    assert held.error < 0.03
    assert (gates(held)[0] == 0).sum() == R - 2  # exactly


def test_a_stronger_penalty_leaves_fewer_factors() -> None:
    left = [rank_report(fit(penalty)).rows[0].active_factors for penalty in (0.05, 0.3, 0.6, 20.0)]
    assert left[0] == R
    assert left[-1] == 0
    assert left == sorted(left, reverse=True)


@pytest.mark.parametrize(("accumulate", "scale"), [(4, 1.0), (1, 1024.0), (1, 1 / 64)])
def test_accumulation_and_loss_scale_do_not_matter(accumulate: int, scale: float) -> None:
    expected, actual = gates(fit(0.5, steps=30)), gates(fit(0.5, steps=30, accumulate=accumulate, scale=scale))
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-3)


def test_a_step_that_the_grad_scaler_skips_closes_nothing() -> None:
    model = fit(0.3, steps=0)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=5e-3)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    scaler.scale(model(torch.randn(8, 24)).square().sum() * float("inf")).backward()
    scaler.step(optimizer)
    scaler.update()
    assert (gates(model)[0] == 1).all()


def test_a_fused_optimizer_that_skips_its_step_itself_closes_nothing() -> None:
    model = fit(0.3, steps=0)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=5e-3, fused=True)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    scaler.scale(model(torch.randn(8, 24)).square().sum() * float("inf")).backward()
    scaler.step(optimizer)
    scaler.update()
    assert (gates(model)[0] == 1).all()


def test_gates_of_an_adapter_that_is_not_trained_stay(tiny_bert: TinyModel) -> None:
    model = adapted(tiny_bert, 0.5)
    model.add_adapter("other", LrLoraConfig(r=R, rank_penalty=0.5, **tiny_bert.targets))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(3):
        optimizer.zero_grad()
        tiny_bert.loss(model).backward()
        optimizer.step()
    weights = {name: p for name, p in model.named_parameters() if "lrlora_gate" in name}
    assert all((p == 0).all() == ("other" in name) for name, p in weights.items())


def test_the_penalty_follows_the_learning_rate_and_survives_a_copy() -> None:
    model = copy.deepcopy(fit(0.5, steps=0))
    (gate,) = (module for module in model.modules() if isinstance(module, Gate))
    optimizer = torch.optim.SGD(gate.parameters(), lr=0.02)
    gate.weight.grad = torch.zeros_like(gate.weight)
    optimizer.step()
    torch.testing.assert_close(gate.values().detach(), torch.full((R,), 1 - LR_MULTIPLIER * 0.02 * 0.5))


def test_weights_of_other_parameters_are_left_alone() -> None:
    parameter = nn.Parameter(torch.ones(3))
    parameter.grad = torch.zeros(3)
    torch.optim.SGD([parameter], lr=1.0).step()
    assert (parameter == 1).all()


def test_closed_factors_are_dropped_and_the_update_stays(tiny: TinyModel, tmp_path: Path) -> None:
    model = adapted(tiny, 0.1)
    tiny.train(model, 4)
    close_half(model)
    expected, size = tiny.logits(model), len(adapter_names(model))
    model.base_model.drop_inactive_factors()
    torch.testing.assert_close(tiny.logits(model), expected, rtol=1e-5, atol=1e-5)
    assert len(adapter_names(model)) < size
    layers = [layer for layer in model.modules() if isinstance(layer, LrLoraLayer)]
    assert all(layer.r["default"] == R // 2 for layer in layers if not hasattr(layer, "parameter_name"))
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny.build(), tmp_path)
    torch.testing.assert_close(tiny.logits(loaded), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("use_rslora", [False, True])
def test_a_module_may_lose_all_its_factors(tiny_bert: TinyModel, tmp_path: Path, use_rslora: bool) -> None:
    model = adapted(tiny_bert, 0.1, use_rslora=use_rslora, rank_pattern={"query": 4}, alpha_pattern={"value": 16})
    tiny_bert.train(model, 4)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lrlora_gate" in name:
                parameter.fill_(-1.0 if "key" in name else 0.0)
    expected = tiny_bert.logits(model)
    rows = {row.module: row.active_factors for row in rank_report(model).rows}
    assert {rank for module, rank in rows.items() if module.endswith("key")} == {0}
    assert {rank for module, rank in rows.items() if module.endswith("query")} == {4}
    model.base_model.drop_inactive_factors()
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny_bert.build(), tmp_path)
    torch.testing.assert_close(tiny_bert.logits(loaded), expected, rtol=1e-5, atol=1e-5)


def test_gates_are_saved_and_loaded_while_training_goes_on(tiny_bert: TinyModel, tmp_path: Path) -> None:
    model = adapted(tiny_bert, 0.1)
    close_half(model)
    tiny_bert.train(model, 2)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny_bert.build(), tmp_path, is_trainable=True)
    for got, want in zip(gates(loaded), gates(model), strict=True):
        assert torch.equal(got, want)
    torch.testing.assert_close(tiny_bert.logits(loaded), tiny_bert.logits(model))


def test_gates_stay_float32(tiny_bert: TinyModel) -> None:
    model = adapted(tiny_bert, 0.1).to(torch.bfloat16)
    tiny_bert.logits(model)
    assert all(p.dtype == torch.float32 for name, p in model.named_parameters() if "lrlora_gate" in name)


@pytest.mark.refused
def test_refuses_what_makes_no_sense(tiny_bert: TinyModel) -> None:
    for wrong in (-0.1, float("nan"), float("inf"), "much"):
        with pytest.raises(ValueError, match="rank_penalty must be a finite number ≥ 0"):
            LrLoraConfig(rank_penalty=wrong)
    with pytest.raises(ValueError, match="no adapter named 'other'"):
        adapted(tiny_bert, 0.1).base_model.drop_inactive_factors("other")
