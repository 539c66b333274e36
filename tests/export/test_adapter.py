"""A saved export, as PEFT without lrlora, and a server, would read it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file

from lrlora.export import factorize, output_difference, save_as_lora
from lrlora.export import files as export_files

from ..conftest import TinyModel

Train = Callable[..., tuple[Path, Any]]


@pytest.mark.parametrize("family", ["bert", "gpt2", "llama", "t5"])
@pytest.mark.parametrize("pad", [False, True])
def test_loads_with_peft_and_answers_the_same(train: Train, family: str, pad: bool, tmp_path: Path) -> None:
    adapter, model = train(family)
    save_as_lora(factorize(model, energy=1.0), adapter, tmp_path / "lora", pad=pad)
    tiny = TinyModel(family)
    base = type(tiny.build()).from_pretrained(tmp_path / "base")
    expected = tiny.logits(model)
    loaded = PeftModel.from_pretrained(base, tmp_path / "lora")
    torch.testing.assert_close(tiny.logits(loaded), expected, rtol=1e-4, atol=1e-5)
    assert output_difference(adapter, tmp_path / "lora").relative < 1e-3
    torch.testing.assert_close(tiny.logits(loaded.merge_and_unload()), expected, rtol=1e-4, atol=1e-5)


def test_needs_no_lrlora(train: Train, tmp_path: Path) -> None:
    adapter, model = train("llama")
    save_as_lora(factorize(model, energy=0.9), adapter, tmp_path / "lora")
    script = (
        "import sys; from peft import AutoPeftModelForCausalLM;"
        f"model = AutoPeftModelForCausalLM.from_pretrained({str(tmp_path / 'lora')!r});"
        "assert 'lrlora' not in sys.modules; print(model.peft_config['default'].peft_type.value)"
    )
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert run.stdout.strip() == "LORA", run.stderr


def test_loads_through_transformers_itself(train: Train, tmp_path: Path) -> None:
    adapter, model = train("llama")
    save_as_lora(factorize(model, energy=1.0), adapter, tmp_path / "lora")
    tiny = TinyModel("llama")
    base = type(tiny.build()).from_pretrained(tmp_path / "base")
    base.load_adapter(str(tmp_path / "lora"))
    torch.testing.assert_close(tiny.logits(base), tiny.logits(model), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("pad", [False, True])
def test_scaling_is_one_however_a_server_reads_it(train: Train, pad: bool, tmp_path: Path) -> None:
    """PEFT takes α/r by module, vLLM of the configuration alone, llama.cpp α by each matrix's own rank."""
    adapter, model = train("llama")
    save_as_lora(factorize(model, energy=0.95), adapter, tmp_path / "lora", pad=pad)
    config = json.loads((tmp_path / "lora" / "adapter_config.json").read_text())
    ranks = {
        key.removeprefix("base_model.model.").removesuffix(".lora_A.weight"): len(weight)
        for key, weight in load_file(tmp_path / "lora" / "adapter_model.safetensors").items()
        if key.endswith("lora_A.weight")
    }
    assert len(set(ranks.values())) == 1 if pad else len(set(ranks.values())) > 1
    assert config["lora_alpha"] == config["r"] == max(ranks.values())
    for module, rank in ranks.items():
        assert config["rank_pattern"].get(module, config["r"]) == rank
        assert config["alpha_pattern"].get(module, config["lora_alpha"]) == rank


def test_what_else_was_trained_comes_along(train: Train, tmp_path: Path) -> None:
    adapter, model = train("bert", modules_to_save=["classifier"], target_modules=["query", "value"], bias="lora_only")
    save_as_lora(factorize(model, energy=1.0), adapter, tmp_path / "lora")
    tiny = TinyModel("bert")
    base = type(tiny.build()).from_pretrained(tmp_path / "base")
    with torch.no_grad():
        base.classifier.weight.zero_()
        base.bert.encoder.layer[0].attention.self.query.bias.fill_(9.0)
    loaded = PeftModel.from_pretrained(base, tmp_path / "lora")
    torch.testing.assert_close(tiny.logits(loaded), tiny.logits(model), rtol=1e-4, atol=1e-5)


