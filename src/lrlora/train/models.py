"""Creates the model with its head, the Trainer's arguments, and the Trainer."""

from __future__ import annotations

import math
import os
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, get_type_hints

import torch
from datasets import Dataset
from peft import PeftModel
from transformers import (
    AutoConfig,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    get_scheduler,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING
from transformers.trainer_utils import SchedulerType

from ..checks import require_known, require_type
from ..files import readable
from ..sources import is_hub_name
from .embedded import EMBEDDED, EMBEDDED_MODELS, check_spelling, checkpoint
from .tasks import Task, task_for
from .tasks.base import LESS_IS_BETTER

MODEL_EXPECTED = "Expected a model that transformers can load. Download it again, or choose another."


def model_source(name: str) -> str:
    """Argument of `from_pretrained`: a hub name or folder, or a fetched embedded model.

    Raises:
        FileNotFoundError: the name is a missing path.
        ValueError: the embedded model is unknown.

    """
    require_model_folder(name)
    if name.startswith(EMBEDDED):
        return str(checkpoint(EMBEDDED_MODELS[name.removeprefix(EMBEDDED)].source))
    return name


def require_model_folder(name: str) -> None:
    """Check a model name without using the hub.

    Raises:
        FileNotFoundError: the folder or its model is missing, or it is nearly an embedded name.
        ValueError: the embedded model is unknown.

    """
    path = Path(name)
    if name.startswith(EMBEDDED):
        require_known("embedded model", name.removeprefix(EMBEDDED), EMBEDDED_MODELS)
        return
    if path.is_dir() and not (path / "config.json").is_file():
        if (path / "adapter_config.json").is_file():
            raise FileNotFoundError(f"The folder {name} contains an adapter, not a model. Pass its base model.")
        raise FileNotFoundError(f"The folder {name} contains no model: it has no config.json.")
    if not path.is_dir():
        missing = f"There is no model folder {name}."
        check_spelling(name, missing, EMBEDDED_MODELS, is_path=not is_hub_name(name))


def hub_name(name: str) -> str | None:
    """Hub name of a model; None for a folder."""
    if name.startswith(EMBEDDED):
        return EMBEDDED_MODELS[name.removeprefix(EMBEDDED)].hub_name
    return None if Path(name).exists() else name


def check_model(name: str, source: str, task_name: str) -> tuple[Any, Task]:
    """Configuration of a model, and the task.

    Args:
        name: as given by the user.
        source: argument of `from_pretrained`.
        task_name: name of the task.

    Raises:
        FileNotFoundError: the model does not exist.
        ValueError: transformers has no head for the task on this architecture.

    """
    with readable(name, MODEL_EXPECTED):
        try:
            model_config = AutoConfig.from_pretrained(source)
        except (OSError, ValueError) as error:
            if "trust_remote_code" in str(error):
                raise ValueError(
                    f"The model {name} requires custom code, which is not run. Choose a model that "
                    "transformers supports."
                ) from None
            raise FileNotFoundError(
                f"{name} is not a local model folder, and could not be loaded from the hub: "
                f"{str(error).splitlines()[0]}"
            ) from None
    task = task_for(task_name, model_config)
    if type(model_config) not in task.architectures:
        raise ValueError(
            f"The task {task_name} does not fit the model {name}: transformers has no such head for "
            f"{model_config.model_type}. Choose another task or model."
        )
    # transformers also has causal heads for encoders, which look ahead unless configured as decoders.
    looks_ahead = type(model_config) in MODEL_FOR_MASKED_LM_MAPPING and not getattr(model_config, "is_decoder", True)
    if task.generates and looks_ahead and not model_config.is_encoder_decoder:
        raise ValueError(
            f"The task causal-lm does not fit the model {name}: {model_config.model_type} is an encoder, "
            "which sees the tokens to predict. Choose a decoder (Llama, Qwen, GPT-2, …)."
        )
    return model_config, task


# Position ids of these models start after the padding token's id.
_SHIFTED = ("roberta", "xlm-roberta", "xlm-roberta-xl", "camembert", "roberta-prelayernorm", "mpnet", "longformer")


def max_positions(model_config: Any) -> int:
    """Maximum number of positions of a model; 10⁹ if unlimited (XLNet reports -1)."""
    positions = int(getattr(model_config, "max_position_embeddings", None) or -1)
    return positions if positions > 0 else 10**9


def max_tokens(tokenizer: Any, model_config: Any) -> int:
    """Maximum input length of tokenizer and model."""
    positions = max_positions(model_config)
    if model_config.model_type in _SHIFTED:
        positions -= model_config.pad_token_id + 1
    return int(min(tokenizer.model_max_length, positions))


def load_model(
    name: str, source: str, task: Task, labels: list[str], processor: Any, *, in_float32: bool
) -> tuple[Any, list[str]]:
    """Load the model with the task's head.

    Args:
        name: model as given by the user.
        source: argument of `from_pretrained`.
        task: its task.
        labels: class names.
        processor: the model's tokenizer or image processor.
        in_float32: load in float32 also without a new head.

    Returns:
        The model, and the names of the modules that the checkpoint lacks.

    """
    # When a new head or the whole model is trained, half precision would lose the optimizer's steps.
    dtype = torch.float32 if task.has_head or in_float32 else "auto"
    with readable(name, MODEL_EXPECTED):
        model, loading = task.model_class.from_pretrained(
            source, dtype=dtype, output_loading_info=True, **task.model_options(labels)
        )
    mismatched = [key for key, *_ in loading["mismatched_keys"] if key.startswith(f"{model.base_model_prefix}.")]
    if mismatched:
        raise ValueError(f"The weight {mismatched[0]} of {name} does not fit its config.json. {MODEL_EXPECTED}")
    if task.reads_text and model.config.pad_token_id is None:
        model.config.pad_token_id = processor.pad_token_id
    return model, _new_modules(model, {*loading["missing_keys"], *(key for key, *_ in loading["mismatched_keys"])})


def _new_modules(model: Any, weights: set[str]) -> list[str]:
    """Modules of these weights: those of the base model, and whole heads, as PEFT saves them."""
    owners = {name.rpartition(".")[0] for name in weights} - {""}
    prefix = f"{model.base_model_prefix}."
    return sorted({name if name.startswith(prefix) else name.partition(".")[0] for name in owners})


def training_arguments(
    task: Task,
    fields: Mapping[str, Any],
    output: str | Path,
    *,
    rows: int = 1,
    max_length: int | None = None,
    examples_per_step: int | None = None,
) -> TrainingArguments:
    """The Trainer's arguments: the task's defaults, overridden by the user.

    Args:
        task: task.
        fields: fields set by the user.
        output: output folder.
        rows: rows of an epoch.
        max_length: in tokens; None for images.
        examples_per_step: total over all processes; determines the batch size of each.

    Raises:
        ValueError: a setting is invalid.

    """
    cls = task.arguments_class()
    fields = dict(fields)
    for name in ("eval_do_concat_batches", "batch_eval_metrics"):
        fields.pop(name, None)  # metrics take all batches as one
    batch = fields.pop("per_device_train_batch_size", task.batch_size)
    accumulation = fields.pop("gradient_accumulation_steps", 1)
    steps, epochs = fields.pop("max_steps", -1), fields.pop("num_train_epochs", 3)
    # Each of several processes has one GPU; a single process uses all visible ones.
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    devices = processes if processes > 1 else max(1, torch.cuda.device_count())
    if examples_per_step is not None:
        batch, remainder = divmod(examples_per_step, accumulation * devices)
        if remainder or not batch:
            raise ValueError(
                f"The run uses {examples_per_step} examples per step, which cannot be divided among {devices} "
                f"processes with gradient_accumulation_steps={accumulation}. Resume it with another number of "
                "processes."
            )
    if steps < 0:
        steps = math.ceil(math.ceil(rows / (batch * devices)) / accumulation) * epochs
    if steps > _MAX_STEPS:
        raise ValueError(f"Training would take {steps:g} steps, which is too many. Reduce the steps or epochs.")
    interval = max(round(steps / 10), min(math.ceil(steps), _FEWEST_STEPS_BETWEEN_EVALUATIONS))
    metric = fields.pop("metric_for_best_model", task.kept_by or task.metrics[0]).removeprefix("eval_")
    require_known(f"metric of {task.name}", metric, task.metrics)
    defaults = {
        "max_steps": math.ceil(steps),
        "learning_rate": task.rate,
        "per_device_train_batch_size": batch,
        "gradient_accumulation_steps": accumulation,
        "eval_steps": fields.get("save_steps", interval),  # the best checkpoint must be a saved one
        "save_steps": fields.get("eval_steps", interval),
        "logging_steps": max(1, round(steps / 50)),
        "metric_for_best_model": metric,
        "greater_is_better": metric not in LESS_IS_BETTER,
        "output_dir": str(Path(output).resolve()),  # checkpoints refer to the best one by this path
        "dataloader_pin_memory": torch.cuda.is_available(),
        "use_cpu": not torch.cuda.is_available(),  # the table of φ needs float64, which MPS lacks
    }
    if fields.get("eval_strategy") == "no":
        defaults["load_best_model_at_end"] = False  # no best checkpoint exists
    try:
        arguments = cls(**{**_ALWAYS, **defaults, **task.arguments(max_length, batch), **fields})
    except (TypeError, ValueError) as error:
        raise ValueError(f"training: {error}") from None
    options: Any = arguments.lr_scheduler_kwargs
    steps = arguments.max_steps
    try:
        optimizer, warmup = torch.optim.SGD([torch.zeros(1)], 1.0), arguments.get_warmup_steps(steps)
        schedule: Any = get_scheduler(arguments.lr_scheduler_type, optimizer, warmup, steps, options)
        rates = [rate(step) for rate in getattr(schedule, "lr_lambdas", ()) for step in (0, steps // 2, steps)]
        if not all(map(math.isfinite, rates)):
            raise ValueError("its rates are not finite")
    except Exception as error:  # schedules can raise anything for arguments of any type
        raise ValueError(
            f"training: lr_scheduler_kwargs={options!r} is invalid for "
            f"lr_scheduler_type={SchedulerType(arguments.lr_scheduler_type).value} ({type(error).__name__}: {error})."
        ) from None
    return arguments


_FEWEST_STEPS_BETWEEN_EVALUATIONS = 20
_MAX_STEPS = 10**9
_ALWAYS: dict[str, Any] = {
    "warmup_steps": 0.06,
    "eval_strategy": "steps",
    "save_strategy": "steps",
    "save_total_limit": 2,
    "load_best_model_at_end": True,
    "restore_callback_states_from_checkpoint": True,  # patience of early stopping
    "report_to": "none",
    "disable_tqdm": True,  # `Progress` shows the bar
}


_REFUSED = {
    "label_names": "is not supported. Remove it",
    "hub_token": "would be saved with the run. Set HF_TOKEN instead, or `hf auth login`",
    "resume_from_checkpoint": "has no effect. Use: lrlora train --resume FOLDER",
    "output_dir": "is a setting of the run. Pass it as --output",
    "push_to_hub": "is not supported. Upload the finished run: hf upload USER/NAME FOLDER",
}
# Checked here, because the Trainer would fail only during training.
_MINIMA = {
    "per_device_train_batch_size": 1,
    "per_device_eval_batch_size": 1,
    "gradient_accumulation_steps": 1,
    "eval_accumulation_steps": 1,
    "dataloader_num_workers": 0,
    "neftune_noise_alpha": 0,
    "adam_epsilon": 0,
}


def check_arguments(fields: Mapping[str, Any], task: Task) -> None:
    """Raise ValueError for values that the Trainer rejects late or never."""
    types = get_type_hints(task.arguments_class())
    if fields.get("prediction_loss_only") and task.metrics[0] != "loss":
        raise ValueError(
            "training: prediction_loss_only=True is not supported, because the metrics need predictions. Remove it."
        )
    for name, value in fields.items():
        if name in _REFUSED:
            raise ValueError(f"training: {name} {_REFUSED[name]}.")
        if name in types:
            require_type(value, types[name], f"training: {name}")
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"training: {name} must be finite, got {value!r}.")
        if value is not None and name in _MINIMA and value < _MINIMA[name]:
            raise ValueError(f"training: {name} must be ≥ {_MINIMA[name]}, got {value!r}.")
    for name, limit in (("learning_rate", math.inf), ("adam_beta1", 1), ("adam_beta2", 1)):
        if not 0 < (value := fields.get(name, 0.9)) < limit:
            raise ValueError(f"training: {name} must be between 0 and {limit:g}, got {value!r}.")


def make_trainer(
    task: Task,
    model: Any,
    processor: Any,
    arguments: TrainingArguments,
    train_data: Dataset,
    validation: Dataset,
    callbacks: list[TrainerCallback],
) -> Trainer:
    """Trainer of a task, on encoded examples; TRL encodes them itself."""
    trainer = task.trainer(
        processor, model=model, args=arguments, callbacks=callbacks, train_dataset=train_data, eval_dataset=validation
    )
    trainer.remove_callback(PrinterCallback)
    make_loader = trainer.get_eval_dataloader

    def get_eval_dataloader(*data: Any) -> Any:
        drop_last, arguments.dataloader_drop_last = arguments.dataloader_drop_last, False
        try:
            return make_loader(*data)
        finally:
            arguments.dataloader_drop_last = drop_last

    # An evaluation reads all examples, also where training drops the last batch.
    untyped: Any = trainer
    untyped.get_eval_dataloader = get_eval_dataloader
    return trainer


def give_head_its_rate(trainer: Trainer, factor: float, modules: Collection[str]) -> None:
    """Move the head, next to an adapter or in full fine-tuning, to parameter groups with its own rate.

    Args:
        trainer: before it creates its optimizer.
        factor: its peak learning rate over the Trainer's.
        modules: paths of the head's modules; empty for all that are trained in full beside an adapter.

    """
    model: Any = trainer.model
    if isinstance(model, PeftModel):
        places = [f".{module}.modules_to_save." for module in modules] or [".modules_to_save."]
        head = {id(p) for name, p in model.named_parameters() if any(place in f".{name}" for place in places)}
    else:
        head = {id(p) for name, p in model.named_parameters() if not name.startswith(f"{model.base_model_prefix}.")}
    create = trainer.create_optimizer

    def create_optimizer(*models: Any) -> torch.optim.Optimizer:
        is_new = trainer.optimizer is None
        optimizer = create(*models)
        for group in list(optimizer.param_groups) if is_new else []:
            new = [p for p in group["params"] if id(p) in head]
            if new:
                group["params"] = [p for p in group["params"] if id(p) not in head]
                optimizer.add_param_group({**group, "params": new, "lr": factor * group["lr"]})
        # Of sharded checkpoints, PyTorch restores no empty group but the last.
        optimizer.param_groups = [group for group in optimizer.param_groups if group["params"]]
        return optimizer

    # Wraps every creation: for DeepSpeed, the Trainer creates it again.
    untyped: Any = trainer
    untyped.create_optimizer, untyped.head_factor = create_optimizer, factor
