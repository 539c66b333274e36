"""Inputs of a run, loaded and validated, and the plan and record written before the start."""

from __future__ import annotations

import copy
import math
import platform
import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from statistics import median
from typing import Any

import datasets
import peft
import torch
import transformers
from datasets import Dataset
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers import Trainer, TrainingArguments
from transformers.trainer_utils import SchedulerType

from .. import __version__
from ..files import readable
from ..learned_ranks import LearnedRanksCallback, planned_cut
from ..run_folder import ANSWERS, CHAT, PLAIN, TEXT, RunRecord
from .chat import choose_template, format_of, rendering_of, with_answers_marked, without_answer
from .data import TaskData, choose_max_length, load_task_data
from .methods import METHODS
from .models import MODEL_EXPECTED, check_model, hub_name, max_tokens, model_source
from .same_run import fingerprints
from .settings import TrainConfig, read_run
from .tasks import Kind, kind_for


@dataclass(frozen=True)
class Inputs:
    """Inputs of a run, loaded and validated."""

    kind: Kind
    source: str  # of the model
    data: TaskData
    processor: Any  # tokenizer or image processor
    untouched: Any  # copy without the length that encoding (unless cached) leaves in a tokenizer
    max_length: int | None  # in tokens; None for images
    too_long: int  # number of truncated examples
    rows: int  # rows of an epoch: examples, or fewer with packing
    rendering: str | None  # of prompts and chats
    loss_on: str | None = None  # "answers", or None for all predicted tokens

    @classmethod
    def read(cls, config: TrainConfig) -> Inputs:
        source = model_source(config.model)
        model_config = check_model(source, config)
        kind = kind_for(config.task, model_config)
        if not kind.has_head and config.head_learning_rate is not None:
            raise ValueError(
                f"head_learning_rate={config.head_learning_rate!r} applies to a new head, but {config.model} answers "
                "multiple choice without one. Remove it."
            )
        data = load_task_data(config, kind)
        if (start := config.start_from) is not None and (known := read_run(Path(start))[1].labels) != data.labels:
            raise ValueError(f"The run in {start} was trained with the labels {known}, but the data has {data.labels}.")
        with readable(config.model, MODEL_EXPECTED):
            processor = kind.load_processor(source)
        if not kind.reads_text:
            return cls(kind, source, data, processor, processor, None, 0, len(data.splits["train"]), None)
        choose_template(processor, config.chat_template)
        untouched = copy.deepcopy(processor)
        limit = max_tokens(processor, model_config)
        counts = kind.lengths(data.splits["train"], processor)
        max_length = config.max_length or choose_max_length(counts, limit)
        if max_length > limit:
            raise ValueError(f"max_length must be at most {limit}, the limit of the model, got {max_length}.")
        too_long = sum(count > max_length for count in counts)
        rows = kind.rows(counts, max_length, config.training)
        rendering = rendering_of(data.splits["train"], processor) if kind.generates else None
        is_whole = not config.training.get("assistant_only_loss", True)
        loss_on = None if is_whole or rendering != CHAT else ANSWERS
        return cls(kind, source, data, processor, untouched, max_length, too_long, rows, rendering, loss_on)

    @property
    def examples(self) -> int:
        """Number."""
        return len(self.data.splits["train"])

    def encoded(self) -> tuple[Dataset, Dataset]:
        """Training, validation."""
        train, validation = (
            self.kind.encode(self.data.splits[name], self.processor, self.max_length)
            for name in ("train", "validation")
        )
        if self.loss_on == ANSWERS:
            train, validation = (with_answers_marked(part, self.processor) for part in (train, validation))
        return train, validation


def plan(config: TrainConfig, inputs: Inputs, model: nn.Module, arguments: Any) -> list[str]:
    """Summary of the run in a few lines."""
    counts = [(p.numel(), p.requires_grad) for p in model.parameters()]
    trainable = sum(count for count, is_trained in counts if is_trained)
    schedule, splits = SchedulerType(arguments.lr_scheduler_type).value, inputs.data.splits
    evaluates = arguments.eval_strategy != "no"
    evaluation = f"evaluation every {arguments.eval_steps:g} steps" if evaluates else "evaluation only at the end"
    examples = _examples_per_step(arguments)
    epochs = arguments.max_steps / max(1, math.ceil(inputs.rows / examples))
    return [
        f"Plan: {config.method} on {config.model}, {config.task}: {trainable:,} trainable parameters "
        f"({trainable / sum(count for count, _ in counts):.2%} of all), {arguments.max_steps} steps of {examples} "
        f"examples, {epochs:.2g} epochs.",
        *_adapter_lines(config.method, model),
        *_learning_lines(config, model, arguments),
        *([] if config.start_from is None else [f"Starts from: {config.start_from}."]),
        f"Data: {len(splits['train']):,} training and {len(splits['validation']):,} validation examples{_cut(inputs)}.",
        *inputs.data.notes,
        f"Learning rate {arguments.learning_rate:g} with schedule {schedule} and {_warm_up(arguments)} of warm-up, "
        f"{evaluation}, seed {config.seed}.",
    ]


def _warm_up(arguments: TrainingArguments) -> str:
    steps = arguments.warmup_steps
    return f"{100 * steps:g} %" if 0 < steps < 1 else f"{steps:g} steps"


