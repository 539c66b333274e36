"""Merged models, as `from_pretrained` reads them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors import safe_open

from lrlora.export import merge_adapter

from ..conftest import TinyModel

Train = Callable[..., tuple[Path, Any]]
CLASSES = {
    "bert": transformers.AutoModelForSequenceClassification,
    "gpt2": transformers.AutoModelForCausalLM,
    "llama": transformers.AutoModelForCausalLM,
    "t5": transformers.AutoModelForSeq2SeqLM,
    "mixtral": transformers.AutoModelForCausalLM,
    "vit": transformers.AutoModelForImageClassification,
}


@pytest.mark.parametrize("family", CLASSES)
def test_the_merged_model_answers_as_the_adapter_does(train: Train, family: str, tmp_path: Path) -> None:
    adapter, model = train(family)
    merge_adapter(adapter, tmp_path / "merged")
    tiny = TinyModel(family)
    merged = CLASSES[family].from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(tiny.logits(merged), tiny.logits(model), rtol=1e-5, atol=1e-5)


def test_head_and_its_classes_come_along(train: Train, tmp_path: Path) -> None:
    torch.manual_seed(0)
    adapter, model = train("bert", modules_to_save=["classifier"], target_modules=["query"])
    merge_adapter(adapter, tmp_path / "merged")
    merged = CLASSES["bert"].from_pretrained(tmp_path / "merged")
    tiny = TinyModel("bert")
    torch.testing.assert_close(tiny.logits(merged), tiny.logits(model), rtol=1e-5, atol=1e-5)


def test_dtype_is_that_of_the_base_model_unless_another_is_asked_for(train: Train, tmp_path: Path) -> None:
    adapter, model = train("llama")
    tiny = TinyModel("llama")
    expected = tiny.logits(model)
    tiny.build().to(torch.bfloat16).save_pretrained(tmp_path / "base")
    merge_adapter(adapter, tmp_path / "kept")
    merge_adapter(adapter, tmp_path / "asked", dtype=torch.float32)
    for folder, dtype, tolerance in (("kept", torch.bfloat16, 2e-2), ("asked", torch.float32, 2e-2)):
        merged = CLASSES["llama"].from_pretrained(tmp_path / folder, dtype="auto")
        assert merged.dtype == dtype
        assert (tiny.logits(merged).float() - expected).norm() <= tolerance * expected.norm()


def test_is_sharded(train: Train, tmp_path: Path) -> None:
    adapter, model = train("llama")
    merge_adapter(adapter, tmp_path / "merged", max_shard_size="20KB")
    assert len(list((tmp_path / "merged").glob("model-*.safetensors"))) > 1
    merged = CLASSES["llama"].from_pretrained(tmp_path / "merged")
    tiny = TinyModel("llama")
    torch.testing.assert_close(tiny.logits(merged), tiny.logits(model), rtol=1e-5, atol=1e-5)


def test_generation_config_comes_along(train: Train, tmp_path: Path) -> None:
    adapter, _ = train("llama")
    transformers.GenerationConfig(max_new_tokens=7, eos_token_id=2).save_pretrained(tmp_path / "base")
    merge_adapter(adapter, tmp_path / "merged")
    assert transformers.GenerationConfig.from_pretrained(tmp_path / "merged").max_new_tokens == 7


def test_nothing_of_the_adapter_is_left_in_the_weights(train: Train, tmp_path: Path) -> None:
    adapter, _ = train("llama")
    merge_adapter(adapter, tmp_path / "merged")
    with (
        safe_open(tmp_path / "base" / "model.safetensors", "pt") as base,
        safe_open(tmp_path / "merged" / "model.safetensors", "pt") as merged,
    ):
        assert set(base.keys()) == set(merged.keys())


@pytest.mark.refused
def test_refuses_before_anything_is_written(train: Train, tmp_path: Path) -> None:
    adapter, _ = train("llama")
    with pytest.raises(FileExistsError, match="is not empty"):
        merge_adapter(adapter, tmp_path / "base")
    (tmp_path / "base").rename(tmp_path / "elsewhere")
    with pytest.raises(FileNotFoundError, match="base model"):
        merge_adapter(adapter, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()
