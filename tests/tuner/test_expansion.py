"""Expansions in the place of φ, as a PEFT user meets them: every family, every kind of layer."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from torch.func import functional_call

import lrlora
from lrlora import LrLoraConfig
from lrlora.ops.reference import reference_expansion_delta
from lrlora.tuner import LrLoraLayer

from ..conftest import TinyModel

EXPANSION: dict[str, Any] = {"form": "expansion", "num_terms": 4}


def adapt(tiny: TinyModel, **fields: Any) -> Any:
    torch.manual_seed(1)
    return get_peft_model(tiny.build(), LrLoraConfig(**{"r": 2, **tiny.targets, **fields})).eval()


def test_life_of_an_adapter(tiny: TinyModel, tmp_path: Path) -> None:
    """Starts as the base model, trains everything, reloads to the bit, is measured, merges and unmerges."""
    model, base = adapt(tiny, **EXPANSION), tiny.logits(tiny.build())
    assert torch.equal(tiny.logits(model), base)
    before = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    tiny.train(model, 5)
    assert [name for name, p in model.named_parameters() if name in before and torch.equal(p, before[name])] == []
    trained = tiny.logits(model)
    model.save_pretrained(tmp_path)
    assert torch.equal(tiny.logits(PeftModel.from_pretrained(tiny.build(), tmp_path).eval()), trained)
    with torch.no_grad(), lrlora.cached_weights(model):
        assert torch.allclose(tiny.logits(model), trained, atol=1e-5)
    report = lrlora.rank_report(model)
    assert report.curves == {}
    assert all(row.stable_rank > 0 for row in report.rows)
    model.merge_adapter()
    assert torch.allclose(tiny.logits(model), trained, atol=1e-5)
    model.unmerge_adapter()
    assert torch.equal(tiny.logits(model.unload()), base)


def test_gradients_are_those_of_the_formula(tiny: TinyModel) -> None:
    """The whole model's, in float64, against autograd of W + ΔW written out."""
    model = adapt(tiny, **EXPANSION).double()
    inputs = {name: x.double() if x.is_floating_point() else x for name, x in tiny.inputs().items()}
    weights, factors = {}, []
    for path, layer in model.get_base_model().named_modules():
        if isinstance(layer, LrLoraLayer):
            nn.init.normal_(layer.lrlora_B["default"].weight, std=0.1)
            A, B, made = layer._factors("default")
            factors += layer.adapter_parameters("default")
            delta = reference_expansion_delta(A, B, made, scaling=layer.scaling["default"])
            weights[f"{path}.weight"] = layer.get_base_layer().weight + layer._in_layout(delta)
    base = tiny.build().double()
    if tiny.family == "mixtral":  # its fast experts know no float64
        for network in (base, model.get_base_model()):
            network.set_experts_implementation("eager")
    gradients = []
    for output in (model(**inputs), functional_call(base, weights, kwargs=inputs, tie_weights=False)):
        found = getattr(output, "logits", getattr(output, "last_hidden_state", output))
        target = torch.randn(found.shape, dtype=found.dtype, generator=torch.Generator().manual_seed(2))
        gradients.append(torch.autograd.grad((found - target).square().mean(), factors, materialize_grads=True))
    for ours, expected in zip(*gradients, strict=True):
        assert (ours - expected).norm() <= 1e-10 * expected.norm()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("autocast", [False, True])
def test_half_precision_is_as_near_as_the_same_update_as_lora(dtype: torch.dtype, autocast: bool) -> None:
    """But for the rounding of V, U and h in bfloat16, where PEFT multiplies in float32: 0.17 % each."""
    torch.manual_seed(0)
    base, x = nn.Linear(512, 384).to(dtype), torch.randn(256, 512).to(dtype)
    model = get_peft_model(nn.Sequential(copy.deepcopy(base)), LrLoraConfig(r=2, target_modules=["0"], **EXPANSION))
    lora = get_peft_model(nn.Sequential(base), LoraConfig(r=8, lora_alpha=8, target_modules=["0"]))
    ours, theirs = model.base_model.model[0], lora.base_model.model[0]
    with torch.no_grad():
        ours.lrlora_B["default"].weight.normal_(0, 0.04)
        U, V = ours.thin_factors("default")
        theirs.lora_A["default"].weight.copy_(V)
        theirs.lora_B["default"].weight.copy_(U)
        update = x.double() @ ours.get_delta_weight("default").double().T
        errors = []
        for layer in (ours, theirs):
            with torch.autocast("cpu", dtype=dtype, enabled=autocast):
                found = layer(x).double() - layer.base_layer(x).double()
            errors.append((found - update).norm() / update.norm())
    rounding = 0.003 if dtype == torch.bfloat16 and not autocast else 0.0
    assert errors[0] <= 1.02 * math.hypot(errors[1], rounding) < 0.1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_update_of_half_precision_factors_is_float32(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(64, 48)).to(dtype)
    config = LrLoraConfig(r=2, target_modules=["0"], form="expansion")
    model = get_peft_model(base, config, autocast_adapter_dtype=False)
    layer: Any = model.base_model.model[0]
    with torch.no_grad():
        layer.lrlora_B["default"].weight.normal_(0, 0.1)
        A, B, phi = layer._factors("default")
        exact = phi.delta(A.double(), B.double(), scaling=layer.scaling["default"], gain=1.0)
    assert A.dtype == dtype
    U, V = layer.thin_factors("default")
    for delta in (layer.get_delta_weight("default"), U @ V):
        assert delta.dtype == torch.float32
        torch.testing.assert_close(delta.double(), exact, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("layer", "x"),
    [
        (nn.Embedding(11, 6, padding_idx=3), torch.randint(0, 11, (2, 5))),
        (nn.Conv1d(4, 6, 3), torch.randn(2, 4, 9)),
        (nn.Conv2d(4, 6, 3, groups=2), torch.randn(2, 4, 9, 9)),
    ],
    ids=["embedding", "conv1d", "conv2d"],
)
def test_other_kinds_of_layers_use_their_update(layer: nn.Module, x: torch.Tensor) -> None:
    torch.manual_seed(0)
    model = get_peft_model(nn.Sequential(layer), LrLoraConfig(r=2, target_modules=["0"], **EXPANSION))
    adapted: Any = model.base_model.model[0]
    with torch.no_grad():
        adapted.lrlora_B["default"].weight.normal_()
    y = model(x)
    y.square().mean().backward()
    assert all(p.grad.abs().sum() > 0 for p in adapted.adapter_parameters("default"))
    model.merge_adapter()
    assert torch.allclose(model(x), y, atol=1e-4)


def test_compiled_without_a_graph_break() -> None:
    torch.manual_seed(0)
    model = get_peft_model(nn.Sequential(nn.Linear(8, 6)), LrLoraConfig(r=2, target_modules=["0"], **EXPANSION))
    with torch.no_grad():
        model.base_model.model[0].lrlora_B["default"].weight.normal_()
    x = torch.randn(5, 8)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    assert torch.allclose(compiled(x), model(x), atol=1e-6)
    compiled(x).sum().backward()
