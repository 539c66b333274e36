"""The adapter as a PEFT user meets it: start, training, files, merging, several adapters."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import (
    LoraConfig,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    inject_adapter_in_model,
    load_peft_weights,
    set_peft_model_state_dict,
)
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import GenerationConfig, LlamaForCausalLM

from lrlora import LrLoraConfig, rank_report
from lrlora.tuner import Linear

from ..conftest import TinyModel


def adapt(tiny: TinyModel, **fields: Any) -> PeftModel:
    torch.manual_seed(1)
    return get_peft_model(tiny.build(), LrLoraConfig(**{"r": 4, **tiny.targets, **fields})).eval()


def trained(tiny: TinyModel, steps: int = 10, **fields: Any) -> PeftModel:
    model = adapt(tiny, **fields)
    tiny.train(model, steps)
    return model


def adapted_layers(model: nn.Module) -> list[Linear]:
    return [module for module in model.modules() if isinstance(module, Linear)]


def test_the_model_card_says_how_to_load_it_once(tiny_bert: TinyModel, tmp_path: Path) -> None:
    model = adapt(tiny_bert)
    for _ in range(2):
        model.save_pretrained(tmp_path)
    card = (tmp_path / "README.md").read_text()
    assert card.count("import lrlora\n") == 1
    assert "KeyError: 'LRLORA'" in card


@pytest.mark.parametrize(("sharing", "count"), [("module", 13), ("global", 1)])
def test_sharing_decides_how_many_phi_there_are(tiny_bert: TinyModel, tmp_path: Path, sharing: str, count: int) -> None:
    model = trained(tiny_bert, sharing=sharing, task_type="SEQ_CLS")
    assert len({id(layer.lrlora_phi["default"]) for layer in adapted_layers(model)}) == count
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny_bert.build(), tmp_path).eval()
    assert len({id(layer.lrlora_phi["default"]) for layer in adapted_layers(loaded)}) == count
    assert torch.equal(tiny_bert.logits(loaded), tiny_bert.logits(model))


def test_patterns_layers_and_exclusion_select_as_in_peft(tiny_bert: TinyModel) -> None:
    model = adapt(
        tiny_bert,
        target_modules=["query", "key", "value"],
        exclude_modules=["key"],
        layers_to_transform=[1],
        layers_pattern="layer",
        rank_pattern={"value": 2},
        alpha_pattern={"value": 32},
    )
    query, value = adapted_layers(model)
    assert (query.r["default"], query.scaling["default"]) == (4, 2.0)
    assert (value.r["default"], value.scaling["default"]) == (2, 16.0)


def test_rslora_scaling(tiny_bert: TinyModel) -> None:
    model = adapt(tiny_bert, target_modules=["query"], use_rslora=True)
    assert adapted_layers(model)[0].scaling["default"] == pytest.approx(8 / 2)


@pytest.mark.parametrize("family", ["bert", "gpt2", "llama", "t5"])
def test_default_targets_are_those_peft_chooses_for_lora(family: str) -> None:
    tiny = TinyModel(family)
    lr_lora = get_peft_model(tiny.build(), LrLoraConfig(r=2))
    lora = get_peft_model(tiny.build(), LoraConfig(r=2))
    assert lr_lora.base_model.targeted_module_names == lora.base_model.targeted_module_names


def test_dropout_acts_in_training_only_and_keeps_the_base_output(tiny_bert: TinyModel) -> None:
    with pytest.warns(UserWarning, match="slows down training"):
        model = trained(tiny_bert, target_modules=["query"], lora_dropout=0.5)
    layer, x = adapted_layers(model)[0], torch.randn(3, 32)
    assert torch.equal(layer(x), layer(x))
    layer.train()
    assert not torch.equal(layer(x), layer(x))
    assert torch.allclose(layer(x.expand(4000, -1, -1)).mean(0), layer.eval()(x), atol=0.02)


class Doubling(nn.Linear):
    """A base layer that does more than its weight says."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(x)


