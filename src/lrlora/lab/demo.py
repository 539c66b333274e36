"""LR-LoRA beside plain LoRA on real data: the same model, rank, seed, steps and learning rate."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from datasets import DatasetDict
from peft import LoraConfig, PeftConfig, get_peft_model
from sklearn.metrics import accuracy_score
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    EvalPrediction,
    Trainer,
    TrainingArguments,
    set_seed,
)

from ..callback import RankCallback
from ..files import write_json
from ..rank import RankReport, rank_report
from ..report.card import write_card
from ..run_folder import LOG_FILE, METRICS_FILE, REPORT_FILE, last_whole_checkpoint
from ..tuner import LrLoraConfig
from .inputs import MINILM, fetch
from .tasks import MOVIE_REVIEW_TASK, tokenize

METHODS = {"lr-lora": LrLoraConfig, "lora": LoraConfig}
SETTINGS_FILE = "settings.json"


@dataclass(frozen=True)
class DemoSettings:
    """What both methods share.

    Args:
        steps: optimizer steps.
        r: rank of BA; α = r, so the scaling is 1.
        learning_rate: peak, after a warm-up over 6 % of the steps; linear decay to 0.
        batch_size: snippets a step.
        seed: of head, factors and data order.

    """

    steps: int = 300
    r: int = 8
    learning_rate: float = 2e-3
    batch_size: int = 32
    seed: int = 0


@dataclass(frozen=True)
class DemoResult:
    """One method's outcome.

    Attributes:
        method: "lr-lora" or "lora".
        accuracy: on the held-out films.
        standard_error: of that accuracy, from the number of snippets.
        seconds: of training, without evaluation; of a resumed run, extrapolated from the steps it still had to do.
        trainable_parameters: adapter and classification head.

    """

    method: str
    accuracy: float
    standard_error: float
    seconds: float
    trainable_parameters: int


def run_demo(
    output: Path,
    settings: DemoSettings,
    *,
    overwrite: bool = False,
    announce: Callable[[str], None] = print,
    illustrate: Callable[[Path], None] | None = None,
) -> dict[str, DemoResult]:
    """Fine-tune MiniLM-L6 on movie-review sentiment with LR-LoRA and with LoRA.

    Writes `<output>/<method>/` for each: the adapter, `ranks.json`, `ranks.csv`, the histories of ranks and losses;
    and `<output>/results.json`. Everything is written under `<output>.partial` and renamed at the end. An interrupted
    run is resumed from there by calling again with the same settings. `announce` is given what is being done, and
    `illustrate` each method's folder, to draw the picture of its model card.

    Raises:
        FileExistsError: `output` exists, or an unfinished run with other settings, and `overwrite` is not set; or
            the folder to replace is not a demo's.
        RuntimeError: the model or the data could not be downloaded.

    """
    work = output.with_name(output.name + ".partial")
    settings_file = work / SETTINGS_FILE
    if output.exists():
        _require_replaceable(output, overwrite)
    if work.exists() and not (settings_file.exists() and json.loads(settings_file.read_text()) == asdict(settings)):
        _require_replaceable(work, overwrite)
        shutil.rmtree(work)
    work.mkdir(parents=True, exist_ok=True)
    write_json(settings_file, asdict(settings))

    announce("Fetching MiniLM-L6 and the film reviews, unless they are in the cache …")
    tokenizer = AutoTokenizer.from_pretrained(fetch(MINILM))
    data = tokenize(MOVIE_REVIEW_TASK.load(), tokenizer, MOVIE_REVIEW_TASK.max_tokens)
    results = {}
    for name in METHODS:
        announce(f"Training with {name}: {settings.steps} steps of {settings.batch_size} snippets, r = {settings.r} …")
        results[name] = _train(name, work / name, settings, data, DataCollatorWithPadding(tokenizer), illustrate)
    write_json(work / "results.json", [asdict(result) for result in results.values()])
    if output.exists():
        shutil.rmtree(output)
    work.rename(output)
    return results


def _require_replaceable(folder: Path, overwrite: bool) -> None:
    if not overwrite:
        raise FileExistsError(
            f"The folder {folder} exists already and holds another run. Give another --output, or replace it with "
            "--overwrite."
        )
    if any(folder.iterdir()) and not (folder / SETTINGS_FILE).exists():
        raise FileExistsError(f"The folder {folder} was not written by the demo: remove it yourself, or give another.")


def load_reports(output: Path) -> dict[str, RankReport]:
    """The rank reports that `run_demo` wrote, by method."""
    return {name: RankReport.from_json(output / name / REPORT_FILE) for name in METHODS}


def _train(
    method: str,
    folder: Path,
    settings: DemoSettings,
    data: DatasetDict,
    collator: DataCollatorWithPadding,
    illustrate: Callable[[Path], None] | None,
) -> DemoResult:
    finished = folder / "result.json"
    if finished.exists():
        return DemoResult(**json.loads(finished.read_text()))
    set_seed(settings.seed)
    base = AutoModelForSequenceClassification.from_pretrained(fetch(MINILM), num_labels=len(MOVIE_REVIEW_TASK.labels))
    model = get_peft_model(base, _adapter_config(method, settings))
    trainer = Trainer(
        model=model,
        args=_arguments(folder, settings),
        train_dataset=data["train"],
        eval_dataset=data["test"],
        data_collator=collator,
        compute_metrics=_accuracy,
        callbacks=[RankCallback(every=50)],
    )
    checkpoint = last_whole_checkpoint(folder) if folder.exists() else None
    first_step = int(checkpoint.name.rpartition("-")[2]) if checkpoint else 0
    outcome = trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    accuracy = trainer.evaluate()["eval_accuracy"]
    result = DemoResult(
        method=method,
        accuracy=accuracy,
        standard_error=math.sqrt(accuracy * (1 - accuracy) / len(data["test"])),
        seconds=outcome.metrics["train_runtime"] * settings.steps / max(1, settings.steps - first_step),
        trainable_parameters=sum(p.numel() for p in model.parameters() if p.requires_grad),
    )
    model.save_pretrained(str(folder))
    report = rank_report(model)
    report.to_json(folder / REPORT_FILE)
    report.to_csv(folder / "ranks.csv")
    for leftover in folder.glob("checkpoint-*"):
        shutil.rmtree(leftover)
    write_json(folder / LOG_FILE, trainer.state.log_history)
    write_json(folder / METRICS_FILE, {"accuracy": accuracy})
    if illustrate is not None:
        illustrate(folder)
    write_card(folder)
    write_json(finished, asdict(result))
    return result


def _adapter_config(method: str, settings: DemoSettings) -> PeftConfig:
    return METHODS[method](r=settings.r, lora_alpha=settings.r, target_modules="all-linear", task_type="SEQ_CLS")


def _arguments(folder: Path, settings: DemoSettings) -> TrainingArguments:
    return TrainingArguments(
        output_dir=str(folder),
        max_steps=settings.steps,
        learning_rate=settings.learning_rate,
        per_device_train_batch_size=settings.batch_size,
        per_device_eval_batch_size=2 * settings.batch_size,
        warmup_steps=math.ceil(0.06 * settings.steps),
        logging_steps=25,
        save_steps=50,
        save_total_limit=1,
        report_to="none",
        disable_tqdm=False,  # a progress bar at any log level
        dataloader_pin_memory=torch.cuda.is_available(),
        use_cpu=not torch.cuda.is_available(),  # no other accelerator has the float64 that the table of φ needs
        seed=settings.seed,
    )


def _accuracy(prediction: EvalPrediction) -> dict[str, float]:
    labels = torch.as_tensor(prediction.predictions).argmax(-1)
    return {"accuracy": float(accuracy_score(prediction.label_ids, labels))}
