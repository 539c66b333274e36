"""The metrics of each task, from scikit-learn and scipy."""

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

    The log loss is the model's loss without what a method may add to it, as AdaLoRA does.
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
    """Pearson's and Spearman's correlation and the root of the mean squared error of outputs (examples, 1)."""
    targets, predicted = prediction.label_ids, logits(prediction).squeeze(-1)
    if not np.isfinite(predicted).all():  # scikit-learn would raise an error of its own
        return dict.fromkeys(("pearson", "spearman", "rmse"), math.nan)
    # A correlation with a constant is undefined: no information is counted as none.
    is_constant = np.ptp(predicted) == 0 or np.ptp(targets) == 0
    return {
        "pearson": 0.0 if is_constant else float(pearsonr(targets, predicted).statistic),
        "spearman": 0.0 if is_constant else float(spearmanr(targets, predicted).statistic),
        "rmse": float(root_mean_squared_error(targets, predicted)),
    }


def choice_metrics(prediction: EvalPrediction) -> dict[str, float]:
    """Accuracy of logits (examples, choices).

    Of log-likelihoods, beside which they come per character of a choice, also `accuracy_norm`: of the choice that is
    likeliest for its length, as lm-evaluation-harness counts `acc_norm`.
    """
    labels: Any = prediction.label_ids
    outputs: Any = prediction.predictions
    found = {"accuracy": float(accuracy_score(labels, logits(prediction).argmax(-1)))}
    if isinstance(outputs, tuple):
        found["accuracy_norm"] = float(accuracy_score(labels, outputs[1].argmax(-1)))
    return found


def plain_metrics(values: dict[str, float]) -> dict[str, float]:
    """The metrics of an evaluation under their own names, without its timings.

    The perplexity is the exponential of the mean loss of a token. It is left out where that overflows.
    """
    left_out = ("runtime", "samples_per_second", "steps_per_second", "num_tokens", "model_preparation_time")
    metrics = {name.removeprefix("eval_"): value for name, value in values.items() if name.startswith("eval_")}
    metrics = {name: value for name, value in metrics.items() if name not in left_out}
    if "accuracy" not in metrics and "pearson" not in metrics and metrics["loss"] < _LARGEST_EXPONENT:
        metrics["perplexity"] = math.exp(metrics["loss"])
    return metrics


def logits(prediction: EvalPrediction | PredictionOutput) -> NDArray[np.float64]:
    """The model's main output, float64."""
    outputs = prediction.predictions
    return np.asarray(outputs[0] if isinstance(outputs, tuple) else outputs, dtype=np.float64)