def test_a_subclass_or_hook_of_the_base_layer_is_respected() -> None:
    x = torch.randn(5, 12)
    hooked = nn.Linear(12, 9)
    hooked.register_forward_hook(lambda module, args, output: 2 * output)
    for base in (Doubling(12, 9), hooked):
        expected = base(x)
        model = get_peft_model(nn.Sequential(base), LrLoraConfig(r=2, target_modules=["0"], init_weights=False))
        layer = adapted_layers(model)[0]
        delta = layer.get_delta_weight("default")
        assert delta.norm() > 0
        torch.testing.assert_close(model(x), expected + x @ delta.T)


def test_an_offloaded_base_layer_is_respected() -> None:
    from accelerate import cpu_offload

    base, x = nn.Linear(12, 9), torch.randn(5, 12)
    expected = base(x)
    model = get_peft_model(nn.Sequential(base), LrLoraConfig(r=2, target_modules=["0"], init_weights=False))
    delta = adapted_layers(model)[0].get_delta_weight("default")
    cpu_offload(base, execution_device=torch.device("cpu"))
    assert base.weight.is_meta
    torch.testing.assert_close(model(x), expected + x @ delta.T)


@pytest.mark.parametrize("form", [LrLoraConfig.form, "expansion"])
def test_an_adapter_on_an_offloaded_model_trains_and_loads(form: str, tmp_path: Path) -> None:
    tiny, config = TinyModel("llama"), LrLoraConfig(r=2, target_modules="all-linear", form=form)
    tiny.build().save_pretrained(tmp_path / "base")
    places = {"model.embed_tokens": "cpu", "model.layers.0": "cpu", "model.layers.1": "disk", "model.norm": "cpu"}
    places |= {"model.rotary_emb": "cpu", "lm_head": "cpu"}

    def offloaded() -> Any:
        return LlamaForCausalLM.from_pretrained(tmp_path / "base", device_map=places, offload_folder=tmp_path / "disk")

    torch.manual_seed(0)
    expected = get_peft_model(LlamaForCausalLM.from_pretrained(tmp_path / "base"), config)
    torch.manual_seed(0)
    model = get_peft_model(offloaded(), config)
    assert model.base_model.model.model.layers[1].mlp.up_proj.base_layer.weight.is_meta
    for each in (expected, model):
        tiny.train(each, 3)
    torch.testing.assert_close(tiny.logits(model), tiny.logits(expected))
    # A weight that is offloaded cannot be compared with; the ranks are the same.
    ranks = [{row.module: row.stable_rank for row in rank_report(each).rows} for each in (expected, model)]
    assert ranks[0] == pytest.approx(ranks[1], rel=1e-3)
    model.save_pretrained(tmp_path / "adapter")
    loaded = get_peft_model(offloaded(), LrLoraConfig.from_pretrained(tmp_path / "adapter"))
    set_peft_model_state_dict(loaded, load_peft_weights(tmp_path / "adapter"))
    torch.testing.assert_close(tiny.logits(loaded), tiny.logits(expected))


def test_an_adapter_that_was_never_loaded_is_refused() -> None:
    config = LrLoraConfig(r=2, target_modules=["0"])
    model = get_peft_model(nn.Sequential(nn.Linear(12, 9)), config, low_cpu_mem_usage=True).requires_grad_(False)
    with pytest.raises(RuntimeError, match="not loaded"):
        model(torch.randn(5, 12))


@pytest.mark.parametrize("form", [LrLoraConfig.form, "expansion"])
def test_an_offloaded_adapter_works_but_is_not_trained(form: str) -> None:
    from accelerate import cpu_offload

    config = LrLoraConfig(r=2, target_modules=["0"], init_weights=False, form=form)
    model, x = get_peft_model(nn.Sequential(nn.Linear(12, 9)), config), torch.randn(5, 12)
    expected = model(x).detach()
    cpu_offload(model, execution_device=torch.device("cpu"))
    with pytest.raises(RuntimeError, match=r"'default' .*\bmeta device"):
        model(x)
    model.requires_grad_(False)
    torch.testing.assert_close(model(x), expected)


