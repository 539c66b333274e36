"""What a kind of task is: what it reads from the data, how that is checked and encoded, what comes out."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from datasets import Dataset
from torch import Tensor, nn
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    EvalPrediction,
    Trainer,
    TrainingArguments,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING

from ...ranks import model_loss
from ..cells import counted, mapped, require_text
from ..chat import shown_tokens


class Kind:
    """A kind of task.

    Attributes:
        name: as `lrlora train --task` calls it.
        roles: what the columns of the data hold, each called by its role unless `columns` says otherwise.
        optional_roles: of columns that are read if they are there.
        metrics: that may choose the best checkpoint; the first, unless given.
        criterion: the metric that chooses the learning rate in a comparison, a loss that holds nothing but the task.
        has_head: whether the model gets a new head.
        reads_text: whether its examples are cut at a number of tokens, and not images.
        generates: whether its answers are texts.
        adapter_fields: of the PEFT configuration, for the head.
        batch_size: examples of a step on each device, unless given.
        rates: peak learning rates of an adapter and of full fine-tuning, unless given: adapters bear more than whole
            models, small heads more than language models.
        model_class, architectures: transformers' class with the head, and the configurations that have one.
        collator: makes a batch of encoded examples.

    """

    name: ClassVar[str]
    roles: ClassVar[tuple[str, ...]]
    optional_roles: ClassVar[tuple[str, ...]] = ("group",)
    metrics: ClassVar[tuple[str, ...]]
    criterion: ClassVar[str] = "loss"
    has_head: ClassVar[bool] = True
    reads_text: ClassVar[bool] = True
    generates: ClassVar[bool] = False
    adapter_fields: ClassVar[Mapping[str, Any]] = {"task_type": "SEQ_CLS"}
    batch_size: ClassVar[int] = 16
    rates: ClassVar[tuple[float, float]] = (1e-3, 5e-5)
    model_class: ClassVar[Any] = AutoModelForSequenceClassification
    architectures: ClassVar[Any] = MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING
    collator: ClassVar[Any] = DataCollatorWithPadding

    def columns(self, given: Mapping[str, str], there: list[str], *, with_label: bool) -> dict[str, str]:
        """Role → column that must be there, from what the user says of some.

        Raises:
            ValueError: the data has none of the columns that the task can be read from.

        """
        return {role: given.get(role, role) for role in self.roles if with_label or role != "label"}

    def as_read(self, data: Dataset) -> Dataset:
        """The columns of a split as all that follows takes them."""
        return data

    def check(self, data: Dataset, split: str, *, with_label: bool) -> None:
        """Raise a ValueError that says which rows cannot be used, and why."""
        for role in ("text", "text_pair"):
            if role in data.column_names:
                require_text(data, role, split)

    def class_names(self, data: Dataset) -> list[str]:
        """The classes of the training data; none unless there are classes.

        Raises:
            ValueError: there is nothing to tell apart.

        """
        return []

    def load_processor(self, source: str | Path) -> Any:
        """What makes a model's inputs of examples: its tokenizer, or its image processor."""
        tokenizer = AutoTokenizer.from_pretrained(source)
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
        return tokenizer

    def lengths(self, data: Dataset, processor: Any) -> list[int]:
        """How long every example is, in tokens, before it is cut."""

        def count(batch: dict[str, list[Any]]) -> list[int]:
            return [len(ids) for ids in processor(batch["text"], batch.get("text_pair"))["input_ids"]]

        return counted(data, count)

    def rows(self, lengths: list[int], max_length: int, training: Mapping[str, Any]) -> int:
        """How many rows examples of these lengths become in training, under the Trainer's arguments that are given."""
        return len(lengths)

    def encode(self, data: Dataset, processor: Any, max_length: int | None) -> Dataset:
        """What the model reads, tokens cut at `max_length`, and `labels`."""

        def encode(batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
            return dict(processor(batch["text"], batch.get("text_pair"), truncation=True, max_length=max_length))

        return mapped(data, encode)

    def model_options(self, labels: list[str]) -> dict[str, Any]:
        """What `from_pretrained` is given for the head."""
        return {}

    def arguments_class(self) -> type[TrainingArguments]:
        """The class of the Trainer's arguments."""
        return TrainingArguments

    def arguments(self, max_length: int | None, batch: int) -> dict[str, Any]:
        """Defaults of the Trainer's arguments, for batches of `batch` examples in training."""
        # The Trainer multiplies the loss by the number of processes, for models that divide it by the tokens of all of
        # them; a head's loss is a mean.
        return {"per_device_eval_batch_size": 4 * batch, "average_tokens_across_devices": False}

    def trainer(self, processor: Any, **arguments: Any) -> Trainer:
        """The Trainer, on encoded examples."""
        collator = self.collator(processor)
        arguments |= {"processing_class": processor, "compute_metrics": self.score}
        return Trainer(data_collator=collator, **arguments)

    def loss(self, model: nn.Module, batch: Mapping[str, Any]) -> tuple[Tensor, int]:
        """The sum of the loss terms of a batch, and how many there are."""
        return model_loss(model, batch)

    def score(self, prediction: EvalPrediction) -> dict[str, float]:
        """The metrics, but the loss."""
        raise NotImplementedError

    def unlabelled(self, encoded: Dataset) -> Dataset:
        """Encoded examples that have no labels, as the Trainer wants them for a prediction."""
        return encoded

    def shown(self, row: dict[str, Any], processor: Any, labels: list[str]) -> str:
        """An encoded example as text, and its answer."""
        answer = labels[row["labels"]] if labels else row["labels"]
        return f"Example, as the model reads it: {shown_tokens(row, processor)!r} → {answer}"

    def described(self, example: dict[str, Any]) -> dict[str, Any]:
        """An example as it stands beside its prediction in a file."""
        return example

    def predictions(self, outputs: Tensor, labels: list[str]) -> Iterator[dict[str, Any]]:
        """What is said of each example, from the model's outputs (examples, …)."""
        for row in outputs.softmax(-1).tolist():
            names: list[Any] = list(labels or range(len(row)))
            yield {
                "prediction": names[int(np.argmax(row))],
                "probabilities": dict(zip(map(str, names), row, strict=True)),
            }
