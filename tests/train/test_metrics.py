"""Metrics where their definition has gaps: absent classes, constant predictions, NaN."""

from __future__ import annotations

import numpy as np
import pytest
from transformers import EvalPrediction

from lrlora.train.tasks import TASKS

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
