"""From a configuration to a model with its head, the Trainer's arguments, and a Trainer."""

from __future__ import annotations

import importlib
import math
import os
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import PeftModel
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
    MODEL_FOR_MASKED_LM_MAPPING,
    MODEL_FOR_MULTIPLE_CHOICE_MAPPING,
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
)

from ..checks import require_known
from ..files import readable
from .choices import ChoiceTrainer
from .config import CHOICE_LM, TrainConfig
from .data import PREFIX
from .embedded import EMBEDDED_MODELS
from .inputs import checkpoint
from .metrics import LESS_IS_BETTER, METRIC_NAMES, METRICS

MODELS = {
    "classify": (AutoModelForSequenceClassification, MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING),
    "regress": (AutoModelForSequenceClassification, MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING),
    "multiple-choice": (AutoModelForMultipleChoice, MODEL_FOR_MULTIPLE_CHOICE_MAPPING),
    "causal-lm": (AutoModelForCausalLM, MODEL_FOR_CAUSAL_LM_MAPPING),
    CHOICE_LM: (AutoModelForCausalLM, MODEL_FOR_CAUSAL_LM_MAPPING),
}
# Peak learning rates: adapters bear more than whole models, small heads more than language models.
_RATES = {
    "adapter": dict.fromkeys(("causal-lm", CHOICE_LM), 5e-4),
    "full": dict.fromkeys(("causal-lm", CHOICE_LM), 2e-5),
}
_DEFAULT_RATE = {"adapter": 1e-3, "full": 5e-5}
MODEL_EXPECTED = "Expected is a model that transformers can load: fetch it anew, or give another."


def model_source(name: str) -> str:
    """What `from_pretrained` takes: a hub name or folder as it is, an embedded model fetched.

    Raises:
        FileNotFoundError: the name looks like a folder, and there is none.
        ValueError: the embedded model is unknown.

    """
    if name.startswith(PREFIX):
        known = name.removeprefix(PREFIX)
        require_known("embedded model", known, EMBEDDED_MODELS)
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
    with readable(config.model, MODEL_EXPECTED):
        try:
            model_config = AutoConfig.from_pretrained(source)
        except (OSError, ValueError) as error:
            if "trust_remote_code" in str(error):
                raise ValueError(
                    f"The model {config.model} needs code of its own, which is not run. Take one that transformers has."
                ) from None
            raise FileNotFoundError(
                f"{config.model} is no folder with a model, and could not be had from the hub: "
                f"{str(error).splitlines()[0]}"
            ) from None
    if type(model_config) not in MODELS[form_of(config.task, model_config)][1]:
        raise ValueError(
            f"The task {config.task} does not fit the model {config.model}: transformers has no such head for "
            f"{model_config.model_type}. Take another task or model."
        )
    # transformers has causal heads for encoders too, which look ahead unless they are told that they are decoders.
    looks_ahead = type(model_config) in MODEL_FOR_MASKED_LM_MAPPING and not getattr(model_config, "is_decoder", True)
    if config.task == "causal-lm" and looks_ahead and not model_config.is_encoder_decoder:
        raise ValueError(
            f"The task causal-lm does not fit the model {config.model}: {model_config.model_type} is an encoder, which "
            "sees the words that it is to predict. Take a decoder (Llama, Qwen, GPT-2, …)."
        )
    return model_config


def form_of(task: str, model_config: Any) -> str:
    """The task, but for multiple choice by a decoder, which has no head for it and compares likelihoods."""
    is_decoder = type(model_config) in MODEL_FOR_CAUSAL_LM_MAPPING and not model_config.is_encoder_decoder
    has_head = type(model_config) in MODEL_FOR_MULTIPLE_CHOICE_MAPPING
    return CHOICE_LM if task == "multiple-choice" and is_decoder and not has_head else task


# Their positions count from the padding token's number on.
_SHIFTED = ("roberta", "xlm-roberta", "xlm-roberta-xl", "camembert", "roberta-prelayernorm", "mpnet", "longformer")


def max_tokens(tokenizer: PreTrainedTokenizerBase, model_config: Any) -> int:
    """The longest input that tokenizer and model allow."""
    positions = getattr(model_config, "max_position_embeddings", None) or 10**9
    if model_config.model_type in _SHIFTED:
        positions -= model_config.pad_token_id + 1
    return int(min(tokenizer.model_max_length, positions))


def load_model(source: str, config: TrainConfig, labels: list[str], tokenizer: PreTrainedTokenizerBase) -> Any:
    """The model with the head of the task."""
    options: dict[str, Any] = {}
    if config.task == "classify":
        options = {"id2label": dict(enumerate(labels)), "label2id": {name: i for i, name in enumerate(labels)}}
    elif config.task == "regress":
        options = {"num_labels": 1, "problem_type": "regression"}
    # Where a new head or the whole model is trained, half precision would swallow the optimizer's steps.
    form = form_of(config.task, AutoConfig.from_pretrained(source))
    dtype = "auto" if form in ("causal-lm", CHOICE_LM) and config.method != "full" else torch.float32
    with readable(config.model, MODEL_EXPECTED):
        model = MODELS[form][0].from_pretrained(source, dtype=dtype, **options)
    if model.config.pad_token_id is None:
        model.config.pad_token_id = tokenizer.pad_token_id
    return model


def _arguments_class(task: str) -> type[TrainingArguments]:
    if task != "causal-lm":
        return TrainingArguments
    return importlib.import_module("trl").SFTConfig  # only here: TRL takes long to import


