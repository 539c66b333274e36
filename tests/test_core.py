"""The core on its required packages alone, which `.ci/run` installs at their lowest versions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

import lrlora


class Sequences(torch.utils.data.Dataset[dict[str, torch.Tensor]]):
    """Sequences that count up, each from another token."""

    def __init__(self, first: int, count: int) -> None:
        self.tokens = (torch.arange(first, first + count)[:, None] + torch.arange(8)) % 32

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self.tokens[index], "labels": self.tokens[index]}


def base() -> Any:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "vocab_size": 32}
    return LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=2, num_key_value_heads=2))


def trainer_of(folder: Path, config: Any) -> Trainer:
    options: dict[str, Any] = {"max_steps": 60, "per_device_train_batch_size": 16, "learning_rate": 2e-2}
    arguments = TrainingArguments(str(folder), **options, use_cpu=True, report_to="none", save_strategy="no")
    data = {"train_dataset": Sequences(0, 512), "eval_dataset": Sequences(512, 128)}
    return Trainer(get_peft_model(base(), config), arguments, **data)


@pytest.mark.parametrize("at", [0.5, 1.0])
def test_the_rate_is_found_and_the_adapter_cut(at: float, tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path, LoraConfig(r=8, lora_alpha=16, target_modules="all-linear"))
    assert lrlora.find_learning_rate(trainer).rate == trainer.args.learning_rate
    callback = lrlora.FittedRanksCallback(keep=0.9, at=at, trainer=trainer)
    trainer.add_callback(callback)
    trainer.train()
    record = callback.shrunk
    assert record is not None
    assert record.parameters < record.whole
    trainer.save_model(str(tmp_path / "small"))
    model, inputs = PeftModel.from_pretrained(base(), str(tmp_path / "small")), Sequences(0, 2)[0]
    ids = inputs["input_ids"][None]
    assert torch.allclose(model.eval()(ids).logits, trainer.model.eval()(ids).logits, atol=1e-5)
    assert sum(p.numel() for n, p in model.named_parameters() if "lora_" in n) == record.parameters


def test_lr_lora_is_trained_and_reported(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path, lrlora.LrLoraConfig(r=2, target_modules="all-linear"))
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    assert trainer.evaluate()["eval_loss"] < before
    assert all(row.stable_rank >= 1 for row in lrlora.rank_report(trainer.model).rows)
    trainer.save_model(str(tmp_path / "adapter"))
    model = PeftModel.from_pretrained(base(), str(tmp_path / "adapter")).eval()
    ids = Sequences(0, 2)[0]["input_ids"][None]
    assert torch.equal(model(ids).logits, trainer.model.eval()(ids).logits)
