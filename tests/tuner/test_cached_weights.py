"""`cached_weights`: the same outputs, formed once, and never stale."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import get_peft_model
from torch import Tensor

from lrlora import LrLoraConfig, cached_weights
from lrlora.tuner import Linear

from ..conftest import TinyModel

LLAMA, GPT2 = TinyModel("llama"), TinyModel("gpt2")


def trained(tiny: TinyModel, **fields: Any) -> Any:
    torch.manual_seed(1)
    model = get_peft_model(tiny.build(), LrLoraConfig(r=4, target_modules="all-linear", **fields)).eval()
    tiny.train(model, 3)
    return model


def kept(model: Any) -> list[Tensor]:
    return [m._cached[1] for m in model.modules() if isinstance(m, Linear) and m._cached is not None]


def assert_as_without(tiny: TinyModel, model: Any) -> None:
    """Within the context: the output is what it would be without."""
    actual = tiny.logits(model)
    tensors = [tensor.data_ptr() for tensor in kept(model)]
    assert torch.equal(tiny.logits(model), actual)
    assert [tensor.data_ptr() for tensor in kept(model)] == tensors  # not formed again
    with torch.enable_grad():
        torch.testing.assert_close(actual, tiny.output(model).detach(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("tiny", [LLAMA, GPT2], ids=lambda tiny: tiny.family)
def test_outputs_are_the_same_and_memory_is_freed(tiny: TinyModel) -> None:
    model = trained(tiny)
    with cached_weights(model):
        assert_as_without(tiny, model)
        layers = [module for module in model.modules() if isinstance(module, Linear)]
        assert sum(t.numel() for t in kept(model)) == sum(layer.base_layer.weight.numel() for layer in layers)
    assert kept(model) == []


def test_a_base_without_a_weight_of_that_name_works() -> None:
    """As GPTQ's and others' layers, which have `qweight`."""

    class Packed(torch.nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return x @ self.qweight.T

    layer = Packed(8, 8, bias=False)
    model: Any = get_peft_model(torch.nn.Sequential(layer), LrLoraConfig(r=2, target_modules=["0"])).eval()
    layer.qweight = layer.weight.detach()
    del layer.weight
    torch.nn.init.normal_(model.base_model.model[0].lrlora_B["default"].weight)
    x = torch.randn(3, 8)
    expected = model(x).detach()
    with torch.no_grad(), cached_weights(model):
        torch.testing.assert_close(model(x), expected)


def test_generate_gives_the_same_tokens() -> None:
    model = trained(LLAMA)
    options = {**LLAMA.inputs(), "max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
    expected = model.generate(**options)
    with torch.no_grad(), cached_weights(model):
        assert torch.equal(model.generate(**options), expected)
        assert kept(model)


def test_half_precision_keeps_the_update_apart() -> None:
    model = trained(LLAMA).to(torch.bfloat16)
    expected = LLAMA.logits(model)
    with cached_weights(model):
        actual = LLAMA.logits(model)
        assert {tensor.dtype for tensor in kept(model)} == {torch.bfloat16}
    assert (actual - expected).norm() <= 2e-2 * expected.norm()


def test_gradients_pass_by_the_cache() -> None:
    model = trained(LLAMA)
    with cached_weights(model):
        LLAMA.output(model).square().mean().backward()
        assert kept(model) == []
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


def test_training_switching_loading_and_merging_are_noticed(tmp_path: Path) -> None:
    model = trained(LLAMA)
    model.save_pretrained(tmp_path)
    model.add_adapter("other", LrLoraConfig(r=2, target_modules="all-linear", init_weights=False))
    with cached_weights(model):
        assert_as_without(LLAMA, model)
        for name in ("other", "default"):
            model.set_adapter(name)
            assert_as_without(LLAMA, model)
        model.base_model.set_adapter(["default", "other"])
        assert_as_without(LLAMA, model)
        model.set_adapter("default")
        before = LLAMA.logits(model)
        LLAMA.train(model, 2)
        assert not torch.allclose(LLAMA.logits(model), before)
        assert_as_without(LLAMA, model)
        model.load_adapter(tmp_path, "default")
        assert_as_without(LLAMA, model)
        with model.disable_adapter():
            assert torch.equal(LLAMA.logits(model), LLAMA.logits(LLAMA.build()))
        model.merge_adapter()
        assert_as_without(LLAMA, model)


def test_an_adapter_for_each_sample_passes_by_the_cache() -> None:
    model = trained(LLAMA)
    expected = LLAMA.logits(model, adapter_names=["default", "__base__"])
    with cached_weights(model):
        assert torch.equal(LLAMA.logits(model, adapter_names=["default", "__base__"]), expected)