def _adapter_lines(method: str, model: nn.Module) -> list[str]:
    """Rank, α and targets; and a warning about ranks that exceed a layer's size."""
    if not isinstance(model, PeftModel):
        return []
    config: Any = model.peft_config["default"]
    layers: list[Any] = [m for m in model.modules() if isinstance(m, BaseTunerLayer)]
    r = getattr(config, "target_r", None) if method == "adalora" else getattr(config, "r", None)
    name = METHODS[method].alpha
    alpha = f", α = {getattr(config, name):g}" if name else ""
    # PEFT replaces "all-linear" by the modules it finds.
    targets = config.target_modules
    told = (
        targets if isinstance(targets, str) else ", ".join(sorted({path.rpartition(".")[2] for path in targets or ()}))
    )
    lines = [f"Adapter: {method}, r = {r}{alpha}, on {told} ({len(layers)} modules)."]
    limits = [min(each.in_features, each.out_features) for each in layers if hasattr(each, "in_features")]
    if r and (narrow := [limit for limit in limits if limit < r]):
        lines.append(
            f"Warning: r = {r} exceeds the maximum rank of {len(narrow)} of {len(layers)} layers ({min(narrow)})."
        )
    return lines


def _learning_lines(config: TrainConfig, model: Any, arguments: TrainingArguments) -> list[str]:
    """When the adapter is cut, and to how many parameters."""
    if config.size is None or not config.learns_ranks:
        return []
    size, step = planned_cut(config.size, model, arguments)
    return [f"Ranks: learned; after {step} steps, the loss decides which {size:,} parameters stay."]


def _cut(inputs: Inputs) -> str:
    if inputs.max_length is None:
        return ""
    return f"; {inputs.too_long:,} training examples are truncated to {inputs.max_length} tokens"


def encoded_lines(chat_template: str | None, trainer: Trainer, inputs: Inputs) -> Iterator[str]:
    """Data format, examples that TRL drops, and the first example as the model reads it."""
    if inputs.rendering is not None:
        yield f"Format: {_format_line(chat_template, inputs)}"
        if unanswered := without_answer(inputs.data.splits["train"]):
            last = " The loss leaves their last turns out." if inputs.loss_on == ANSWERS else ""
            yield f"Warning: {unanswered:,} of {inputs.examples:,} chats do not end with an answer.{last}"
    encoded, arguments = trainer.train_dataset, trainer.args
    if not len(encoded):  # type: ignore[arg-type]
        raise ValueError(
            f"No example has an answer within its first {inputs.max_length} tokens. Increase --max-length, or use "
            "shorter chats."
        )
    left = inputs.examples - len(encoded)  # type: ignore[arg-type]
    if left and not getattr(arguments, "packing", False):
        yield (
            f"Skipped {left:,} of {inputs.examples:,} examples, whose first {inputs.max_length} tokens contain "
            "nothing to compute the loss on."
        )
    first = next(iter(encoded))  # type: ignore[arg-type]
    yield inputs.kind.shown(first, inputs.processor, inputs.data.labels)


def _format_line(given: str | None, inputs: Inputs) -> str:
    """Detected data format and rendering."""
    found = format_of(inputs.data.splits["train"].column_names)
    template = "the model's own chat template" if given is None else f"the chat template {given}"
    how = {CHAT: f"as chats, rendered with {template}", PLAIN: "as plain text, without a template", TEXT: "as is"}
    part = ", with the loss on the answers" if inputs.loss_on == ANSWERS else ""
    return f"{found.name}, read {how[str(inputs.rendering)]}{part}."


def cut_line(trainer: Trainer) -> str:
    """Size and ranks of an adapter that was cut, or that it was not."""
    for callback in trainer.callback_handler.callbacks:
        if isinstance(callback, LearnedRanksCallback) and callback.learned and callback.learned.ranks is None:
            return (
                f"Warning: training ended before the cut after step {callback.learned.cut_step}: the adapter is wide."
            )
    model: Any = trainer.model
    layers: list[Any] = [layer for layer in model.modules() if isinstance(layer, LoraLayer)]
    ranks = sorted(layer.r["default"] for layer in layers)
    size = sum(p.numel() for layer in layers for name, p in layer.named_parameters() if "lora_" in name)
    return f"Ranks: {size:,} parameters in {len(ranks)} modules, r = {ranks[0]} to {ranks[-1]}."


def seconds_per_batch(trainer: Trainer) -> float:
    """Time of a forward and backward pass, the median of three after one more."""
    model: Any = trainer.model
    model.train()
    times = []
    for batch in islice(trainer.get_train_dataloader(), 4):
        start = time.perf_counter()
        with trainer.compute_loss_context_manager():
            loss: Any = trainer.compute_loss(model, batch)
        loss.backward()
        times.append(time.perf_counter() - start)
    return median(times[1:] or times)


def record_of(config: TrainConfig, inputs: Inputs, arguments: TrainingArguments, run_id: str | None) -> RunRecord:
    """Record of a run."""
    modules = (torch, transformers, peft, datasets)
    versions = {"lrlora": __version__, "python": platform.python_version()}
    return RunRecord(
        config=config.to_dict(),
        labels=inputs.data.labels,
        max_length=inputs.max_length,
        versions=versions | {module.__name__: module.__version__ for module in modules},
        examples_per_step=_examples_per_step(arguments),
        rendering=inputs.rendering,
        loss_on=inputs.loss_on,
        chat_template=inputs.processor.chat_template if inputs.rendering == CHAT else None,
        base_model=hub_name(config.model),
        run_id=run_id,
        fingerprints=fingerprints(inputs.data.splits, inputs.untouched, inputs.source, config.start_from),
    )


def _examples_per_step(arguments: TrainingArguments) -> int:
    # `train_batch_size` counts all GPUs of a process.
    return arguments.train_batch_size * arguments.gradient_accumulation_steps * arguments.world_size
