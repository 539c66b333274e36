"""The metrics, each against its definition written out."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray
from transformers import EvalPrediction

from lrlora.train.tasks import KINDS

RANDOM = np.random.default_rng(0)


def correlation(a: NDArray[np.float64], b: NDArray[np.float64]) -> float:
    a, b = a - a.mean(), b - b.mean()
    return float((a * b).sum() / np.sqrt((a * a).sum() * (b * b).sum()))


def test_classification() -> None:
    # Of the last class nothing is ever predicted.
    outputs, labels = RANDOM.normal(size=(200, 4)) - [0, 0, 0, 9], RANDOM.integers(4, size=200)
    found = KINDS["classify"].score(EvalPrediction(outputs, labels))
    table = np.zeros((4, 4))
    for label, row in zip(labels, outputs, strict=True):
        table[label, row.argmax()] += 1
    right, true, predicted = table.diagonal(), table.sum(1), table.sum(0)
    assert found["accuracy"] == pytest.approx(right.sum() / 200)
    assert found["macro_f1"] == pytest.approx((2 * right / (true + predicted)).mean())
    # Gorodkin's correlation of K classes is that of the indicators of label and prediction.
    indicators = np.eye(4)[labels], np.eye(4)[outputs.argmax(1)]
    covariances = [
        sum(np.cov(a[:, k], b[:, k])[0, 1] for k in range(4)) for a in indicators for b in indicators
    ]  # label with label, label with prediction, …
    assert found["matthews"] == pytest.approx(covariances[1] / np.sqrt(covariances[0] * covariances[3]))
    shares = np.exp(outputs) / np.exp(outputs).sum(1, keepdims=True)
    assert found["log_loss"] == pytest.approx(-np.log(shares[np.arange(200), labels]).mean())
    assert np.isnan(KINDS["classify"].score(EvalPrediction(outputs * np.nan, labels))["log_loss"])


def test_regression() -> None:
    targets = RANDOM.normal(size=50)
    outputs = targets + RANDOM.normal(size=50)
    found = KINDS["regress"].score(EvalPrediction(outputs[:, None], targets))
    assert found["pearson"] == pytest.approx(correlation(outputs, targets))
    places = [values.argsort().argsort().astype(float) for values in (outputs, targets)]
    assert found["spearman"] == pytest.approx(correlation(*places))
    assert found["rmse"] == pytest.approx(np.sqrt(((outputs - targets) ** 2).mean()))
    constant = KINDS["regress"].score(EvalPrediction(np.ones((50, 1)), targets))
    assert constant["pearson"] == constant["spearman"] == 0


def test_choices() -> None:
    outputs, labels = RANDOM.normal(size=(60, 3)), RANDOM.integers(3, size=60)
    right = sum(max(range(3), key=lambda k: row[k]) == label for row, label in zip(outputs, labels, strict=True))
    assert KINDS["multiple-choice"].score(EvalPrediction(outputs, labels))["accuracy"] == pytest.approx(right / 60)
