"""Two checkpoints: what full fine-tuning has changed, and its LoRA."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import AutoPeftModelForCausalLM, PeftModel
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from lrlora import rank_report
from lrlora.adapters import factorize, read_updates, save_as_lora
from lrlora.cli import app

from ..conftest import TinyModel
from .test_peft_methods import METHODS, save_trained


def save_both(folder: Path, family: str = "llama", **options: Any) -> tuple[TinyModel, Any]:
    """A base model and the same after a few steps of full fine-tuning, in two folders."""
    tiny = TinyModel(family)
    model = tiny.build()
    model.save_pretrained(folder / "base", **options)
    tiny.train(model, 5, lr=1e-3)
    model.save_pretrained(folder / "tuned", **options)
    return tiny, model


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert", "vit"])
def test_ranks_and_the_whole_lora(family: str, tmp_path: Path) -> None:
    tiny, tuned = save_both(tmp_path, family)
    base = tiny.build()
    updates = read_updates(tmp_path / "tuned", base=tmp_path / "base")
    before, after = (dict(model.named_parameters()) for model in (base, tuned))
    for row in rank_report(updates).rows:
        delta = (after[f"{row.module}.weight"] - before[f"{row.module}.weight"]).detach().double().flatten(1)
        energies = torch.linalg.svdvals(delta).square()
        assert row.stable_rank == pytest.approx((energies.sum() / energies[0]).item(), rel=1e-6)
        assert row.r is None
        norm = before[f"{row.module}.weight"].double().norm()
        assert row.relative_norm == pytest.approx((delta.norm() / norm).item(), rel=1e-6)
    linear = (torch.nn.Linear, transformers.pytorch_utils.Conv1D, torch.nn.Conv2d)
    apart = {"gpt2": {"lm_head"}, "bert": {"classifier"}}  # tied, or a head that is kept whole
    names = {name for name, layer in base.named_modules() if isinstance(layer, linear)} - apart.get(family, set())
    assert {update.module for update in updates} == names
    assert {update.scaling for update in updates} == {1.0}
    names_shown, is_more, _ = updates.notes[-1].partition("left out: ")[2].partition(" and ")
    assert not is_more or len(names_shown.split(", ")) == 3
    save_as_lora(factorize(updates, energy=1.0), updates, tmp_path / "lora")
    loaded = PeftModel.from_pretrained(base, tmp_path / "lora").merge_and_unload()
    for name in names:
        merged = dict(loaded.named_parameters())[f"{name}.weight"]
        torch.testing.assert_close(merged, after[f"{name}.weight"], rtol=1e-3, atol=1e-5)
    if family == "bert":
        assert torch.equal(loaded.classifier.weight, tuned.classifier.weight)


def test_shards_are_read_one_tensor_at_a_time(tmp_path: Path) -> None:
    save_both(tmp_path, max_shard_size="20KB")
    assert len(list((tmp_path / "tuned").glob("*.safetensors"))) > 2
    sharded = rank_report(read_updates(tmp_path / "tuned", base=tmp_path / "base")).rows
    save_both(tmp_path / "whole")
    assert sharded == rank_report(read_updates(tmp_path / "whole/tuned", base=tmp_path / "whole/base")).rows


def test_two_files_without_a_configuration(tmp_path: Path) -> None:
    save_both(tmp_path)
    for name in ("base", "tuned"):
        (tmp_path / name / "model.safetensors").rename(tmp_path / f"{name}.safetensors")
    updates = read_updates(tmp_path / "tuned.safetensors", base=tmp_path / "base.safetensors")
    assert not any("embed" in update.module for update in updates)
    assert sum(update.module.endswith("q_proj") for update in updates) == 2


def test_the_lora_of_a_fine_tuned_model_loads_by_itself(tmp_path: Path) -> None:
    save_both(tmp_path)
    arguments = f"export {tmp_path / 'tuned'} --base {tmp_path / 'base'} --energy 0.9 --output {tmp_path / 'lora'}"
    result = CliRunner().invoke(app, arguments.split(), env={"COLUMNS": "200"})
    assert result.exit_code == 0, result.output
    assert "(full fine-tuning)" in " ".join(result.output.split())
    assert re.search(r"Parameters: [\d,]+ as exported.", result.output)
    assert isinstance(AutoPeftModelForCausalLM.from_pretrained(tmp_path / "lora"), PeftModel)


def test_half_precision_stays_half_precision(tmp_path: Path) -> None:
    tiny = TinyModel("llama")
    tiny.build().bfloat16().save_pretrained(tmp_path / "base")
    model = tiny.build()
    tiny.train(model, 5)
    model.bfloat16().save_pretrained(tmp_path / "tuned")
    updates = read_updates(tmp_path / "tuned", base=tmp_path / "base")
    save_as_lora(factorize(updates, max_rank=2), updates, tmp_path / "lora")
    weights = load_file(tmp_path / "lora" / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {torch.bfloat16}


def test_dora_as_a_whole_and_relative_to_the_weights(tmp_path: Path) -> None:
    adapter = save_trained(tmp_path, METHODS["DoRA"])
    direction = read_updates(adapter)
    assert re.search(r"DoRA: .*s·BA.*magnitude", direction.notes[0])
    assert all(update.limit == 4 for update in direction)
    whole = read_updates(adapter, base=tmp_path / "base")
    assert max(row.energy99_rank for row in rank_report(whole).rows) > 4


@pytest.mark.refused
def test_what_cannot_be_compared(tmp_path: Path) -> None:
    save_both(tmp_path)
    with pytest.raises(ValueError, match=r"full model\..*--base"):
        read_updates(tmp_path / "tuned")
    with pytest.raises(ValueError, match=r"no model .*nothing"):
        read_updates(tmp_path / "tuned", base=tmp_path / "nothing")
    (tmp_path / "pickled").mkdir()
    (tmp_path / "pickled" / "config.json").write_text("{}")
    with pytest.raises(ValueError, match=r"pickled .*: model\.safetensors "):
        read_updates(tmp_path / "tuned", base=tmp_path / "pickled")
    save_file({"other.weight": torch.ones(2, 2)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match=r"tuned .*\bother\.safetensors "):
        read_updates(tmp_path / "tuned", base=tmp_path / "other.safetensors")
    (tmp_path / "base" / "model.safetensors").write_bytes(b"cut off")
    with pytest.raises(ValueError, match=r"base\S* is damaged"):
        read_updates(tmp_path / "tuned", base=tmp_path / "base")


def test_a_page_of_an_adapter_beside_the_full_model(tmp_path: Path) -> None:
    save_both(tmp_path)
    (tmp_path / "loha").mkdir()
    save_trained(tmp_path / "loha", METHODS["LoHa"])
    sources = [str(tmp_path / "loha" / "adapter"), str(tmp_path / "tuned")]
    page = tmp_path / "page.html"
    arguments = ["report", *sources, "--base", str(tmp_path / "base"), "--output", str(page)]
    result = CliRunner().invoke(app, arguments, env={"COLUMNS": "200"})
    assert result.exit_code == 0, result.output
    (content,) = re.findall(r'id="data">(.*?)</script>', page.read_text(encoding="utf-8"))
    shown = json.loads(content)
    assert [run["facts"]["method"] for run in shown["runs"]] == ["LoHa", "full fine-tuning"]
    command = "".join(shown["sizes"]["commands"][1])
    assert command.startswith(f"lrlora export {tmp_path / 'tuned'} --base {tmp_path / 'base'} --by energy --size ")


@pytest.mark.parametrize("family", ["bert", "gpt2"])
def test_a_base_model_without_the_head(family: str, tmp_path: Path) -> None:
    tiny, tuned = save_both(tmp_path, family)
    whole = tiny.build()
    getattr(whole, whole.base_model_prefix).save_pretrained(tmp_path / "bare")
    updates = read_updates(tmp_path / "tuned", base=tmp_path / "bare")
    assert len(updates) == len(read_updates(tmp_path / "tuned", base=tmp_path / "base"))
    save_as_lora(factorize(updates, energy=1.0), updates, tmp_path / "lora")
    loaded = PeftModel.from_pretrained(tiny.build(), tmp_path / "lora")
    full = dict(tuned.named_parameters())
    merged = dict(loaded.merge_and_unload().named_parameters())
    for update in updates:
        name = f"{update.module}.weight"
        torch.testing.assert_close(merged[name], full[name], rtol=1e-3, atol=1e-5)


def test_what_the_base_model_lacks_is_kept_whole(tmp_path: Path) -> None:
    """A classifier with more labels than the base model's, and a pooler that that has not."""
    config = TinyModel("bert").build().config
    base = transformers.BertForMaskedLM(config)
    base.save_pretrained(tmp_path / "base")
    tuned = transformers.BertForSequenceClassification.from_pretrained(tmp_path / "base", num_labels=5)
    TinyModel("bert").train(tuned, 3, lr=1e-3)
    tuned.save_pretrained(tmp_path / "tuned")
    updates = read_updates(tmp_path / "tuned", base=tmp_path / "base")
    assert any(note.endswith(": bert.pooler.dense, classifier.") for note in updates.notes)
    save_as_lora(factorize(updates, energy=1.0), updates, tmp_path / "lora")
    fresh = transformers.BertForSequenceClassification.from_pretrained(tmp_path / "base", num_labels=5)
    loaded = PeftModel.from_pretrained(fresh, tmp_path / "lora").merge_and_unload()
    for name in ("classifier.weight", "bert.pooler.dense.weight"):
        assert torch.equal(dict(loaded.named_parameters())[name], dict(tuned.named_parameters())[name])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_dtype_is_that_of_the_linear_weights(dtype: torch.dtype, tmp_path: Path) -> None:
    save_both(tmp_path)
    for name in ("base", "tuned"):
        file = tmp_path / name / "model.safetensors"
        weights = {key: value.to(dtype) for key, value in load_file(file).items()}
        first = torch.bfloat16 if dtype == torch.float32 else torch.int64
        save_file({"a_first": torch.zeros(3, dtype=first), **weights}, file, metadata={"format": "pt"})
    updates = read_updates(tmp_path / "tuned", base=tmp_path / "base")
    save_as_lora(factorize(updates, max_rank=2), updates, tmp_path / "lora")
    stored = load_file(tmp_path / "lora" / "adapter_model.safetensors")
    assert {value.dtype for key, value in stored.items() if ".lora_" in key} == {dtype}
