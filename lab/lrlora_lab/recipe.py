"""A recipe as people own it, on SmolLM2 and 150 chats: LoRA r = 16, shrunk, cut while training, and its rivals.

    python -m lrlora_lab.recipe shrink lora-r4 --seed 1

Prints a line of JSON per arm: parameters, largest rank, and the loss of unseen chats, over all tokens and over the
answers, measured on the saved adapter without lrlora.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl.trainer.sft_config import SFTConfig
from trl.trainer.sft_trainer import SFTTrainer

import lrlora
from lrlora.checks import require_known
from lrlora.train.models import model_source

from .inputs import load_chats
from .study_tasks import Data

TRAINED, HELD_OUT, STEPS, LENGTH = 150, 180, 60, 192
# Arm → rank, α, learning rate, and how it is cut.
ARMS: dict[str, tuple[int, int, float, dict[str, Any]]] = {
    "none": (0, 0, 0.0, {}),
    "lora-r16": (16, 32, 2e-4, {}),
    "shrink": (16, 32, 2e-4, {"keep": 0.99}),
    "size-r4": (16, 32, 2e-4, {"size": "r4"}),
    "keep-95": (16, 32, 2e-4, {"keep": 0.95, "at": 0.3}),
    "lora-r2-8e-4": (2, 4, 8e-4, {}),
    "lora-r2-16e-4": (2, 4, 16e-4, {}),
    "lora-r4": (4, 8, 2e-4, {}),
    "lora-r4-4e-4": (4, 8, 4e-4, {}),
    "lora-r4-8e-4": (4, 8, 8e-4, {}),
    "lora-r4-alpha32": (4, 32, 2e-4, {}),
    "lora-r16-8e-4": (16, 32, 8e-4, {}),
    "shrink-8e-4": (16, 32, 8e-4, {"keep": 0.99}),
    "keep-95-8e-4": (16, 32, 8e-4, {"keep": 0.95, "at": 0.3}),
    "keep-99-8e-4": (16, 32, 8e-4, {"keep": 0.99, "at": 0.6}),
}


def main(arguments: list[str]) -> None:
    """Train and score arms, by default all."""
    parser = argparse.ArgumentParser(prog="python -m lrlora_lab.recipe")
    parser.add_argument("arms", nargs="*")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args(arguments)
    arms, seed = given.arms, given.seed
    for arm in arms or ARMS:
        require_known("arm", arm, ARMS)
    source, data = model_source("embedded:smollm2"), load_chats()
    tokenizer, rows = AutoTokenizer.from_pretrained(source), data["train"].shuffle(seed=seed)
    train, held_out = rows.select(range(TRAINED)), rows.select(range(TRAINED, TRAINED + HELD_OUT))
    for arm in arms or ARMS:
        rank, alpha, rate, cut = ARMS[arm]
        model: Any = AutoModelForCausalLM.from_pretrained(source)
        row: dict[str, Any] = {"arm": arm, "seed": seed}
        with tempfile.TemporaryDirectory() as folder:
            if rank:
                options: dict[str, Any] = {
                    "max_steps": STEPS,
                    "learning_rate": rate,
                    "lr_scheduler_type": "cosine",
                }
                options |= {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "loss_type": "nll"}
                options |= {"per_device_eval_batch_size": 4, "max_length": LENGTH, "save_strategy": "no"}
                options |= {"report_to": "none", "use_cpu": True, "bf16": False, "disable_tqdm": True}
                sft = SFTConfig(folder, seed=SFTConfig.seed + seed, **options)
                lora = LoraConfig(r=rank, lora_alpha=alpha, lora_dropout=0.05, target_modules="all-linear")
                trainer = SFTTrainer(
                    source,
                    args=sft,
                    train_dataset=train,
                    eval_dataset=held_out,
                    processing_class=tokenizer,
                    peft_config=lora,
                )
                if cut:
                    trainer.add_callback(lrlora.FittedRanksCallback(trainer=trainer, **cut))
                trainer.train()
                trainer.save_model(folder)
                stored = load_file(Path(folder) / "adapter_model.safetensors")
                row["parameters"] = sum(tensor.numel() for tensor in stored.values())
                row["largest_rank"] = max(len(tensor) for name, tensor in stored.items() if "lora_A" in name)
                model = PeftModel.from_pretrained(model, folder)
            print(json.dumps(row | losses(model, tokenizer, data["test"])), flush=True)


def load_recipe(seed: int) -> Data:
    """SmolLM2 and the recipe's chats, of a seed, for a loop of one's own."""
    source, data = model_source("embedded:smollm2"), load_chats()
    tokenizer, rows = AutoTokenizer.from_pretrained(source), data["train"].shuffle(seed=seed)
    texts = [
        tokenizer.apply_chat_template(messages, tokenize=False)
        for messages in rows.select(range(TRAINED + HELD_OUT))["messages"]
    ]
    generator = torch.Generator().manual_seed(seed)

    def batch(chosen: list[int]) -> Any:
        options = {"truncation": True, "max_length": LENGTH, "padding": True, "add_special_tokens": False}
        encoded = dict(tokenizer([texts[row] for row in chosen], return_tensors="pt", **options))
        return {**encoded, "labels": encoded["input_ids"].masked_fill(encoded["attention_mask"] == 0, -100)}

    def batches() -> Iterator[Any]:
        while True:
            for chosen in torch.randperm(TRAINED, generator=generator)[: TRAINED // 8 * 8].split(8):
                yield batch(chosen.tolist())

    held_out = [batch(list(range(first, first + 4))) for first in range(TRAINED, TRAINED + HELD_OUT, 4)]
    model = AutoModelForCausalLM.from_pretrained(source)
    modules = r".*\.(\w+_proj)"
    return Data(
        model, modules, batches, held_out, lambda model: {"loss": losses(model, tokenizer, data["test"])["all"]}
    )


@torch.no_grad()
def losses(model: Any, tokenizer: Any, chats: Any) -> dict[str, float]:
    """Mean loss in nats per token of chats, over all tokens and over the answers."""
    model.eval()
    sums = {"all": [0.0, 0], "answers": [0.0, 0]}
    for messages in chats["messages"]:
        text, before = (
            tokenizer.apply_chat_template(part, tokenize=False, add_generation_prompt=part is not messages)
            for part in (messages, messages[:-1])
        )
        ids = tokenizer(text, return_tensors="pt", add_special_tokens=False)["input_ids"][:, :LENGTH]
        start = len(tokenizer(before, add_special_tokens=False)["input_ids"]) - 1
        scores = model(input_ids=ids).logits[0, :-1].float().log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0]
        for name, part in (("all", scores), ("answers", scores[start:])):
            sums[name][0] -= part.sum().item()
            sums[name][1] += len(part)
    return {name: round(total / count, 4) for name, (total, count) in sums.items()}


if __name__ == "__main__":
    main(sys.argv[1:])
