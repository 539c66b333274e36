"""The kinds of tasks: what each reads from the data, how that is checked and encoded, what is trained, what comes out.

A new kind is a class here and its place in `KINDS`; metrics of its own are in `metrics.py`.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

import numpy as np
from datasets import ClassLabel, Dataset
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoModelForMultipleChoice,
    AutoModelForSequenceClassification,
    DataCollatorForMultipleChoice,
    DataCollatorWithPadding,
    EvalPrediction,
    PreTrainedTokenizerBase,
    Trainer,
    TrainingArguments,
)
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_MULTIPLE_CHOICE_MAPPING,
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
)

from .chat import FORMATS, as_trl_reads, count_tokens, format_of, rendering_of, shown_tokens
from .choices import ChoiceTrainer, encode_continuations
from .labels import known_labels
from .metrics import choice_metrics, classification_metrics, regression_metrics
from .names import OPTIONAL_ROLES, ROLES
from .rows import counted, is_conversation, is_finite, mapped, require_rows, require_text


class Kind:
    """A kind of task.

    Attributes:
        name: as `lrlora train --task` calls it.
        metrics: that may choose the best checkpoint; the first, unless given.
        criterion: the metric that chooses the learning rate in a comparison, a loss that holds nothing but the task.
        has_head: whether the model gets a new head.
        generates: whether its answers are texts.
        adapter_fields: of the PEFT configuration, for the head.
        batch_size: examples of a step on each device, unless given.
        rates: peak learning rates of an adapter and of full fine-tuning, unless given: adapters bear more than whole
            models, small heads more than language models.
        model_class, architectures: transformers' class with the head, and the configurations that have one.
        collator: makes a batch of encoded examples.

    """

    name: ClassVar[str]
    metrics: ClassVar[tuple[str, ...]]
    criterion: ClassVar[str] = "loss"
    has_head: ClassVar[bool] = True
    generates: ClassVar[bool] = False
    adapter_fields: ClassVar[Mapping[str, Any]] = {"task_type": "SEQ_CLS"}
    batch_size: ClassVar[int] = 16
    rates: ClassVar[tuple[float, float]] = (1e-3, 5e-5)
    model_class: ClassVar[Any] = AutoModelForSequenceClassification
    architectures: ClassVar[Any] = MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING
    collator: ClassVar[Any] = DataCollatorWithPadding

    @property
    def roles(self) -> tuple[str, ...]:
        """What a column holds, by what it is called unless `columns` says otherwise."""
        return ROLES[self.name]

    @property
    def optional_roles(self) -> tuple[str, ...]:
        """Of columns that are read if they are there."""
        return OPTIONAL_ROLES[self.name]

    def columns(self, given: Mapping[str, str], there: list[str], *, with_label: bool) -> dict[str, str]:
        """Role → column that must be there, from what the user says of some.

        Raises:
            ValueError: the data has none of the columns that the task can be read from.

        """
        return {role: given.get(role, role) for role in self.roles if with_label or role != "label"}

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

    def lengths(self, data: Dataset, tokenizer: PreTrainedTokenizerBase) -> list[int]:
        """How long every example is, in tokens, before it is cut."""

        def count(batch: dict[str, list[Any]]) -> list[int]:
            return [len(ids) for ids in tokenizer(batch["text"], batch.get("text_pair"))["input_ids"]]

        return counted(data, count)

    def encode(self, data: Dataset, tokenizer: PreTrainedTokenizerBase, max_length: int) -> Dataset:
        """Token ids, cut at `max_length`, and `labels`."""

        def encode(batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
            return dict(tokenizer(batch["text"], batch.get("text_pair"), truncation=True, max_length=max_length))

        return mapped(data, encode)

    def model_options(self, labels: list[str]) -> dict[str, Any]:
        """What `from_pretrained` is given for the head."""
        return {}

    def arguments_class(self) -> type[TrainingArguments]:
        """The class of the Trainer's arguments."""
        return TrainingArguments

    def arguments(self, max_length: int, batch: int) -> dict[str, Any]:
        """Defaults of the Trainer's arguments, for batches of `batch` examples in training."""
        # The Trainer multiplies the loss by the number of processes, for models that divide it by the tokens of all of
        # them; a head's loss is a mean.
        return {"per_device_eval_batch_size": 4 * batch, "average_tokens_across_devices": False}

    def trainer(self, tokenizer: PreTrainedTokenizerBase, **arguments: Any) -> Trainer:
        """The Trainer, on encoded examples."""
        collator = self.collator(tokenizer)
        arguments |= {"processing_class": tokenizer, "compute_metrics": self.score}
        return Trainer(data_collator=collator, **arguments)

    def score(self, prediction: EvalPrediction) -> dict[str, float]:
        """The metrics, but the loss."""
        raise NotImplementedError

    def unlabelled(self, encoded: Dataset) -> Dataset:
        """Encoded examples that have no labels, as the Trainer wants them for a prediction."""
        return encoded

    def shown(self, row: dict[str, Any], tokenizer: PreTrainedTokenizerBase, labels: list[str]) -> str:
        """An encoded example as text, and its answer."""
        answer = labels[row["labels"]] if labels else row["labels"]
        return f"Example, as the model reads it: {shown_tokens(row, tokenizer)!r} → {answer}"

    def predictions(self, outputs: Tensor, labels: list[str]) -> Iterator[dict[str, Any]]:
        """What is said of each example, from the model's outputs (examples, …)."""
        for row in outputs.softmax(-1).tolist():
            names: list[Any] = list(labels or range(len(row)))
            yield {
                "prediction": names[int(np.argmax(row))],
                "probabilities": dict(zip(map(str, names), row, strict=True)),
            }


