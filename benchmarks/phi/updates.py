"""Real updates to fit φ(BA) to: ΔW* of full fine-tuning, for several tasks, two models and two optimizers.

    python benchmarks/phi/updates.py

Each is kept in the cache folder, as one safetensors file per run and step, and made once.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from datasets import Dataset
from safetensors.torch import save_file
from torch import Tensor, nn
from train import load
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorForLanguageModeling,
    DataCollatorWithPadding,
    get_linear_schedule_with_warmup,
    set_seed,
)

from lrlora.files import cache_folder
from lrlora.lab.inputs import MINILM, SMOLLM2, fetch
from lrlora.lab.tasks import TASKS

FOLDER = cache_folder() / "phi-study-updates"
SMOLLM2_LAYERS = 10


@dataclass(frozen=True)
class Source:
    """One full fine-tuning.

    Args:
        model: "minilm" (classification) or "smollm2" (its first 10 layers, causal language modelling).
        task: a key of `TASKS`.
        optimizer: "adam" or "sgd".
        learning_rate: peak; 6 % warm-up, linear decay. A new head learns 10 times as fast.
        steps: after which ΔW* is kept.
        batch_size: examples a step.

    """

    model: str
    task: str
    optimizer: str
    learning_rate: float
    steps: int
    batch_size: int = 16

    def path(self) -> Path:
        """Where ΔW* is kept."""
        name = f"{self.model}-{self.task}-{self.optimizer}-{self.learning_rate:g}-{self.steps}x{self.batch_size}"
        return FOLDER / f"{name}.safetensors"


SOURCES = (
    Source("minilm", "20-newsgroups", "adam", 2e-4, 200),
    Source("minilm", "20-newsgroups", "sgd", 0.05, 200),
    Source("minilm", "movie-reviews", "adam", 2e-4, 200),
    Source("minilm", "movie-reviews", "sgd", 0.05, 200),
    Source("smollm2", "movie-reviews", "adam", 1e-4, 100, batch_size=8),
    Source("smollm2", "movie-reviews", "sgd", 0.02, 100, batch_size=8),
    Source("minilm", "r8", "adam", 2e-4, 200),
    Source("minilm", "vitaminc", "adam", 2e-4, 200),
    Source("minilm", "20-newsgroups", "adam", 2e-4, 50),
    Source("minilm", "20-newsgroups", "adam", 2e-5, 200),
    Source("minilm", "20-newsgroups", "adam", 2e-4, 200, batch_size=4),
)


def _minilm(task: str) -> tuple[nn.Module, Dataset, DataCollatorWithPadding]:
    model = AutoModelForSequenceClassification.from_pretrained(fetch(MINILM), num_labels=len(TASKS[task].labels))
    return model, load(task)["train"], DataCollatorWithPadding(AutoTokenizer.from_pretrained(fetch(MINILM)))


def _smollm2(task: str) -> tuple[nn.Module, Dataset, DataCollatorForLanguageModeling]:
    path = fetch(SMOLLM2)
    tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    model = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
    model.model.layers = model.model.layers[:SMOLLM2_LAYERS]
    data = TASKS[task].load()["train"]
    data = data.map(lambda batch: tokenizer(batch["text"], truncation=True, max_length=64), batched=True)
    data = data.select_columns(["input_ids", "attention_mask"])
    return model, data, DataCollatorForLanguageModeling(tokenizer, mlm=False)


def fine_tune(source: Source) -> tuple[dict[str, Tensor], list[float]]:
    """(ΔW* by module, training losses). Embeddings and what is not a linear layer are left frozen."""
    set_seed(0)
    model, data, collator = {"minilm": _minilm, "smollm2": _smollm2}[source.model](source.task)
    linears = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and ("layer." in name or "layers." in name)
    }
    model.requires_grad_(False)
    heads = [module for name, module in model.named_modules() if name == "classifier"]
    for module in [*linears.values(), *heads]:
        module.requires_grad_()
    before = {name: module.weight.detach().clone() for name, module in linears.items()}
    rate = source.learning_rate
    groups = [
        {"params": [p for module in linears.values() for p in module.parameters()]},
        {"params": [p for module in heads for p in module.parameters()], "lr": 10 * rate},
    ]
    parameters = [p for group in groups for p in group["params"]]
    optimizer: torch.optim.Optimizer
    if source.optimizer == "adam":
        optimizer = torch.optim.AdamW(groups, lr=rate, weight_decay=0)
    else:
        optimizer = torch.optim.SGD(groups, lr=rate, momentum=0.9)
    schedule = get_linear_schedule_with_warmup(optimizer, round(0.06 * source.steps), source.steps)
    loader = torch.utils.data.DataLoader(data, source.batch_size, shuffle=True, collate_fn=collator)
    model.train()
    losses: list[float] = []
    while len(losses) < source.steps:
        for batch in loader:
            loss = model(**batch).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            losses.append(loss.item())
            if len(losses) == source.steps:
                break
    return {name: (module.weight.detach() - before[name]) for name, module in linears.items()}, losses


def main() -> None:
    """Make what is missing."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    for source in SOURCES:
        path = source.path()
        if path.exists():
            continue
        updates, losses = fine_tune(source)
        partial = path.with_suffix(".partial")
        save_file(updates, partial, {"losses": json.dumps(losses)})
        partial.rename(path)
        print(path.name, f"loss {sum(losses[:10]) / 10:.3f} → {sum(losses[-10:]) / 10:.3f}", flush=True)


if __name__ == "__main__":
    main()
