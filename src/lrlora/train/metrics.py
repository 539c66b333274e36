"""Metrics of each task, from scikit-learn and scipy."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.special import log_softmax
from scipy.stats import pearsonr, spearmanr
from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef, root_mean_squared_error
from transformers import EvalPrediction
from transformers.trainer_utils import PredictionOutput

LESS_IS_BETTER = ("loss", "log_loss", "rmse", "entropy")
_LARGEST_EXPONENT = 700


def classification_metrics(prediction: EvalPrediction) -> dict[str, float]:
    """Accuracy, macro-F1, Matthews correlation and log loss of logits (examples, classes).

    The log loss excludes terms that a method adds to the model's loss, as AdaLoRA does.
    """
    outputs = logits(prediction)
    labels, predicted = prediction.label_ids, outputs.argmax(-1)
    is_finite = bool(np.isfinite(outputs).all())
    return {
        "accuracy": float(accuracy_score(labels, predicted)),
        "macro_f1": float(f1_score(labels, predicted, average="macro")),
        "matthews": float(matthews_corrcoef(labels, predicted)),
        "log_loss": float(-log_softmax(outputs, axis=-1)[np.arange(len(labels)), labels].mean())
        if is_finite
        else math.nan,
    }


def regression_metrics(prediction: EvalPrediction) -> dict[str, float]:
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


def choice_metrics(prediction: EvalPrediction) -> dict[str, float]:
    """Accuracy of logits (examples, choices).

    For log-likelihoods, which come with values per character, also `accuracy_norm`: length-normalized accuracy,
    `acc_norm` of lm-evaluation-harness.
    """
    labels: Any = prediction.label_ids
    outputs: Any = prediction.predictions
    found = {"accuracy": float(accuracy_score(labels, logits(prediction).argmax(-1)))}
    if isinstance(outputs, tuple):
        found["accuracy_norm"] = float(accuracy_score(labels, outputs[1].argmax(-1)))
    return found


def plain_metrics(values: dict[str, float]) -> dict[str, float]:
    """Metrics of an evaluation without their prefix and timings.

    The perplexity is the exponential of the mean token loss, omitted on overflow.
    """
    left_out = ("runtime", "samples_per_second", "steps_per_second", "num_tokens", "model_preparation_time")
    metrics = {name.removeprefix("eval_"): value for name, value in values.items() if name.startswith("eval_")}
    metrics = {name: value for name, value in metrics.items() if name not in left_out}
    if "accuracy" not in metrics and "pearson" not in metrics and metrics["loss"] < _LARGEST_EXPONENT:
        metrics["perplexity"] = math.exp(metrics["loss"])
    return metrics


def logits(prediction: EvalPrediction | PredictionOutput) -> NDArray[np.float64]:
    """Main output of the model, float64."""
    outputs = prediction.predictions
    return np.asarray(outputs[0] if isinstance(outputs, tuple) else outputs, dtype=np.float64)
