"""Base class of tasks: data columns, validation, encoding, metrics and predictions."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from datasets import Dataset
from numpy.typing import NDArray
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
from transformers.trainer_utils import PredictionOutput

from ...by_class import ByClass
from ...learned.moments import model_loss
from ..chat import shown_tokens
from ..row_checks import counted, mapped, numbers_as_text, require_text

LESS_IS_BETTER = ("loss", "log_loss", "rmse", "entropy")  # metrics


class Task:
    """A task.

    Attributes:
        name: value of `lrlora train --task`.
        roles: contents of the data columns; each column has its role's name unless `columns` says otherwise.
        optional_roles: roles of optional columns.
        answers: roles that data to predict on may lack.
        text_roles: roles whose cells are text, also if they look like numbers.
        metrics: metrics that can select the best checkpoint.
        kept_by: the one that does by default; empty for the first.
        criterion: metric that the laboratory selects the learning rate by: a pure task loss.
        has_head: whether the model gets a new head.
        depends_on_model: whether `for_model` returns another task for some models.
        has_classes: whether an answer is one of several classes.
        reads_text: whether examples are truncated to a number of tokens; False for images.
        generates: whether answers are texts.
        adapter_fields: fields of the PEFT configuration for the head.
        batch_size: default examples per step and device.
        rate: default peak learning rate; small heads tolerate more than language models.
        model_class, architectures: transformers' class with the head, and its supported configurations.
        collator: collator of encoded examples.
        pipeline: the hub's name of the task.

    """

    name: ClassVar[str]
    roles: ClassVar[tuple[str, ...]]
    optional_roles: ClassVar[tuple[str, ...]] = ("group",)
    answers: ClassVar[tuple[str, ...]] = ("label",)
    text_roles: ClassVar[tuple[str, ...]] = ("text", "text_pair")
    metrics: ClassVar[tuple[str, ...]]
    kept_by: ClassVar[str] = ""
    criterion: ClassVar[str] = "loss"
    has_head: ClassVar[bool] = True
    depends_on_model: ClassVar[bool] = False
    has_classes: ClassVar[bool] = False
    reads_text: ClassVar[bool] = True
    generates: ClassVar[bool] = False
    adapter_fields: ClassVar[Mapping[str, Any]] = {"task_type": "SEQ_CLS"}
    batch_size: ClassVar[int] = 16
    rate: ClassVar[float] = 1e-3
    model_class: ClassVar[Any] = AutoModelForSequenceClassification
    architectures: ClassVar[Any] = MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING
    collator: ClassVar[Any] = DataCollatorWithPadding
    pipeline: ClassVar[str] = "text-classification"

    def for_model(self, model_config: Any) -> Task:
        """The task as a model of this configuration does it."""
        return self

    def with_outputs(self, count: int) -> Task:
        """The task as a trained head with this number of outputs does it."""
        return self

    def columns(self, mapping: Mapping[str, str], available: list[str], *, with_label: bool) -> dict[str, str]:
        """Role → required column, given the user's choices.

        Raises:
            ValueError: the data has none of the columns that the task can use.

        """
        return {role: mapping.get(role, role) for role in self.roles if with_label or role not in self.answers}

    def as_read(self, data: Dataset) -> Dataset:
        """Normalize the columns of a split."""
        for role in self.text_roles:
            # Names of classes are made of the numbers.
            if role in data.column_names and not (self.has_classes and role in self.answers):
                data = numbers_as_text(data, role)
        return data

    def check(self, data: Dataset, where: str, *, with_label: bool) -> None:
        """Raise ValueError that names the invalid rows and the reason."""
        for role in ("text", "text_pair"):
            if role in data.column_names:
                require_text(data, role, where)

    def class_names(self, data: Dataset) -> list[str]:
        """Class names of the training data; empty without classes.

        Raises:
            ValueError: there is only one class.

        """
        return []

    def with_class_ids(self, data: Dataset, labels: list[str], where: str) -> Dataset:
        """Replace class names by their indices in `labels`.

        Raises:
            ValueError: a label is missing or not in `labels`.

        """
        return data

    def load_processor(self, source: str | Path) -> Any:
        """Load the model's tokenizer or image processor.

        Raises:
            ValueError: the tokenizer of a language model ends each text with EOS, prompts as well.

        """
        tokenizer = AutoTokenizer.from_pretrained(source)
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
        if not self.has_head:
            _leave_eos_out(tokenizer, source)
        return tokenizer

    def lengths(self, data: Dataset, processor: Any) -> list[int]:
        """Number of tokens per example, before truncation."""

        def count(batch: dict[str, list[Any]]) -> list[int]:
            return [len(ids) for ids in processor(batch["text"], batch.get("text_pair"))["input_ids"]]

        return counted(data, count)

    def rows(self, lengths: list[int], max_length: int, training: Mapping[str, Any]) -> int:
        """Number of training rows for examples of these lengths, under the given Trainer arguments."""
        return len(lengths)

    def encode(self, data: Dataset, processor: Any, max_length: int | None) -> Dataset:
        """Encode to model inputs, truncated to `max_length`, and `labels`; for causal-lm, to rows for TRL."""

        def encode(batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
            return dict(processor(batch["text"], batch.get("text_pair"), truncation=True, max_length=max_length))

        return mapped(data, encode)

    def model_options(self, labels: list[str]) -> dict[str, Any]:
        """Options of `from_pretrained` for the head."""
        return {}

    def arguments_class(self) -> type[TrainingArguments]:
        """Class of the Trainer's arguments."""
        return TrainingArguments

    def arguments(self, max_length: int | None, batch: int) -> dict[str, Any]:
        """Default Trainer arguments for training batches of `batch` examples."""
        # The Trainer multiplies the loss by the number of processes, for models that divide it by the total number of
        # tokens; a head's loss is a mean.
        return {"per_device_eval_batch_size": 4 * batch, "average_tokens_across_devices": False}

    def trainer(self, processor: Any, **arguments: Any) -> Trainer:
        """Trainer on encoded examples."""
        collator = self.collator(processor)
        arguments |= {"processing_class": processor, "compute_metrics": self.score}
        return Trainer(data_collator=collator, **arguments)

    def inputs(self, batch: Mapping[str, Any]) -> Mapping[str, Any]:
        """Inputs of the model, with the labels of its loss, of an evaluation batch."""
        return batch

    def loss(self, model: nn.Module, batch: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
        """Sum of the loss terms of each example, and their number; both (examples,)."""
        return model_loss(model, self.inputs(batch))

    def reported(self, values: Mapping[str, float]) -> dict[str, float]:
        """Metrics of an evaluation by the Trainer, as they are shown and saved."""
        return plain_metrics(values)

    def score(self, prediction: EvalPrediction) -> dict[str, float]:
        """Metrics except loss."""
        raise NotImplementedError

    def by_class(self, trainer: Trainer, labels: list[str]) -> ByClass | None:
        """Scores by class of the Trainer's last evaluation; None without classes."""
        return None

    def guess(self, examples: Dataset) -> dict[str, float]:
        """Metrics of the best constant answer to examples with labels; empty where there is none."""
        return {}

    def unlabelled(self, encoded: Dataset) -> Dataset:
        """Prepare encoded examples without labels for prediction by the Trainer."""
        return encoded

    def shown(self, row: dict[str, Any], processor: Any, labels: list[str]) -> str:
        """Encoded example and answer, as text."""
        answer = labels[row["labels"]] if labels else row["labels"]
        return f"Example, as the model reads it: {shown_tokens(row, processor)!r} → {answer}"

    def described(self, example: dict[str, Any]) -> dict[str, Any]:
        """Example as saved next to its prediction."""
        return example

    def predictions(self, outputs: Tensor, encoded: Dataset, labels: list[str]) -> Iterator[dict[str, Any]]:
        """Prediction of each encoded example, from outputs (examples, …), padded with -100."""
        for row in outputs.softmax(-1).tolist():
            names: list[Any] = list(labels or range(len(row)))
            yield {
                "prediction": names[int(np.argmax(row))],
                "probabilities": dict(zip(map(str, names), row, strict=True)),
            }


def _leave_eos_out(tokenizer: Any, source: str | Path) -> None:
    """Let a tokenizer append no EOS to texts, which would end prompts as well."""
    try:
        tokens, text = tokenizer("a")["input_ids"], tokenizer("a", add_special_tokens=False)["input_ids"]
    except Exception:  # of a vocabulary without this letter
        return
    if not text or tokens[-len(text) :] == text or tokens[-1] != tokenizer.eos_token_id:
        return
    tokenizer.add_bos_token = tokens[0] == tokenizer.bos_token_id  # also where a template adds it
    tokenizer.add_eos_token = False
    if tokenizer("a")["input_ids"] != tokens[:-1]:
        raise ValueError(
            f"The tokenizer of {source} appends {tokenizer.eos_token} to each text, so that a prompt would end there. "
            "Remove the token from the post_processor in its tokenizer.json."
        )


def plain_metrics(values: Mapping[str, float]) -> dict[str, float]:
    """Metrics of an evaluation without their prefix and timings."""
    left_out = ("runtime", "samples_per_second", "steps_per_second", "num_tokens", "model_preparation_time")
    metrics = {name.removeprefix("eval_"): value for name, value in values.items() if name.startswith("eval_")}
    return {name: value for name, value in metrics.items() if name not in left_out}


def logits(prediction: EvalPrediction | PredictionOutput) -> NDArray[np.float64]:
    """Main output of the model, float64."""
    outputs = prediction.predictions
    return np.asarray(outputs[0] if isinstance(outputs, tuple) else outputs, dtype=np.float64)
