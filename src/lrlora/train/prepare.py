"""Before a run: checks that need neither data nor model; then model and Trainer, checked, and the plan announced.

Nothing of the run is written yet.
"""

from __future__ import annotations

import json
import math
import os
import warnings
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from peft import PeftModel, get_peft_model
from torch import nn
from transformers import Trainer, TrainerCallback, set_seed

from ..files import readable, require_no_input
from ..learned.callback import FittedRanksCallback
from ..learned.cut import FEWEST_STEPS
from ..learned.held_out import require_measurable
from ..learned.search import FEWEST_UNITS, SPLITS
from ..lora.live import require_plain_lora
from ..ranks.report import read_history
from ..run_folder import (
    HISTORY_FILE,
    METRICS_FILE,
    RunRecord,
    last_whole_checkpoint,
    require_new_run,
    resume_hint,
)
from ..sources import ADAPTER_EXPECTED
from .adapter_config import adapter_config
from .compression import FEWEST
from .data import require_data_path
from .inputs import Inputs
from .methods import METHODS
from .models import (
    check_arguments,
    give_head_its_rate,
    load_model,
    make_trainer,
    require_model_folder,
    training_arguments,
)
from .plan import describe_encoded, plan
from .progress import Announce
from .settings import FROM_TRAIN, TrainConfig, read_run, require_settings
from .tasks import TASKS

_LARGEST_SHARE = 0.2  # largest share of the data that a message advises to hold out
# Learning rate of a new head over that of the adapter, of one layer and of more: lab/studies/heads.md.
HEAD_FACTOR, DEEP_HEAD_FACTOR = 16, 8
_MANY_STEPS = 10**6  # for checks of a configuration before the number of steps is known


def require_startable(config: TrainConfig, *, resume: bool = False, overwrite: bool = False) -> RunRecord | None:
    """Run all checks that need neither data nor model.

    Returns:
        Record of the run to resume, if any.

    Raises:
        FileExistsError: the output folder is in use, or its run is finished.
        FileNotFoundError: the run to resume, model folder, or data file is missing.
        ValueError: a setting is unknown or not supported, both resume and overwrite are given, or the method cannot
            resume.

    """
    output = Path(config.output)
    if resume and overwrite:
        raise ValueError(
            f"--resume continues the run in {output}, but --overwrite would delete it. Pass only one of them."
        )
    resumed = None
    if resume:
        _, resumed = read_run(output)
        if not METHODS[config.method].can_resume:
            raise ValueError(
                f"Runs of {config.method} cannot be resumed, because PEFT does not save the state of the rank "
                "allocation. Start a new run."
            )
        if (output / METRICS_FILE).exists():
            raise FileExistsError(
                f"The run in {output} is finished, so there is nothing to resume. To train it further, start a new "
                f"run: lrlora train --start-from {output} --output NEW, with changed settings such as --steps or "
                "--data."
            )
        read_history(output / HISTORY_FILE)  # continued when resuming
    else:
        require_new_run(output, overwrite=overwrite)
    if overwrite:
        inputs = ("model", "data", "validation", "start_from", "chat_template")
        require_no_input(output, **{name: getattr(config, name) for name in inputs})
    require_model_folder(config.model)
    if config.start_from is not None:
        _check_start_from(config)
    for data in (config.data, config.validation):
        if data not in (None, FROM_TRAIN):
            require_data_path(str(data))
    for place, given in (("training", config.training), ("adapter", config.adapter)):
        require_settings(given, place, config.task, config.method)
    _require_whole(config.training)
    check_arguments(config.arguments, TASKS[config.task])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT warns when training begins
        adapter_config(config.method, TASKS[config.task].adapter_fields, _MANY_STEPS, config.adapter_fields)
    return resumed


def _require_whole(training: Mapping[str, Any]) -> None:
    """Raise ValueError if the Trainer's arguments or `accelerate launch` would shard the model."""
    for name in ("fsdp", "deepspeed"):
        if training.get(name) or os.environ.get(f"ACCELERATE_USE_{name.upper()}", "").lower() == "true":
            raise ValueError(
                f"lrlora train does not shard a model, but {name} is set. Use a script with the Trainer "
                "(docs/cookbook.md, Several GPUs), or several processes with a whole model each (torchrun)."
            )