def training_arguments(
    config: TrainConfig, form: str, examples: int, max_length: int, examples_per_step: int | None = None
) -> TrainingArguments:
    """The Trainer's arguments: the defaults of the form of the task, then what the user gives.

    Args:
        config: the run.
        form: of the task.
        examples: to train on.
        max_length: tokens.
        examples_per_step: of all processes, where the batch of each is to follow from it.

    Raises:
        ValueError: a setting cannot be.

    """
    cls, given = _arguments_class(config.task), dict(config.training)
    known = list(cls.__dataclass_fields__)
    for name in given:
        require_known(f"field of {cls.__name__}", name, known)
    for name in ("output_dir", "seed"):
        if name in given:
            raise ValueError(
                f"training: {name} is a setting of the run itself. Give it as --{name.removesuffix('_dir')}."
            )
    counts = {
        "per_device_train_batch_size": 8 if config.task == "causal-lm" else 16,
        "gradient_accumulation_steps": 1,
        "max_steps": -1,
        "num_train_epochs": 3,
    }
    counts |= {name: given.pop(name) for name in counts if name in given}
    numbers = {"learning_rate": 0.0, "per_device_eval_batch_size": 1, **given, **counts}
    for name in (*counts, "learning_rate"):
        value = numbers[name]
        if not isinstance(value, (int, float)) or isinstance(value, bool) or not -math.inf < value < math.inf:
            raise ValueError(f"training: {name} must be a number, and is {value!r}.")
    for name in ("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps"):
        if not isinstance(numbers[name], int) or numbers[name] < 1:
            raise ValueError(f"training: {name} must be a whole number ≥ 1, and is {numbers[name]!r}.")
    batch, accumulation, steps, epochs = counts.values()
    # Of several processes each has a GPU; a single one is spread by the Trainer over all that it sees.
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    devices = processes if processes > 1 else max(1, torch.cuda.device_count())
    if examples_per_step is not None:
        batch, rest = divmod(examples_per_step, accumulation * devices)
        if rest or not batch:
            raise ValueError(
                f"The run takes steps of {examples_per_step} examples, which {devices} processes with "
                f"gradient_accumulation_steps={accumulation} cannot share. Resume it with another number of processes."
            )
    if steps < 0:
        batches = math.ceil(examples / (batch * devices))
        steps = math.ceil(batches / accumulation) * epochs
    kind = "full" if config.method == "full" else "adapter"
    interval = max(1, round(steps / 10))
    metric = given.pop("metric_for_best_model", METRIC_NAMES[config.task][0]).removeprefix("eval_")
    require_known(f"metric of {config.task}", metric, METRIC_NAMES[config.task])
    defaults: dict[str, Any] = {
        "output_dir": str(Path(config.output).resolve()),  # checkpoints name the best of them by it
        "max_steps": math.ceil(steps),
        "learning_rate": _RATES[kind].get(form, _DEFAULT_RATE[kind]),
        "per_device_train_batch_size": batch,
        "gradient_accumulation_steps": accumulation,
        # A language model gives numbers for its whole vocabulary, and for every choice.
        "per_device_eval_batch_size": max(1, batch // 4) if form == CHOICE_LM else 4 * batch,
        "warmup_steps": 0.06,
        "logging_steps": max(1, round(steps / 50)),
        "eval_strategy": "steps",
        "eval_steps": interval,
        "save_strategy": "steps",
        "save_steps": interval,
        "save_total_limit": 2,
        "load_best_model_at_end": True,
        "metric_for_best_model": metric,
        "greater_is_better": metric not in LESS_IS_BETTER,
        "restore_callback_states_from_checkpoint": True,  # the patience of early stopping
        "report_to": "none",
        "disable_tqdm": True,  # `Progress` draws the bar
        "dataloader_pin_memory": torch.cuda.is_available(),
        "use_cpu": not torch.cuda.is_available(),  # the table of φ needs float64, which MPS lacks
        "seed": config.seed,
    }
    if config.task == "causal-lm":
        defaults |= {"max_length": max_length, "bf16": False}
    else:
        # The Trainer multiplies the loss by the number of processes, for models that divide it by the tokens of all of
        # them; a head's loss is a mean.
        defaults["average_tokens_across_devices"] = False
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
    form = form_of(config.task, model.config)
    trainer: Trainer
    if form == "causal-lm":
        trainer = importlib.import_module("trl").SFTTrainer(**common)
    elif form == CHOICE_LM:
        trainer = ChoiceTrainer(compute_metrics=METRICS[config.task], **common)
    else:
        collator = DataCollatorForMultipleChoice if config.task == "multiple-choice" else DataCollatorWithPadding
        trainer = Trainer(data_collator=collator(tokenizer), compute_metrics=METRICS[config.task], **common)
    trainer.remove_callback(PrinterCallback)
    return trainer


def give_head_its_rate(trainer: Trainer, rate: float) -> None:
    """Move the new head, beside an adapter or on a model that is trained in full, into groups with their own rate."""
    model: Any = trainer.model
    if isinstance(model, PeftModel):
        head = {id(p) for name, p in model.named_parameters() if ".modules_to_save." in name}
    else:
        head = {id(p) for name, p in model.named_parameters() if not name.startswith(f"{model.base_model_prefix}.")}
    create = trainer.create_optimizer

    def create_optimizer(*models: Any) -> torch.optim.Optimizer:
        is_new = trainer.optimizer is None
        optimizer = create(*models)
        for group in list(optimizer.param_groups) if is_new else []:
            own = [p for p in group["params"] if id(p) in head]
            if own:
                group["params"] = [p for p in group["params"] if id(p) not in head]
                optimizer.add_param_group({**group, "params": own, "lr": rate})
        return optimizer

    # Whenever it is made: for DeepSpeed the Trainer makes it anew.
    setattr(trainer, "create_optimizer", create_optimizer)  # noqa: B010
