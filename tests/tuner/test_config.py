"""Bad configuration: one clear error that names the field, the value and the remedy."""

from __future__ import annotations

from typing import Any

import pytest

from lrlora import LrLoraConfig
from lrlora.ops.phi import TransferSpec
from lrlora.ops.phi_forms import FORMS
from lrlora.tuner.config import EXPANSION


@pytest.mark.parametrize(
    ("field", "value", "expected"),
    [
        ("r", 0, "an integer ≥ 1"),
        ("r", 2.5, "an integer ≥ 1"),
        ("r", True, "an integer ≥ 1"),
        ("num_basis", 1, "an integer ≥ 2"),
        ("num_terms", 0, "an integer ≥ 1"),
        ("num_terms", 1.5, "an integer ≥ 1"),
        ("pattern_seed", "a", "an integer"),
        ("interval", -1.0, "a finite number > 0"),
        ("interval", "3", "a finite number > 0"),
        ("input_gain", float("nan"), "a finite number > 0"),
        ("phi_lr_multiplier", 0.0, "a finite number > 0"),
        ("lora_alpha", 0, "a finite number > 0"),
        ("lora_dropout", 1.0, "a number in"),
        ("form", "cubic", f"one of {', '.join((*FORMS, EXPANSION))}"),
        ("sharing", "layer", "one of module, global"),
        ("bias", "some", ""),
        ("init_weights", "pissa", ""),
    ],
)
def test_values_out_of_range_are_named(field: str, value: Any, expected: str) -> None:
    with pytest.raises(ValueError, match=rf"{field} must be .*{expected}.*, got {value!r}"):
        LrLoraConfig(**{field: value})


@pytest.mark.parametrize("field", ["rank_pattern", "alpha_pattern"])
def test_values_in_a_pattern_are_checked_too(field: str) -> None:
    with pytest.raises(ValueError, match=rf"{field}\['query'\] .*, got 0"):
        LrLoraConfig(**{field: {"query": 0}})


@pytest.mark.parametrize(
    ("field", "remedy"),
    [
        *(("use_dora", "peft.LoraConfig"), ("target_parameters", "peft.LoraConfig")),
        *(("init_lora_weights", "init_weights"), ("eva_config", "remove it")),
    ],
)
def test_fields_that_only_lora_has_are_refused_with_the_remedy(field: str, remedy: str) -> None:
    with pytest.raises(ValueError, match=rf"LrLoraConfig .*LoRA-only .*\b{field}\b.*{remedy}"):
        LrLoraConfig(**{field: True})


@pytest.mark.parametrize("field", ["layers_to_transform", "layers_pattern"])
def test_layer_selection_needs_a_list_of_targets(field: str) -> None:
    with pytest.raises(ValueError, match=rf"{field}=.*Pass a list"):
        LrLoraConfig(target_modules=".*query", **{field: [0]})


def test_patterns_may_be_none_as_in_peft() -> None:
    config = LrLoraConfig(rank_pattern=None, alpha_pattern=None)
    assert (config.rank_pattern, config.alpha_pattern) == ({}, {})


def test_a_layers_pattern_without_layers_is_refused() -> None:
    with pytest.raises(ValueError, match=r"layers_pattern='layer'.*layers_to_transform"):
        LrLoraConfig(target_modules=["query"], layers_pattern="layer")


def test_the_published_method_by_name(tmp_path: Any) -> None:
    config = LrLoraConfig.paper(r=4, target_modules=["query"], rank_pattern={"key": 2})
    assert config.new_phi().spec == TransferSpec("sinc", num_basis=50, interval=3.0, lr_multiplier=1.0)
    assert (config.r, config.input_gain, config.sharing, config.use_rslora) == (4, 1.0, "module", False)
    config.save_pretrained(tmp_path)
    assert LrLoraConfig.from_pretrained(tmp_path).to_dict() == config.to_dict()


def test_overrides_win_over_the_published_values_and_are_checked() -> None:
    assert LrLoraConfig.paper(num_basis=9, input_gain=300.0).new_phi().spec == TransferSpec("sinc", 9, 3.0, 1.0)
    with pytest.raises(ValueError, match=r"num_basis .*, got 1"):
        LrLoraConfig.paper(num_basis=1)


def test_a_configuration_alone_leaves_a_readme_as_it_is(tmp_path: Any) -> None:
    (tmp_path / "README.md").write_text("# A project\n")
    LrLoraConfig().save_pretrained(tmp_path)
    assert (tmp_path / "README.md").read_text() == "# A project\n"
