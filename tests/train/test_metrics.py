"""Metrics where their definition has gaps: absent classes, constant predictions, NaN."""

from __future__ import annotations

import math

import numpy as np
import pytest
from datasets import Dataset
from transformers import EvalPrediction

from lrlora.train.tasks import TASKS
from lrlora.train.undertraining import undertraining

RANDOM = np.random.default_rng(0)


def test_a_class_that_is_never_predicted_counts() -> None:
    labels = RANDOM.integers(4, size=200)
    outputs = 9 * np.eye(4)[np.minimum(labels, 2)]
    found = TASKS["classify"].score(EvalPrediction(outputs, labels))
    absent, last = (labels == 3).sum(), (labels == 2).sum()
    assert found["accuracy"] == pytest.approx(1 - absent / 200)
    assert found["macro_f1"] == pytest.approx((1 + 1 + 2 * last / (2 * last + absent) + 0) / 4)
    assert np.isnan(TASKS["classify"].score(EvalPrediction(outputs * np.nan, labels))["log_loss"])


def test_a_constant_prediction_has_no_correlation() -> None:
    targets = RANDOM.normal(size=50)
    found = TASKS["regress"].score(EvalPrediction(np.ones((50, 1)), targets))
    assert found["pearson"] == found["spearman"] == 0
    assert found["rmse"] == pytest.approx(np.sqrt(((1 - targets) ** 2).mean()))


def test_guessing_is_the_best_constant_answer() -> None:
    labels = [0] * 6 + [1] * 3 + [2]
    guess = TASKS["classify"].guess(Dataset.from_dict({"label": labels}))
    assert guess["accuracy"] == pytest.approx(0.6)
    assert guess["matthews"] == 0
    assert guess["log_loss"] == guess["loss"] == pytest.approx(-sum(p * math.log(p) for p in (0.6, 0.3, 0.1)))
    numbers = [1.0, 2.0, 6.0]
    guess = TASKS["regress"].guess(Dataset.from_dict({"label": numbers}))
    assert guess["pearson"] == 0
    assert guess["rmse"] == pytest.approx(np.std(numbers))
    assert guess["loss"] == pytest.approx(np.var(numbers))
    choices = Dataset.from_dict({"choices": [["a", "b"], ["a", "b"]], "label": [0, 1]})
    assert TASKS["multiple-choice"].guess(choices) == pytest.approx({"accuracy": 0.5, "loss": math.log(2)})
    assert TASKS["causal-lm"].guess(Dataset.from_dict({"text": ["a"]})) == {}


def told_by(losses: list[float], guess: float = 1.0, head_rate: float | None = 1e-3) -> str:
    log = [{"eval_loss": loss} for loss in losses]
    return " ".join(undertraining({"loss": losses[-1], "guess_loss": guess}, log, rate=1e-3, head_rate=head_rate))


def test_a_run_that_learned_little_is_told_what_to_do() -> None:
    assert "hardly better than guessing: loss 0.98, guessing 1" in told_by([1.0, 0.98])
    assert "--head-learning-rate" in told_by([1.0, 0.98])
    assert "--head-learning-rate" not in told_by([1.0, 0.98], head_rate=None)
    assert "above that of guessing: 1.2, guessing 1" in told_by([0.9, 0.8, 1.2])
    assert told_by([0.9, 0.5, 0.42, 0.41, 0.405]) == ""
    assert "fell steeply at the end, by 33%" in told_by([0.9, 0.8, 0.7, 0.6])
    assert told_by([0.8, 0.85, 0.9, 0.85]) == ""  # it rose