class Classify(Kind):
    """One of several classes for a text, or for a pair of texts."""

    name = "classify"
    metrics = ("accuracy", "macro_f1", "matthews", "log_loss", "loss")
    criterion = "log_loss"

    def class_names(self, data: Dataset) -> list[str]:
        values, feature = known_labels(data, "train"), data.features["label"]
        distinct = sorted(set(values), key=lambda value: (str(type(value)), value))
        if len(distinct) < 2:
            raise ValueError(
                f"All examples of the split train have the label {distinct[0]!r}: there is nothing to learn."
            )
        if isinstance(feature, ClassLabel):
            return list(feature.names)
        if any(isinstance(value, float) and not value.is_integer() for value in distinct):
            raise ValueError(
                f"The labels are numbers with fractions ({distinct[0]}, {distinct[1]}, …). To predict numbers, use the "
                "task regress."
            )
        return [str(value) for value in distinct]

    def model_options(self, labels: list[str]) -> dict[str, Any]:
        return {"id2label": dict(enumerate(labels)), "label2id": {name: i for i, name in enumerate(labels)}}

    def score(self, prediction: EvalPrediction) -> dict[str, float]:
        return classification_metrics(prediction)


class Regress(Kind):
    """A number for a text, or for a pair of texts."""

    name = "regress"
    metrics = ("pearson", "spearman", "rmse", "loss")
    criterion = "rmse"

    def check(self, data: Dataset, split: str, *, with_label: bool) -> None:
        super().check(data, split, with_label=with_label)
        if with_label:
            rule = f"label must be a finite number in the split {split}"
            require_rows(map(is_finite, data["label"]), rule, data["label"])

    def encode(self, data: Dataset, tokenizer: PreTrainedTokenizerBase, max_length: int) -> Dataset:
        encoded = super().encode(data, tokenizer, max_length)
        if "labels" not in encoded.column_names:
            return encoded
        targets = np.asarray([float(value) for value in data["label"]], dtype=np.float32)
        return encoded.remove_columns("labels").add_column("labels", targets)

    def model_options(self, labels: list[str]) -> dict[str, Any]:
        return {"num_labels": 1, "problem_type": "regression"}

    def score(self, prediction: EvalPrediction) -> dict[str, float]:
        return regression_metrics(prediction)

    def predictions(self, outputs: Tensor, labels: list[str]) -> Iterator[dict[str, Any]]:
        return ({"prediction": value} for value in outputs.squeeze(-1).tolist())


