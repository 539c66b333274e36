"""Inputs of a run, loaded and validated."""

from __future__ import annotations

import copy
import hashlib
import json
import platform
from collections.abc import Mapping
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
from .chat import choose_template, rendering_of
from .data import TaskData, choose_max_length, dataset_name, load_task_data
from .models import MODEL_EXPECTED, check_model, hub_name, max_tokens, model_source
from .settings import TrainConfig, read_run
from .tasks import Task


@dataclass(frozen=True)
class Inputs:
    """Inputs of a run, loaded and validated.

    Attributes:
        task: task.
        source: path or hub name of the model.
        data: examples.
        processor: tokenizer or image processor.
        saved_processor: copy of the processor to save; encoding changes the truncation settings of the other.
        too_long: number of truncated examples.
        rows: rows of an epoch: examples, or fewer with packing.
        record: record of the run.

    """

    task: Task
    source: str
    data: TaskData
    processor: Any
    saved_processor: Any
    too_long: int
    rows: int
    record: RunRecord

    @classmethod
    def read(cls, config: TrainConfig) -> Inputs:
        """Load data and processor, check that they fit task and model, and make the record."""
        source = model_source(config.model)
        model_config, task = check_model(config.model, source, config.task)
        if not task.has_head and config.head_learning_rate is not None:
            raise ValueError(
                f"head_learning_rate={config.head_learning_rate!r} applies to a new head, but {config.model} answers "
                "multiple choice without one. Remove it."
            )
        data = load_task_data(config, task)
        if (start := config.start_from) is not None and (known := read_run(Path(start))[1].labels) != data.labels:
            raise ValueError(f"The run in {start} was trained with the labels {known}, but the data has {data.labels}.")
        with readable(config.model, MODEL_EXPECTED):
            processor = task.load_processor(source)
        choose_template(processor, config.chat_template)
        saved_processor = copy.deepcopy(processor)
        max_length, too_long, rows = None, 0, len(data.splits["train"])
        if task.reads_text:
            limit = max_tokens(processor, model_config)
            counts = task.lengths(data.splits["train"], processor)
            max_length = config.max_length or choose_max_length(counts, limit)
            if max_length > limit:
                raise ValueError(
                    f"max_length must be at most {limit}, the limit of the model and its tokenizer (model_max_length), "
                    f"got {max_length}."
                )
            too_long = sum(count > max_length for count in counts)
            rows = task.rows(counts, max_length, config.training)
            if task.has_head:
                saved_processor.model_max_length = max_length  # exports carry it, and whoever serves them truncates so
        rendering = rendering_of(data.splits["train"], processor) if task.generates else None
        on_answers = rendering == CHAT and config.training.get("assistant_only_loss", True)
        modules = (torch, transformers, peft, datasets)
        record = RunRecord(
            config=asdict(config),
            labels=data.labels,
            max_length=max_length,
            versions={"lrlora": __version__, "python": platform.python_version()}
            | {module.__name__: module.__version__ for module in modules},
            data_sums=data_sums(data.splits),
            rendering=rendering,
            loss_on=ANSWERS if on_answers else None,
            chat_template=processor.chat_template if rendering == CHAT else None,
            base_model=hub_name(config.model),
            dataset=dataset_name(config.data),
            pipeline=task.pipeline,
            model_class=task.model_class.__name__,
        )
        return cls(task, source, data, processor, saved_processor, too_long, rows, record)

    @property
    def count(self) -> int:
        """Number of training examples."""
        return len(self.data.splits["train"])

    def encoded(self) -> tuple[Dataset, Dataset]:
        """Training and validation examples for the Trainer; TRL tokenizes those of causal-lm."""
        train, validation = (
            self.task.encode(self.data.splits[name], self.processor, self.record.max_length)
            for name in ("train", "validation")
        )
        return train, validation


def examples_per_step(arguments: TrainingArguments) -> int:
    """Training examples of a step, of all processes together."""
    # `train_batch_size` counts all GPUs of a process.
    return arguments.train_batch_size * arguments.gradient_accumulation_steps * arguments.world_size


def data_sums(splits: Mapping[str, Dataset]) -> dict[str, str]:
    """SHA-256 of the examples of each split; of images, their content, not their path."""
    return {name: _sum_of(data) for name, data in splits.items()}


def _sum_of(data: Dataset) -> str:
    digest = hashlib.sha256()
    for table in data.with_format("arrow").iter(batch_size=1000):
        for row in table.to_pylist():
            if isinstance(image := row.get("image"), dict):
                digest.update(image["bytes"] or Path(image["path"]).read_bytes())
                del row["image"]
            digest.update(json.dumps(row, default=str).encode())
    return digest.hexdigest()
