"""Classification and regression of texts and text pairs."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any, ClassVar

import numpy as np
from datasets import ClassLabel, Dataset
from scipy.special import log_softmax
from scipy.stats import pearsonr, spearmanr
from sklearn.metrics import (
    accuracy_score,
    confusion_matrix,
    f1_score,
    matthews_corrcoef,
    precision_recall_fscore_support,
    root_mean_squared_error,
)
from torch import Tensor
from transformers import EvalPrediction, Trainer

from ...by_class import ByClass, Scores
from ..row_checks import class_names, in_order, is_finite, is_fraction, known_labels, require_rows, with_class_ids
from .base import Task, logits


class _Scorer:
    """Metrics of an evaluation by the Trainer, which keeps only them; and its classes, as (true, predicted)."""

    def __init__(self, score: Callable[[EvalPrediction], dict[str, float]]) -> None:
        self._score = score

    def __call__(self, prediction: EvalPrediction) -> dict[str, float]:
        self.classes = prediction.label_ids, logits(prediction).argmax(-1)
        return self._score(prediction)


class Classify(Task):
    """Classification of a text or text pair."""

    name = "classify"
    roles: ClassVar[tuple[str, ...]] = ("text", "label")
    optional_roles: ClassVar[tuple[str, ...]] = ("text_pair", "group")
    text_roles: ClassVar[tuple[str, ...]] = ("text", "text_pair", "label")
    has_classes = True
    metrics = ("accuracy", "macro_f1", "matthews", "log_loss", "loss")
    criterion = "log_loss"

    def class_names(self, data: Dataset) -> list[str]:
        values, feature = known_labels(data, "the training data"), data.features["label"]
        distinct = in_order(values)
        if len(distinct) < 2:
            raise ValueError(f"All training examples have the label {distinct[0]!r}, so there is nothing to learn.")
        if isinstance(feature, ClassLabel):
            return list(feature.names)
        if any(map(is_fraction, distinct)) and all(is_fraction(value) or is_finite(value) for value in distinct):
            raise ValueError(
                f"The labels are non-integer numbers ({distinct[0]}, {distinct[1]}, …). To predict numbers, use the "
                "task regress."
            )
        return class_names(distinct)

    def with_class_ids(self, data: Dataset, labels: list[str], where: str) -> Dataset:
        return with_class_ids(data, labels, where)

    def with_outputs(self, count: int) -> Task:
        return Regress() if count == 1 else self

    def model_options(self, labels: list[str]) -> dict[str, Any]:
        names = {"id2label": dict(enumerate(labels)), "label2id": {name: i for i, name in enumerate(labels)}}
        return {**names, "ignore_mismatched_sizes": True}  # a head for other classes is replaced

    def score(self, prediction: EvalPrediction) -> dict[str, float]:
        """Accuracy, macro-F1, Matthews correlation and log loss of logits (examples, classes).

        The log loss excludes terms that a method adds to the model's loss, as AdaLoRA does.
        """
        outputs = logits(prediction)
        labels, predicted = prediction.label_ids, outputs.argmax(-1)
        is_finite = bool(np.isfinite(outputs).all())
        return {
            "accuracy": float(accuracy_score(labels, predicted)),
            "macro_f1": float(f1_score(labels, predicted, average="macro")),
            # Of one class alone, scikit-learn warns, and returns 0 too.
            "matthews": float(matthews_corrcoef(labels, predicted)) if len(np.union1d(labels, predicted)) > 1 else 0.0,
            "log_loss": float(-log_softmax(outputs, axis=-1)[np.arange(len(labels)), labels].mean())
            if is_finite
            else math.nan,
        }

    def trainer(self, processor: Any, **arguments: Any) -> Trainer:
        trainer = super().trainer(processor, **arguments)
        trainer.compute_metrics = _Scorer(self.score)
        return trainer

    def by_class(self, trainer: Trainer, labels: list[str]) -> ByClass | None:
        scorer: Any = trainer.compute_metrics
        numbers = range(len(labels))
        scores = precision_recall_fscore_support(*scorer.classes, labels=numbers, zero_division=0)
        counts = confusion_matrix(*scorer.classes, labels=numbers).tolist()
        return ByClass(
            {
                name: Scores(precision=float(precision), recall=float(recall), f1=float(f1), support=int(support))
                for name, precision, recall, f1, support in zip(labels, *scores, strict=True)
            },
            {
                name: {prediction: count for prediction, count in zip(labels, row, strict=True) if count}
                for name, row in zip(labels, counts, strict=True)
            },
        )

    def guess(self, examples: Dataset) -> dict[str, float]:
        labels = np.asarray(examples["label"])
        shares = np.bincount(labels) / len(labels)
        answers = np.tile(np.log(shares.clip(min=1e-12)), (len(labels), 1))
        metrics = self.score(EvalPrediction(answers, labels))
        metrics["log_loss"] += 0.0  # not −0 where there is one class
        return {**metrics, "loss": metrics["log_loss"]}


class Regress(Task):
    """Regression on a text or text pair."""

    name = "regress"
    roles = ("text", "label")
    optional_roles = ("text_pair", "group")
    metrics = ("pearson", "spearman", "rmse", "loss")
    kept_by = "loss"  # nearly constant predictions may correlate
    criterion = "rmse"

    def check(self, data: Dataset, where: str, *, with_label: bool) -> None:
        super().check(data, where, with_label=with_label)
        if with_label:
            rule = f"label must be a finite number in {where}"
            require_rows(map(is_finite, data["label"]), rule, data["label"])

    def encode(self, data: Dataset, processor: Any, max_length: int | None) -> Dataset:
        encoded = super().encode(data, processor, max_length)
        if "labels" not in encoded.column_names:
            return encoded
        targets = np.asarray([float(value) for value in data["label"]], dtype=np.float32)
        return encoded.remove_columns("labels").add_column("labels", targets)

    def model_options(self, labels: list[str]) -> dict[str, Any]:
        return {"num_labels": 1, "problem_type": "regression", "ignore_mismatched_sizes": True}

    def score(self, prediction: EvalPrediction) -> dict[str, float]:
        """Pearson and Spearman correlation and root mean squared error of outputs (examples, 1)."""
        targets, predicted = prediction.label_ids, logits(prediction).squeeze(-1)
        if not np.isfinite(predicted).all():  # scikit-learn would raise
            return dict.fromkeys(("pearson", "spearman", "rmse"), math.nan)
        # The correlation with a constant is undefined; report 0.
        is_constant = np.ptp(predicted) == 0 or np.ptp(targets) == 0
        return {
            "pearson": 0.0 if is_constant else float(pearsonr(targets, predicted).statistic),
            "spearman": 0.0 if is_constant else float(spearmanr(targets, predicted).statistic),
            "rmse": float(root_mean_squared_error(targets, predicted)),
        }

    def guess(self, examples: Dataset) -> dict[str, float]:
        targets = np.asarray([float(value) for value in examples["label"]])
        metrics = self.score(EvalPrediction(np.full((len(targets), 1), targets.mean()), targets))
        return {**metrics, "loss": metrics["rmse"] ** 2}

    def predictions(self, outputs: Tensor, encoded: Dataset, labels: list[str]) -> Iterator[dict[str, Any]]:
        return ({"prediction": value} for value in outputs.squeeze(-1).tolist())
