"""Fitted ranks in TRL's trainers: supervised, by preferences, and by rewards."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset
from peft import LoraConfig, PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import DPOConfig, DPOTrainer, GRPOConfig, GRPOTrainer, SFTConfig, SFTTrainer

from lrlora import FittedRanksCallback

from ..train.small import save_decoder

TEXTS = ["a film to remember", "the plot is dull", "actors with charm", "clumsy and slow"] * 4
COMMON: dict[str, Any] = {"max_steps": 20, "learning_rate": 1e-2, "report_to": "none", "use_cpu": True, "bf16": False}
COMMON |= {"per_device_train_batch_size": 2, "save_strategy": "no", "logging_steps": 1, "disable_tqdm": True}


def rewards(completions: list[str], **kwargs: Any) -> list[float]:
    return [float(len(each) % 5) for each in completions]


def sft(base: str, output: str, **parts: Any) -> Any:
    arguments = SFTConfig(output_dir=output, max_length=16, **COMMON)
    return SFTTrainer(model=base, args=arguments, train_dataset=Dataset.from_dict({"text": TEXTS}), **parts)


def dpo(base: str, output: str, **parts: Any) -> Any:
    columns = {"prompt": ["a film"] * 16, "chosen": [" to remember"] * 16, "rejected": [" dull"] * 16}
    tokenizer = AutoTokenizer.from_pretrained(base)
    arguments = DPOConfig(output_dir=output, **COMMON)
    return DPOTrainer(
        model=base, args=arguments, processing_class=tokenizer, train_dataset=Dataset.from_dict(columns), **parts
    )


def grpo(base: str, output: str, **parts: Any) -> Any:
    arguments = GRPOConfig(output_dir=output, num_generations=2, max_completion_length=6, **COMMON)
    prompts, tokenizer = Dataset.from_dict({"prompt": TEXTS}), AutoTokenizer.from_pretrained(base)
    return GRPOTrainer(
        model=base, reward_funcs=rewards, args=arguments, processing_class=tokenizer, train_dataset=prompts, **parts
    )


@pytest.mark.parametrize("build", [sft, dpo, grpo])
def test_a_small_adapter_is_saved(
    build: Callable[..., Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base, callback = save_decoder(tmp_path / "base"), FittedRanksCallback("r2")
    config = LoraConfig(r=8, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM")
    trainer = build(base, str(tmp_path / "out"), peft_config=config, callbacks=[callback])
    trainer.train()
    trainer.save_model(tmp_path / "adapter")
    stored = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert callback.learned is not None
    assert sum(value.numel() for value in stored.values()) == callback.learned.parameters <= 2176
    assert capsys.readouterr().out.count("Ranks fitted at step 6: 8,704 to 2,") == 1
    PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), tmp_path / "adapter")


@pytest.mark.parametrize("rate", [None, 2e-4])
def test_a_default_rate_for_full_fine_tuning_is_told(
    rate: float | None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """TRL's stays 2e-5 with a `peft_config`."""
    options = {name: value for name, value in COMMON.items() if name != "learning_rate"}
    options |= {} if rate is None else {"learning_rate": rate}
    trainer = SFTTrainer(
        model=save_decoder(tmp_path / "base"),
        args=SFTConfig(output_dir=str(tmp_path / "out"), max_length=16, **options),
        train_dataset=Dataset.from_dict({"text": TEXTS}),
        peft_config=LoraConfig(r=8, target_modules="all-linear"),
        callbacks=[FittedRanksCallback("r2")],
    )
    trainer.train()
    assert capsys.readouterr().out.count("Learning rate 2e-05 ") == (rate is None)