def test_dtype_of_the_factors(train: Train, tmp_path: Path) -> None:
    adapter, model = train("llama")
    for dtype in (torch.float32, torch.bfloat16):
        save_as_lora(factorize(model, energy=1.0), adapter, tmp_path / str(dtype), dtype=dtype)
    sizes = [(tmp_path / str(d) / "adapter_model.safetensors").stat().st_size for d in (torch.float32, torch.bfloat16)]
    assert sizes[1] < 0.7 * sizes[0]
    assert output_difference(adapter, tmp_path / "torch.bfloat16").relative < 0.02


def test_modules_left_out_stay_the_base_model_s(train: Train, tmp_path: Path) -> None:
    adapter, model = train("llama")
    factors = factorize(model, max_rank=1, drop_below=0.05)
    left_out = {part.module for part in factors if not part.rank}
    assert left_out
    save_as_lora(factors, adapter, tmp_path / "lora")
    loaded = peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "lora")
    adapted = {path.removeprefix("base_model.model.") for path, m in loaded.named_modules() if hasattr(m, "lora_A")}
    assert adapted == {part.module for part in factors} - left_out


@pytest.mark.refused
def test_never_overwrites(train: Train, tmp_path: Path) -> None:
    adapter, model = train("llama")
    factors = factorize(model, energy=0.9)
    with pytest.raises(FileExistsError, match="is not empty"):
        save_as_lora(factors, adapter, adapter)
    (tmp_path / "file").write_text("mine")
    with pytest.raises(FileExistsError, match="is a file"):
        save_as_lora(factors, adapter, tmp_path / "file")
    (tmp_path / "empty").mkdir()
    save_as_lora(factors, adapter, tmp_path / "empty")


@pytest.mark.parametrize("failure", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_nothing_is_left_of_a_failed_export(
    train: Train, tmp_path: Path, failure: BaseException, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter, model = train("llama")
    factors = factorize(model, energy=0.9)

    def fail(*arguments: Any, **options: Any) -> None:
        raise failure

    monkeypatch.setattr(peft.LoraConfig, "save_pretrained", fail)
    with pytest.raises(type(failure)):
        save_as_lora(factors, adapter, tmp_path / "out" / "lora")
    assert list((tmp_path / "out").iterdir()) == []


def test_a_killed_export_leaves_nothing_under_the_final_name(train: Train, tmp_path: Path) -> None:
    adapter, _ = train("llama")
    script = (
        "import os, signal, peft\n"
        "from lrlora.export import factorize, save_as_lora\n"
        "from lrlora.tuner.skeleton import load_on_skeleton\n"
        "peft.LoraConfig.save_pretrained = lambda *a, **k: os.kill(os.getpid(), signal.SIGKILL)\n"
        f"save_as_lora(factorize(load_on_skeleton({str(adapter)!r}), energy=0.9), {str(adapter)!r}, 'lora')\n"
    )
    environment = {**os.environ, "LRLORA_KERNELS": "0"}
    run = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, env=environment)
    assert run.returncode == -9, run.stderr
    assert not (tmp_path / "lora").exists()


@pytest.mark.refused
def test_a_base_model_that_is_missing_or_of_another_shape(train: Train, tmp_path: Path) -> None:
    adapter, model = train("llama")
    save_as_lora(factorize(model, energy=0.9), adapter, tmp_path / "lora")
    (tmp_path / "base").rename(tmp_path / "moved")
    with pytest.raises(FileNotFoundError, match=r"base model .* could not be loaded"):
        output_difference(adapter, tmp_path / "lora")
    TinyModel("bert").build().save_pretrained(tmp_path / "base")
    with pytest.raises(ValueError, match="does not fit its base model"):
        output_difference(adapter, tmp_path / "lora")


def test_the_temporary_folder_is_on_the_same_disk(tmp_path: Path) -> None:
    with export_files.written_whole(tmp_path / "a" / "b") as partial:
        assert partial.parent == tmp_path / "a"
        (partial / "file").write_text("x")
        assert not (tmp_path / "a" / "b").exists()
    assert [path.name for path in (tmp_path / "a").rglob("*")] == ["b", "file"]