def _check_start_from(config: TrainConfig) -> None:
    """Raise ValueError unless the run to start from is finished, with the same model, task, method and adapter."""
    start, _ = read_run(Path(str(config.start_from)))
    if not (Path(start.output) / METRICS_FILE).exists():
        raise ValueError(f"The run in {start.output} is not finished. {resume_hint(start.output)}")
    for name in ("model", "task", "method", "adapter_fields"):
        theirs, mine = getattr(start, name), getattr(config, name)
        if theirs != mine:
            name = name.removesuffix("_fields")
            raise ValueError(f"{name} must be the same as in {start.output}, {theirs!r}, got {mine!r}.")


def require_same_run(output: Path, began: RunRecord, now: RunRecord) -> None:
    """Raise ValueError, with the names of what changed, unless a run has the settings and data that it began with."""
    before, mine = (json.loads(json.dumps(record.config | {"output": None})) for record in (began, now))
    changed = [
        f"the setting {name} ({before[name]!r} before, {mine[name]!r} now)"
        for name in mine
        if before.get(name) != mine[name]
    ]
    changed += [
        f"the {words} data"
        for name, words in (("train", "training"), ("validation", "validation"))
        if began.data_sums.get(name) != now.data_sums[name]
    ]
    if changed:
        raise ValueError(
            f"The run in {output} cannot be resumed, because its inputs changed: {'; '.join(changed)}. "
            "Restore them, or start a new run with another --output."
        )


def last_checkpoint(output: Path, trainer: Trainer, announce: Announce) -> Path | None:
    """Checkpoint to resume from; None: from the start."""
    last = last_whole_checkpoint(output)
    if last is not None and trainer.args.save_only_model:
        announce(
            "Warning: checkpoints have no state of the optimizer (save_only_model), so the results will differ from "
            "those of an uninterrupted run."
        )
    return last


def prepare(
    config: TrainConfig,
    inputs: Inputs,
    callbacks: list[TrainerCallback],
    announce: Announce,
) -> Trainer:
    """Create and check the Trainer of a run, and announce its plan.

    Args:
        config: the run.
        inputs: its inputs. `record.examples_per_step`, if set, fixes the examples per step of all processes together.
        callbacks: of the Trainer.
        announce: receives the plan and the first example, line by line.

    Raises:
        ValueError: a setting is invalid, or does not fit the data.

    """
    arguments = training_arguments(
        inputs.task,
        config.arguments,
        config.output,
        rows=inputs.rows,
        max_length=inputs.record.max_length,
        examples_per_step=inputs.record.examples_per_step,
    )
    count = len(inputs.data.splits["validation"])
    fewest = SPLITS * FEWEST_UNITS if config.keep is not None else FEWEST if inputs.task.has_head else 0
    is_measured = config.filled_by or (config.keep is not None and config.learns_ranks)
    if is_measured and count < fewest:
        raise ValueError(
            f"{count} validation examples are too few to measure what a smaller LoRA keeps; at least {fewest} are "
            "needed. Raise --validation-share, or remove --keep and --size."
        )
    if (rank := _rank_of_short(config, arguments.max_steps)) is not None:
        announce(f"Ranks: {arguments.max_steps} steps are too few to learn them, so r = {rank} in all modules.")
        config = replace(config, size=None, rank=rank, alpha=None, targets=None, adapter=config.fields_at(rank))
        callbacks = [each for each in callbacks if not isinstance(each, FittedRanksCallback)]
    why = _why_not_measurable(arguments.max_steps, count, inputs.rows) if config.is_default_cut else None
    if why is not None:
        config = _left_whole(config)
    model, new_modules = _adapted_model(config, inputs, arguments.max_steps)
    head_factor: float | None = _head_factor(model, new_modules) if new_modules else None
    if config.head_learning_rate is not None:
        head_factor = config.head_learning_rate / arguments.learning_rate
    if why is not None:
        require_plain_lora(model)  # as where ranks are fitted
        announce(f"Ranks: {why}, so they are not fitted: r = {config.adapter['r']} in all modules.")
    planned = plan(config, inputs, model, arguments, head_factor)
    trainer = make_trainer(inputs.task, model, inputs.processor, arguments, *inputs.encoded(), callbacks)
    if config.learns_ranks and config.size is None and (reason := _why_unmeasured(trainer)):
        if not config.is_default_cut:
            raise ValueError(reason)
        config = _left_whole(config)
        announce(f"Ranks: not fitted, r = {config.adapter['r']} in all modules. {reason}")
        planned = plan(config, inputs, model, arguments, head_factor)
    for line in planned:
        announce(line)
    if config.cut is not None and config.learns_ranks and config.size is None:
        trainer.add_callback(FittedRanksCallback(**config.cut.options, trainer=trainer))
    for line in describe_encoded(trainer, inputs):
        announce(line)
    if head_factor is not None:
        give_head_its_rate(trainer, head_factor, new_modules)
    return trainer