def test_targets_that_match_nothing_say_what_there_is(tiny_bert: TinyModel) -> None:
    with pytest.raises(ValueError, match=r"q_proj.*: classifier, dense, key, query, value\b"):
        adapt(tiny_bert, target_modules=["q_proj"])


def test_an_unsupported_layer_kind_is_named(tiny_bert: TinyModel) -> None:
    with pytest.raises(ValueError, match=r"'bert\.embeddings\.LayerNorm', .*\bLayerNorm\b.*exclude_modules"):
        adapt(tiny_bert, target_modules=["LayerNorm"])


def test_a_weight_that_is_sharded_already_is_refused(tiny_bert: TinyModel) -> None:
    model = tiny_bert.build()
    model.bert.encoder.layer[0].attention.self.query.weight.device_mesh = "of a tensor-parallel plan"
    with pytest.raises(ValueError, match=r"query' .*\btp_plan"):
        get_peft_model(model, LrLoraConfig(target_modules=["query"]))


def test_non_finite_weights_are_refused_at_save(tiny_bert: TinyModel, tmp_path: Path) -> None:
    model = trained(tiny_bert)
    adapted_layers(model)[0].lrlora_B["default"].weight.data[0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"saved: .*lrlora_B.* NaN "):
        model.save_pretrained(tmp_path / "adapter")
    assert not (tmp_path / "adapter" / "adapter_model.safetensors").exists()


def test_non_finite_weights_are_refused_at_load(tiny_bert: TinyModel, tmp_path: Path) -> None:
    adapt(tiny_bert).save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    weights = load_file(file)
    name = next(name for name in weights if name.endswith("lrlora_phi.amplitude"))
    weights[name][0] = float("inf")
    save_file(weights, file)
    with pytest.raises(ValueError, match=r"loaded: .*\.amplitude .*NaN "):
        PeftModel.from_pretrained(tiny_bert.build(), tmp_path)


def test_an_adapter_of_a_newer_format_is_refused(tiny_bert: TinyModel, tmp_path: Path) -> None:
    adapt(tiny_bert).save_pretrained(tmp_path)
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "format_version": 3, "gates": True}))
    with pytest.raises(ValueError, match=r"format_version=3.*Update"), pytest.warns(UserWarning, match="gates"):
        PeftModel.from_pretrained(tiny_bert.build(), tmp_path)


def test_phi_returns_to_float32_after_a_cast_of_its_data(tiny_bert: TinyModel) -> None:
    model = trained(tiny_bert)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(torch.bfloat16)
    tiny_bert.logits(model)
    phi = [p for name, p in model.named_parameters() if "lrlora_phi" in name]
    assert {p.dtype for p in phi} == {torch.float32}


def test_non_finite_modules_to_save_are_refused_too(tiny_bert: TinyModel, tmp_path: Path) -> None:
    model = adapt(tiny_bert, target_modules=["query"], modules_to_save=["classifier"])
    model.base_model.model.classifier.modules_to_save["default"].weight.data[0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"saved: .*classifier"):
        model.save_pretrained(tmp_path)


def test_an_adapter_is_saved_whatever_another_contains_whose_name_begins_alike(
    tiny_bert: TinyModel, tmp_path: Path
) -> None:
    config = LrLoraConfig(target_modules=["query"], trainable_token_indices=[3])
    model = get_peft_model(tiny_bert.build(), config, "one")
    model.add_adapter("oneb", config)
    for name, parameter in model.named_parameters():
        if name.endswith(".oneb"):
            parameter.data.fill_(float("nan"))
    model.save_pretrained(tmp_path, selected_adapters=["one"])
    with pytest.raises(ValueError, match=r"saved: .*trainable_tokens"):
        model.save_pretrained(tmp_path, selected_adapters=["oneb"])


