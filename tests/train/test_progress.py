"""Early stopping where metrics tie."""

from __future__ import annotations

import pytest
from transformers import EarlyStoppingCallback, TrainerControl, TrainerState, TrainingArguments

from lrlora.train.progress import TiesToLowerLoss


@pytest.mark.parametrize(("losses", "stops"), [([0.9, 0.8, 0.7, 0.6], False), ([0.9, 0.9, 0.9], True)])
def test_a_tie_with_a_lower_loss_is_better(losses: list[float], stops: bool) -> None:
    arguments = TrainingArguments(
        *("unused",),
        **{"metric_for_best_model": "accuracy", "greater_is_better": True, "use_cpu": True},
    )
    state, control, patience = TrainerState(), TrainerControl(), EarlyStoppingCallback(2)
    for step, loss in enumerate(losses, start=1):
        state.global_step = step
        metrics = {"eval_accuracy": 0.5, "eval_loss": loss}
        state.log_history.append({"step": step, **metrics})
        for callback in (TiesToLowerLoss(), patience):
            callback.on_evaluate(arguments, state, control, metrics=metrics)
        if state.best_metric is None:  # as the Trainer does after an evaluation
            state.best_metric, state.best_global_step = 0.5, step
    assert control.should_training_stop == stops
