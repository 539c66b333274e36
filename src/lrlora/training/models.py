"""From a configuration to a model with its head, the Trainer's arguments, and a Trainer."""

from __future__ import annotations

import importlib
import math
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForMultipleChoice,
    AutoModelForSequenceClassification,
    DataCollatorForMultipleChoice,
    DataCollatorWithPadding,
    PreTrainedTokenizerBase,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_MULTIPLE_CHOICE_MAPPING,
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
)

from .config import TrainConfig, require_known
from .data import PREFIX
from .embedded import EMBEDDED_MODELS
from .inputs import checkpoint
from .metrics import BEST_METRIC, METRICS

MODELS = {
    "classify": (AutoModelForSequenceClassification, MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING),
    "regress": (AutoModelForSequenceClassification, MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING),
    "multiple-choice": (AutoModelForMultipleChoice, MODEL_FOR_MULTIPLE_CHOICE_MAPPING),
    "causal-lm": (AutoModelForCausalLM, MODEL_FOR_CAUSAL_LM_MAPPING),
}
# Peak learning rates: adapters bear more than whole models, small heads more than language models.
_RATES = {"adapter": {"causal-lm": 5e-4}, "full": {"causal-lm": 2e-5}}
_DEFAULT_RATE = {"adapter": 1e-3, "full": 5e-5}


def model_source(name: str) -> str:
    """What `from_pretrained` takes: a hub name or folder as it is, an embedded model fetched.

    Raises:
        FileNotFoundError: the name looks like a folder, and there is none.
        ValueError: the embedded model is unknown.

    """
    if name.startswith(PREFIX):
        known = name.removeprefix(PREFIX)
        require_known("an embedded model", known, EMBEDDED_MODELS)
        return str(checkpoint(EMBEDDED_MODELS[known].source))
    path = Path(name)
    if (path.is_absolute() or name.startswith(".")) and not path.is_dir():
        raise FileNotFoundError(f"There is no model folder {name}.")
    return name


def check_model(source: str, config: TrainConfig) -> Any:
    """The configuration of a model that the task fits.

    Raises:
        FileNotFoundError: there is no such model.
        ValueError: transformers has no head for the task on this architecture.

    """
    try:
        model_config = AutoConfig.from_pretrained(source)
    except (OSError, ValueError) as error:
        raise FileNotFoundError(
            f"{config.model} is no folder with a model, and could not be had from the hub: {str(error).splitlines()[0]}"
        ) from None
    mapping = MODELS[config.task][1]
    if type(model_config) not in mapping:
        raise ValueError(
            f"The task {config.task} does not fit the model {config.model}: transformers has no such head for "
            f"{model_config.model_type}. Take another task or model."
        )
    return model_config


def load_model(source: str, config: TrainConfig, labels: list[str], tokenizer: PreTrainedTokenizerBase) -> Any:
    """The model with the head of the task."""
    options: dict[str, Any] = {}
    if config.task == "classify":
        options = {"id2label": dict(enumerate(labels)), "label2id": {name: i for i, name in enumerate(labels)}}
    elif config.task == "regress":
        options = {"num_labels": 1, "problem_type": "regression"}
    model = MODELS[config.task][0].from_pretrained(source, dtype="auto", **options)
    if model.config.pad_token_id is None:
        model.config.pad_token_id = tokenizer.pad_token_id
    return model


def _arguments_class(task: str) -> type[TrainingArguments]:
    if task != "causal-lm":
        return TrainingArguments
    return importlib.import_module("trl").SFTConfig  # only here: TRL takes long to import


def training_arguments(config: TrainConfig, examples: int, max_length: int) -> TrainingArguments:
    """The Trainer's arguments: the defaults of the task, then what the user gives."""
    cls, given = _arguments_class(config.task), dict(config.training)
    known = list(cls.__dataclass_fields__)
    for name in given:
        require_known(f"a field of {cls.__name__}", name, known)
    batch = given.get("per_device_train_batch_size", 8 if config.task == "causal-lm" else 16)
    accumulation = given.get("gradient_accumulation_steps", 1)
    steps = given.get("max_steps", -1)
    if steps < 0:
        steps = math.ceil(math.ceil(examples / batch) / accumulation) * given.pop("num_train_epochs", 3)
    kind = "full" if config.method == "full" else "adapter"
    interval = max(1, round(steps / 10))
    metric, more_is_better = BEST_METRIC[config.task]
    defaults: dict[str, Any] = {
        "output_dir": config.output,
        "max_steps": math.ceil(steps),
        "learning_rate": _RATES[kind].get(config.task, _DEFAULT_RATE[kind]),
        "per_device_train_batch_size": batch,
        "per_device_eval_batch_size": 4 * batch,
        "warmup_steps": 0.06,
        "logging_steps": max(1, round(steps / 50)),
        "eval_strategy": "steps",
        "eval_steps": interval,
        "save_strategy": "steps",
        "save_steps": interval,
        "save_total_limit": 2,
        "load_best_model_at_end": True,
        "metric_for_best_model": metric,
        "greater_is_better": more_is_better,
        "report_to": "none",
        "disable_tqdm": True,  # `Progress` draws the bar
        "dataloader_pin_memory": torch.cuda.is_available(),
        "use_cpu": not torch.cuda.is_available(),  # the table of φ needs float64, which MPS lacks
        "seed": config.seed,
    }
    if config.task == "causal-lm":
        defaults |= {"max_length": max_length, "bf16": False}
    try:
        return cls(**{**defaults, **given})
    except (TypeError, ValueError) as error:
        raise ValueError(f"training: {error}") from None


def make_trainer(
    config: TrainConfig,
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    arguments: TrainingArguments,
    train_data: Dataset,
    validation: Dataset,
    callbacks: list[TrainerCallback],
) -> Trainer:
    """The Trainer of a task, on encoded examples; TRL's, which encodes them itself, for "causal-lm"."""
    common: dict[str, Any] = {"model": model, "args": arguments, "processing_class": tokenizer, "callbacks": callbacks}
    common |= {"train_dataset": train_data, "eval_dataset": validation}
    if config.task == "causal-lm":
        trl = importlib.import_module("trl")
        trainer: Trainer = trl.SFTTrainer(**common)
    else:
        collator = DataCollatorForMultipleChoice if config.task == "multiple-choice" else DataCollatorWithPadding
        trainer = Trainer(data_collator=collator(tokenizer), compute_metrics=METRICS[config.task], **common)
    trainer.remove_callback(PrinterCallback)
    return trainer
