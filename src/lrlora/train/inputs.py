"""Inputs of a run, loaded and validated, and its record."""

from __future__ import annotations

import copy
import platform
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import datasets
import peft
import torch
import transformers
from datasets import Dataset
from transformers import TrainingArguments

from .. import __version__
from ..files import readable
from ..run_folder import ANSWERS, CHAT, RunRecord
from .chat import choose_template, rendering_of, with_answers_marked
from .data import TaskData, choose_max_length, load_task_data
from .models import MODEL_EXPECTED, check_model, hub_name, max_tokens, model_source
from .resume import fingerprints
from .settings import TrainConfig, read_run
from .tasks import Kind


@dataclass(frozen=True)
class Inputs:
    """Inputs of a run, loaded and validated.

    Attributes:
        kind: kind of the task.
        source: path or hub name of the model.
        data: examples.
        processor: tokenizer or image processor.
        untouched: copy of the processor without the length that encoding (unless cached) leaves in a tokenizer.
        max_length: truncation length in tokens; None for images.
        too_long: number of truncated examples.
        rows: rows of an epoch: examples, or fewer with packing.
        rendering: rendering of prompts and chats; None for other tasks.
        loss_on: "answers" if the loss covers only the answers of chats, else None.

    """

    kind: Kind
    source: str
    data: TaskData
    processor: Any
    untouched: Any
    max_length: int | None
    too_long: int
    rows: int
    rendering: str | None
    loss_on: str | None = None

    @classmethod
    def read(cls, config: TrainConfig) -> Inputs:
        """Load the data and the tokenizer or image processor, and check that they fit the task and the model."""
        source = model_source(config.model)
        model_config, kind = check_model(config.model, source, config.task)
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
    def count(self) -> int:
        """Number of training examples."""
        return len(self.data.splits["train"])

    def encoded(self) -> tuple[Dataset, Dataset]:
        """Encoded training and validation examples."""
        train, validation = (
            self.kind.encode(self.data.splits[name], self.processor, self.max_length)
            for name in ("train", "validation")
        )
        if self.loss_on == ANSWERS:
            train, validation = (with_answers_marked(part, self.processor) for part in (train, validation))
        return train, validation

    def record(self, config: TrainConfig, arguments: TrainingArguments, run_id: str | None) -> RunRecord:
        """Record of a run with these inputs."""
        modules = (torch, transformers, peft, datasets)
        versions = {"lrlora": __version__, "python": platform.python_version()}
        return RunRecord(
            config=asdict(config),
            labels=self.data.labels,
            max_length=self.max_length,
            versions=versions | {module.__name__: module.__version__ for module in modules},
            examples_per_step=examples_per_step(arguments),
            rendering=self.rendering,
            loss_on=self.loss_on,
            chat_template=self.processor.chat_template if self.rendering == CHAT else None,
            base_model=hub_name(config.model),
            run_id=run_id,
            fingerprints=fingerprints(self.data.splits, self.untouched, self.source, config.start_from),
        )


def examples_per_step(arguments: TrainingArguments) -> int:
    """Training examples of a step, of all processes together."""
    # `train_batch_size` counts all GPUs of a process.
    return arguments.train_batch_size * arguments.gradient_accumulation_steps * arguments.world_size