def test_wrong_targets_of_a_second_adapter_list_the_model_and_not_its_adapters(tiny_bert: TinyModel) -> None:
    model = adapt(tiny_bert)
    with pytest.raises(ValueError, match=r": classifier, dense, key, query, value\."):
        model.add_adapter("other", LrLoraConfig(target_modules=["q_proj"]))


def test_a_projection_that_is_never_called_is_refused() -> None:
    with pytest.raises(ValueError, match=r"'self_attn\.out_proj', .*NonDynamicallyQuantizableLinear"):
        get_peft_model(nn.TransformerEncoderLayer(16, 2), LrLoraConfig(target_modules=["out_proj"]))


def test_injecting_the_same_name_again_starts_anew(tiny_bert: TinyModel) -> None:
    config = {"r": 2, "target_modules": ["query"], "sharing": "global"}
    model = inject_adapter_in_model(LrLoraConfig(**config), tiny_bert.build())
    adapted_layers(model)[0].lrlora_phi["default"].amplitude.data.fill_(1.0)
    with pytest.warns(UserWarning, match="Already found a `peft_config`"):
        model = inject_adapter_in_model(LrLoraConfig(**config, num_basis=8), model)
    for layer in adapted_layers(model):
        assert torch.equal(layer.lrlora_phi["default"].amplitude, torch.zeros(8))


def test_an_injected_phi_is_shared_trained_and_loaded_without_a_peft_model(tiny_bert: TinyModel) -> None:
    config = LrLoraConfig(r=2, target_modules=["query"], sharing="global")
    model = inject_adapter_in_model(config, tiny_bert.build())
    phis = {id(layer.lrlora_phi["default"]) for layer in adapted_layers(model)}
    assert len(phis) == 1
    for layer in adapted_layers(model):
        nn.init.normal_(layer.lrlora_B["default"].weight)
    adapted_layers(model)[0].lrlora_phi["default"].amplitude.data.fill_(0.5)
    state = get_peft_model_state_dict(model)
    again = inject_adapter_in_model(config, tiny_bert.build())
    set_peft_model_state_dict(again, state)
    inputs = tiny_bert.inputs()
    assert torch.equal(tiny_bert.logits(again.eval(), **inputs), tiny_bert.logits(model.eval(), **inputs))


@pytest.mark.parametrize("family", ["llama", "t5"])
def test_an_adapter_for_each_sample_however_generate_is_told_to_repeat_them(family: str) -> None:
    tiny = TinyModel(family)
    model = adapt(tiny, init_weights=False)
    ids, names = tiny.inputs()["input_ids"], ["default", "__base__"]
    options = {"max_new_tokens": 3, "min_new_tokens": 3, "do_sample": False}
    expected = model.generate(input_ids=ids, adapter_names=names, num_beams=2, **options)
    config = GenerationConfig(num_beams=2, **options, pad_token_id=0, eos_token_id=2, decoder_start_token_id=0)
    assert torch.equal(model.generate(input_ids=ids, adapter_names=names, generation_config=config), expected)
    several = model.generate(input_ids=ids, adapter_names=names, num_beams=2, num_return_sequences=2, **options)
    assert torch.equal(several[::2], expected)
    torch.manual_seed(0)
    sampled = model.generate(
        input_ids=ids, adapter_names=names, num_return_sequences=3, do_sample=True, max_new_tokens=3
    )
    assert len(sampled) == 6


def test_merging_shows_a_bar_only_where_it_is_asked_for(
    tiny_bert: TinyModel, capfd: pytest.CaptureFixture[str]
) -> None:
    for bar in (False, True):
        model = get_peft_model(tiny_bert.build(), LrLoraConfig(r=2))
        capfd.readouterr()
        model.merge_and_unload(**({"progressbar": True} if bar else {}))
        assert ("Unloading" in capfd.readouterr().err) == bar
