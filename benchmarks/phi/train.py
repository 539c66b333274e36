"""Training runs of the study of φ: one run per line of `docs/phi/runs.jsonl`, whatever order and process made it.

    OMP_NUM_THREADS=1 python benchmarks/phi/train.py dynamics comparison

runs what is still missing of the named plans, one run at a time. Start it once per core: workers share the work through
lock files. Interrupt at will; a run that was cut is done again, a finished one never.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import functools
import hashlib
import json
import math
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset, DatasetDict
from datasets.utils.logging import disable_progress_bar as disable_progress_bars
from peft import LoraConfig, get_peft_model
from plans import PLANS, Run, key, key_of
from sklearn.metrics import accuracy_score
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    Trainer,
    TrainingArguments,
    set_seed,
)
from transformers.utils import logging as transformers_logging

from lrlora import LrLoraConfig, RankCallback, rank_report
from lrlora.files import cache_folder
from lrlora.lab.inputs import MINILM, fetch
from lrlora.lab.tasks import TASKS, split_by_group, tokenize

RUNS = Path(__file__).parents[2] / "docs" / "phi" / "runs.jsonl"
TRAIN, VALIDATION, TEST = 10_000, 1_000, 2_000


def read_runs() -> list[dict[str, Any]]:
    """All finished runs."""
    return [json.loads(line) for line in RUNS.read_text().splitlines()] if RUNS.exists() else []


@functools.cache
def load(task: str) -> DatasetDict:
    """Tokenised train, validation and test. Validation comes from the training groups; each is cut to its size."""
    data = TASKS[task].load()
    train, validation = split_by_group(data["train"].to_pandas(), 0.12)
    parts = {"train": (train, TRAIN), "validation": (validation, VALIDATION), "test": (data["test"].to_pandas(), TEST)}
    data = DatasetDict()
    for name, (frame, size) in parts.items():
        frame = frame.sample(min(size, len(frame)), random_state=0)
        data[name] = Dataset.from_pandas(frame, preserve_index=False)
    tokenizer = AutoTokenizer.from_pretrained(fetch(MINILM))
    return tokenize(data, tokenizer, TASKS[task].max_tokens)


def train(run: Run) -> dict[str, Any]:
    """Do one run; its result as one flat record, with the ranks of every module."""
    data, tokenizer = load(run.task), AutoTokenizer.from_pretrained(fetch(MINILM))
    set_seed(run.seed)
    model = AutoModelForSequenceClassification.from_pretrained(fetch(MINILM), num_labels=len(TASKS[run.task].labels))
    config = {"lora": LoraConfig, "lr-lora": LrLoraConfig}[run.method]
    alpha = run.scaling * run.r
    model = get_peft_model(
        model, config(r=run.r, lora_alpha=alpha, target_modules="all-linear", task_type="SEQ_CLS", **run.options)
    )
    head = [p for name, p in model.named_parameters() if p.requires_grad and "classifier" in name]
    body = [p for name, p in model.named_parameters() if p.requires_grad and "classifier" not in name]
    groups = [{"params": body}, {"params": head, "lr": run.head_rate or run.learning_rate}]
    with tempfile.TemporaryDirectory() as folder:
        ranks = RankCallback(every=50)
        trainer = Trainer(
            model=model,
            args=TrainingArguments(
                output_dir=folder,
                max_steps=run.steps,
                learning_rate=run.learning_rate,
                per_device_train_batch_size=run.batch_size,
                per_device_eval_batch_size=64,
                warmup_steps=math.ceil(0.06 * run.steps),
                logging_steps=10,
                logging_nan_inf_filter=False,
                save_strategy="no",
                report_to="none",
                disable_tqdm=True,
                use_cpu=True,
                dataloader_pin_memory=False,
                seed=run.seed,
            ),
            train_dataset=data["train"],
            data_collator=DataCollatorWithPadding(tokenizer),
            callbacks=[ranks] if run.watch_ranks else [],
            optimizers=(torch.optim.AdamW(groups, lr=run.learning_rate, weight_decay=0), None),
        )
        seconds = trainer.train().metrics["train_runtime"]
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        result: dict[str, Any] = {
            **asdict(run),
            "seconds": seconds,
            "train_loss": float(np.mean(losses[-5:])),
            "losses": losses,
            "trainable": sum(p.numel() for p in model.parameters() if p.requires_grad),
        }
        for split in ("validation", "test"):
            if split == "test" and run.is_tuning:
                continue  # the test split is read by the runs at the chosen rate only
            prediction = trainer.predict(data[split])
            result[f"{split}_loss"] = prediction.metrics["test_loss"]
            result[f"{split}_accuracy"] = accuracy_score(prediction.label_ids, prediction.predictions.argmax(-1))
    result["history"] = [{"step": step, **report.summary()} for step, report in ranks.history]
    result["ranks"] = _ranks(model)
    return result


def _ranks(model: torch.nn.Module) -> list[dict[str, Any]] | None:
    try:
        rows = [asdict(row) for row in rank_report(model).rows]
    except ValueError:
        return None  # diverged
    for row in rows:
        layer = model.get_submodule("base_model.model." + row["module"])
        if hasattr(layer, "get_transfer_input"):
            z, phi = layer.get_transfer_input("default"), layer.lrlora_phi["default"]
            row["z_rms"] = z.square().mean().sqrt().item()
            row["outside"] = (z.abs() > phi.spec.interval).double().mean().item()
    return [{name: _short(value) for name, value in row.items()} for row in rows]


def _short(value: Any) -> Any:
    return float(f"{value:.4g}") if isinstance(value, float) else value


@contextlib.contextmanager
def claim(run: Run) -> Iterator[bool]:
    """Hold the right to do `run` until the end of the block or of the process; false if another process holds it."""
    folder = cache_folder() / "phi-study-locks"
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / hashlib.sha256(key(run).encode()).hexdigest()).open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
        else:
            yield True


def missing(plans: list[str]) -> list[Run]:
    """What the plans want and no record has, in their order."""
    finished = {key_of(result): result for result in read_runs()}
    return [run for plan in plans for run in PLANS[plan](finished) if key(run) not in finished]


def main() -> None:
    """Run what is missing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("plans", nargs="+", choices=PLANS)
    plans = parser.parse_args().plans
    transformers_logging.set_verbosity_error()
    disable_progress_bars()
    RUNS.parent.mkdir(parents=True, exist_ok=True)
    while runs := missing(plans):
        for run in runs:
            with claim(run) as is_mine:
                # The list may have aged while another worker finished this run.
                if not is_mine or run not in missing(plans):
                    continue
                print(f"{time.strftime('%H:%M')} {len(runs)} to go: {key(run)}", flush=True)
                line = json.dumps(train(run)) + "\n"
                with RUNS.open("a") as file:
                    file.write(line)
                break
        else:
            time.sleep(20)  # all that is known to be missing is being done; more may follow from it


if __name__ == "__main__":
    main()
