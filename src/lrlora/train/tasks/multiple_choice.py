"""Multiple choice: by an encoder's head, or by a decoder's likelihood of each choice."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

import numpy as np
from datasets import Dataset
from sklearn.metrics import accuracy_score
from transformers import (
    AutoModelForCausalLM,
    AutoModelForMultipleChoice,
    DataCollatorForMultipleChoice,
    EvalPrediction,
    Trainer,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_MULTIPLE_CHOICE_MAPPING

from ..chat import shown_tokens
from ..row_checks import counted, mapped, require_rows, require_text
from .base import Task, logits
from .likelihood import ChoiceTrainer, encode_continuations, right_choices


class MultipleChoice(Task):
    """Multiple choice by an encoder's head."""

    name = "multiple-choice"
    roles = ("question", "choices", "label")
    depends_on_model = True
    optional_roles = ("group", "prompts")
    text_roles = ("question",)
    metrics: ClassVar[tuple[str, ...]] = ("accuracy", "loss")
    adapter_fields: ClassVar[Mapping[str, Any]] = {"modules_to_save": ["classifier"]}  # unknown to PEFT
    collator = DataCollatorForMultipleChoice
    pipeline = "multiple-choice"
    model_class: ClassVar[Any] = AutoModelForMultipleChoice
    architectures = MODEL_FOR_MULTIPLE_CHOICE_MAPPING

    def for_model(self, model_config: Any) -> Task:
        is_decoder = type(model_config) in MODEL_FOR_CAUSAL_LM_MAPPING and not model_config.is_encoder_decoder
        has_head = type(model_config) in self.architectures
        return ChoiceByLikelihood() if is_decoder and not has_head else self

    def check(self, data: Dataset, where: str, *, with_label: bool) -> None:
        require_text(data, "question", where)
        choices = data["choices"][:]
        require_rows(
            (
                isinstance(c, list) and len(c) > 1 and all(isinstance(choice, str) and choice.strip() for choice in c)
                for c in choices
            ),
            f"choices must be lists of at least two nonempty texts in {where}",
        )
        if self.has_head and len({len(c) for c in choices}) > 1:
            raise ValueError(f"All examples in {where} must have the same number of choices.")
        if "prompts" in data.column_names:
            prompts = data["prompts"][:]
            require_rows(
                (
                    isinstance(p, list) and len(p) == len(c) and all(isinstance(t, str) and t.strip() for t in p)
                    for p, c in zip(prompts, choices, strict=True)
                ),
                f"prompts must be lists of nonempty texts, one per choice, in {where}",
                prompts,
            )
        if with_label:
            pairs = zip(data["label"], choices, strict=True)
            require_rows(
                (isinstance(label, int) and 0 <= label < len(c) for label, c in pairs),
                f"label must be the index of a choice, counted from 0, in {where}",
            )

    def lengths(self, data: Dataset, processor: Any) -> list[int]:
        def count(batch: dict[str, list[Any]]) -> list[int]:
            return [max(map(len, processor(prompts, choices)["input_ids"])) for prompts, choices in self._pairs(batch)]

        return counted(data, count)

    def encode(self, data: Dataset, processor: Any, max_length: int | None) -> Dataset:
        def encode(batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
            rows = [
                processor(prompts, choices, truncation=True, max_length=max_length)
                for prompts, choices in self._pairs(batch)
            ]
            return {name: [row[name] for row in rows] for name in rows[0]}

        return mapped(data, encode)

    @staticmethod
    def _pairs(batch: Mapping[str, list[Any]]) -> Iterator[tuple[list[str], list[str]]]:
        """Yield (prompts, choices) of each example."""
        for row, choices in enumerate(batch["choices"]):
            yield batch["prompts"][row] if "prompts" in batch else [batch["question"][row]] * len(choices), choices

    def score(self, prediction: EvalPrediction) -> dict[str, float]:
        """Accuracy of logits (examples, choices).

        For log-likelihoods, which come with values per character, also `accuracy_norm`: length-normalized accuracy,
        `acc_norm` of lm-evaluation-harness.
        """
        labels: Any = prediction.label_ids
        outputs: Any = prediction.predictions
        metrics = {"accuracy": float(accuracy_score(labels, logits(prediction).argmax(-1)))}
        if isinstance(outputs, tuple):
            metrics["accuracy_norm"] = float(accuracy_score(labels, outputs[1].argmax(-1)))
        return metrics

    def guess(self, examples: Dataset) -> dict[str, float]:
        counts = np.asarray([len(choices) for choices in examples["choices"]])
        metrics = {"accuracy": float((1 / counts).mean())}
        return {**metrics, "loss": float(np.log(counts).mean())} if self.has_head else metrics

    def shown(self, row: dict[str, Any], processor: Any, labels: list[str]) -> str:
        right = {"input_ids": row["input_ids"][row["labels"]]}
        return f"Example, with its correct choice, as the model reads it: {shown_tokens(right, processor)!r}"

    def unlabelled(self, encoded: Dataset) -> Dataset:
        return encoded.add_column("labels", [0] * len(encoded))  # its collator requires labels


class ChoiceByLikelihood(MultipleChoice):
    """Multiple choice by a decoder without a head, which compares the likelihoods of the choices."""

    metrics = ("accuracy", "accuracy_norm", "loss")
    has_head = False
    adapter_fields: ClassVar[Mapping[str, Any]] = {"task_type": "CAUSAL_LM"}
    rate = 5e-4
    model_class = AutoModelForCausalLM
    architectures = MODEL_FOR_CAUSAL_LM_MAPPING

    def lengths(self, data: Dataset, processor: Any) -> list[int]:
        return [max(map(len, rows)) for rows in encode_continuations(data, processor)["input_ids"]]

    def encode(self, data: Dataset, processor: Any, max_length: int | None) -> Dataset:
        return encode_continuations(data, processor, max_length)

    def arguments(self, max_length: int | None, batch: int) -> dict[str, Any]:
        # It outputs logits for its whole vocabulary and every choice.
        return super().arguments(max_length, batch) | {"per_device_eval_batch_size": max(1, batch // 4)}

    def inputs(self, batch: Mapping[str, Any]) -> Mapping[str, Any]:
        return right_choices(batch)

    def trainer(self, processor: Any, **arguments: Any) -> Trainer:
        return ChoiceTrainer(compute_metrics=self.score, processing_class=processor, **arguments)