def _head_factor(model: Any, modules: list[str]) -> int:
    """Learning rate over that of the adapter, of modules that are trained in full beside it."""
    originals = [model.get_base_model().get_submodule(module).original_module for module in modules]
    layers = [layer for module in originals for layer in module.modules() if isinstance(layer, nn.Linear)]
    return HEAD_FACTOR if len(layers) == 1 else DEEP_HEAD_FACTOR


def _left_whole(config: TrainConfig) -> TrainConfig:
    """Configuration of the same LoRA without a cut."""
    of_lora: dict[str, Any] = {"rank": None, "alpha": None, "targets": None, "adapter": config.wide_fields}
    return replace(config, keep=None, cut_at=None, cut_rate=None, **of_lora)


def _why_unmeasured(trainer: Trainer) -> str:
    """Why the gain of the Trainer's adapter cannot be measured; empty if it can."""
    try:
        require_measurable(trainer)
    except ValueError as error:
        return str(error)
    return ""


def _rank_of_short(config: TrainConfig, steps: int) -> int | None:
    """Rank of a LoRA of the size, if there are too few steps to learn ranks; None otherwise."""
    size = None if config.cut is None or not config.learns_ranks else config.cut.size
    if size is None or steps >= FEWEST_STEPS or config.start_from is not None:
        return None
    return int(size.number) if size.unit == "ranks" else None


def _why_not_measurable(steps: int, examples: int, trained: int) -> str | None:
    """Why a share of the gain cannot be measured while training, and the remedy; None if it can."""
    needed, total = SPLITS * FEWEST_UNITS, examples + trained
    if steps < FEWEST_STEPS:
        return f"{steps} steps are fewer than {FEWEST_STEPS}"
    if examples >= needed:
        return None
    # A small table is worth more as training data than as a smaller adapter.
    is_large = total >= needed / _LARGEST_SHARE
    remedy = f" (pass --validation-share {math.ceil(105 * needed / total) / 100:g})" if is_large else ""
    return f"{examples} validation examples are fewer than {needed}{remedy}"


def _adapted_model(config: TrainConfig, inputs: Inputs, steps: int) -> tuple[Any, list[str]]:
    """Model to train, with its adapter, if any, and the modules beside the adapter that are not trained yet."""
    adapter: Any = adapter_config(config.method, inputs.task.adapter_fields, steps, config.wide_fields)
    set_seed(config.seed)
    model, new = load_model(
        config.model, inputs.source, inputs.task, inputs.data.labels, inputs.processor, in_float32=adapter is None
    )
    if adapter is None:
        return model, []
    is_tied = inputs.task.generates and model.config.get_text_config().tie_word_embeddings
    if is_tied and getattr(adapter, "trainable_token_indices", None):
        raise ValueError(
            f"adapter: trainable_token_indices is not supported for {config.model}, whose embeddings are tied to its "
            "output layer: TRL cannot take the loss of PEFT's wrapper around it. Remove it."
        )
    # Save randomly initialized modules with the adapter, or a reloaded model would have different ones.
    adapter.modules_to_save = list(dict.fromkeys([*(adapter.modules_to_save or []), *new])) or None
    if config.start_from is not None:
        with readable(config.start_from, ADAPTER_EXPECTED):
            return PeftModel.from_pretrained(model, config.start_from, is_trainable=True), []
    return get_peft_model(model, adapter), new