class MultipleChoice(Kind):
    """The right one of several choices, by an encoder's head."""

    name = "multiple-choice"
    metrics = ("accuracy", "loss")
    adapter_fields: ClassVar[Mapping[str, Any]] = {"modules_to_save": ["classifier"]}  # PEFT does not know this head
    collator = DataCollatorForMultipleChoice
    model_class: ClassVar[Any] = AutoModelForMultipleChoice
    architectures = MODEL_FOR_MULTIPLE_CHOICE_MAPPING

    def check(self, data: Dataset, split: str, *, with_label: bool) -> None:
        require_text(data, "question", split)
        choices = data["choices"]
        require_rows(
            (
                isinstance(c, list) and len(c) > 1 and all(isinstance(choice, str) and choice.strip() for choice in c)
                for c in choices
            ),
            f"choices must be lists of two texts or more, none empty, in the split {split}",
        )
        if len({len(c) for c in choices}) > 1:
            raise ValueError(f"All examples of the split {split} must have as many choices as the others.")
        if with_label:
            pairs = zip(data["label"], choices, strict=True)
            require_rows(
                (isinstance(label, int) and 0 <= label < len(c) for label, c in pairs),
                f"label must be the index of one of the choices, from 0, in the split {split}",
            )

    def lengths(self, data: Dataset, tokenizer: PreTrainedTokenizerBase) -> list[int]:
        def count(batch: dict[str, list[Any]]) -> list[int]:
            pairs = zip(batch["question"], batch["choices"], strict=True)
            return [max(map(len, tokenizer([q] * len(c), c)["input_ids"])) for q, c in pairs]

        return counted(data, count)

    def encode(self, data: Dataset, tokenizer: PreTrainedTokenizerBase, max_length: int) -> Dataset:
        def encode(batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
            rows = [
                tokenizer([question] * len(choices), choices, truncation=True, max_length=max_length)
                for question, choices in zip(batch["question"], batch["choices"], strict=True)
            ]
            return {name: [row[name] for row in rows] for name in rows[0]}

        return mapped(data, encode)

    def score(self, prediction: EvalPrediction) -> dict[str, float]:
        return choice_metrics(prediction)

    def shown(self, row: dict[str, Any], tokenizer: PreTrainedTokenizerBase, labels: list[str]) -> str:
        right = {"input_ids": row["input_ids"][row["labels"]]}
        return f"Example, its right choice as the model reads it: {shown_tokens(right, tokenizer)!r}"

    def unlabelled(self, encoded: Dataset) -> Dataset:
        return encoded.add_column("labels", [0] * len(encoded))  # its collator wants some


class ChoiceByLikelihood(MultipleChoice):
    """Multiple choice by a decoder, which has no head for it, and compares how likely it finds the choices."""

    has_head = False
    adapter_fields: ClassVar[Mapping[str, Any]] = {"task_type": "CAUSAL_LM"}
    rates = (5e-4, 2e-5)
    model_class = AutoModelForCausalLM
    architectures = MODEL_FOR_CAUSAL_LM_MAPPING

    def lengths(self, data: Dataset, tokenizer: PreTrainedTokenizerBase) -> list[int]:
        return [max(map(len, rows)) for rows in encode_continuations(data, tokenizer)["input_ids"]]

    def encode(self, data: Dataset, tokenizer: PreTrainedTokenizerBase, max_length: int) -> Dataset:
        return encode_continuations(data, tokenizer, max_length)

    def arguments(self, max_length: int, batch: int) -> dict[str, Any]:
        # It gives numbers for its whole vocabulary, and for every choice.
        return super().arguments(max_length, batch) | {"per_device_eval_batch_size": max(1, batch // 4)}

    def trainer(self, tokenizer: PreTrainedTokenizerBase, **arguments: Any) -> Trainer:
        return ChoiceTrainer(compute_metrics=self.score, processing_class=tokenizer, **arguments)


class CausalLm(Kind):
    """The next token of texts, of answers to prompts, or of a chat; TRL encodes and trains."""

    name = "causal-lm"
    metrics = ("loss", "mean_token_accuracy", "entropy")
    has_head = False
    generates = True
    adapter_fields: ClassVar[Mapping[str, Any]] = {"task_type": "CAUSAL_LM"}
    batch_size = 8
    rates = (5e-4, 2e-5)
    model_class = AutoModelForCausalLM
    architectures = MODEL_FOR_CAUSAL_LM_MAPPING

    def columns(self, given: Mapping[str, str], there: list[str], *, with_label: bool) -> dict[str, str]:
        names = {role: given.get(role, role) for role in self.roles}
        # What the user names comes first.
        formats = sorted(FORMATS, key=lambda each: not set(each.roles) & set(given))
        found = next((each for each in formats if all(names[role] in there for role in each.asked)), None)
        if found is None:
            raise ValueError(
                "The task causal-lm reads the columns messages, or conversations, or prompt and completion, or "
                f"instruction and output, or text, and the data has {', '.join(there)}. Name them: --column prompt=NAME"
            )
        if with_label and found.answer is not None and names[found.answer] not in there:
            raise ValueError(
                f"The data has {names[found.asked[0]]}, and lacks {found.answer}, to be read as {found.name}. It has "
                f"{', '.join(there)}. Name it: --column {found.answer}=NAME"
            )
        return {role: names[role] for role in found.roles if names[role] in there}

    def check(self, data: Dataset, split: str, *, with_label: bool) -> None:
        found = format_of(data.column_names)
        for role in found.roles if with_label else found.asked:
            if isinstance(data[0][role], str) or role == "text":
                require_text(data, role, split)
            else:
                rule = f"{role} must be lists of messages in the split {split}"
                require_rows(map(is_conversation, data[role]), rule)

    def lengths(self, data: Dataset, tokenizer: PreTrainedTokenizerBase) -> list[int]:
        def count(batch: dict[str, list[Any]]) -> list[int]:
            rows = zip(*batch.values(), strict=True)
            return [count_tokens(dict(zip(batch, row, strict=True)), tokenizer) for row in rows]

        return counted(as_trl_reads(data, rendering_of(data, tokenizer)), count)

    def encode(self, data: Dataset, tokenizer: PreTrainedTokenizerBase, max_length: int) -> Dataset:
        return as_trl_reads(data, rendering_of(data, tokenizer))

    def shown(self, row: dict[str, Any], tokenizer: PreTrainedTokenizerBase, labels: list[str]) -> str:
        return f"Example, with the loss taken in ⟦ ⟧: {shown_tokens(row, tokenizer, marked=True)!r}"

    def arguments_class(self) -> type[TrainingArguments]:
        return importlib.import_module("trl").SFTConfig  # only here: TRL takes long to import

    def arguments(self, max_length: int, batch: int) -> dict[str, Any]:
        return {"per_device_eval_batch_size": 4 * batch, "max_length": max_length, "bf16": False}

    def trainer(self, tokenizer: PreTrainedTokenizerBase, **arguments: Any) -> Trainer:
        return importlib.import_module("trl").SFTTrainer(processing_class=tokenizer, **arguments)


KINDS = {kind.name: kind for kind in (Classify(), Regress(), MultipleChoice(), CausalLm())}


def kind_for(task: str, model_config: Any) -> Kind:
    """The kind of a task on a model: multiple choice by a decoder compares likelihoods."""
    is_decoder = type(model_config) in MODEL_FOR_CAUSAL_LM_MAPPING and not model_config.is_encoder_decoder
    has_head = type(model_config) in MODEL_FOR_MULTIPLE_CHOICE_MAPPING
    return ChoiceByLikelihood() if task == "multiple-choice" and is_decoder and not has_head else KINDS[task]
