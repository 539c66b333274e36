"""The rank history through the real Trainer."""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from lrlora import LrLoraConfig, RankLogger, rank_report
from lrlora.ranks.report import read_history
from lrlora.run_folder import HISTORY_FILE
from lrlora.train.progress import StepClock

from .conftest import TinyModel


def make_trainer(tiny: TinyModel, folder: Path, callback: RankLogger, **arguments: Any) -> Trainer:
    torch.manual_seed(0)
    model = get_peft_model(tiny.build(), LrLoraConfig(r=2, target_modules=["query", "value"], task_type="SEQ_CLS"))
    examples = [{"input_ids": [i % 90 + 3, 5, 6], "labels": i % 2} for i in range(64)]
    settings = {"max_steps": 6, "learning_rate": 1e-2, "report_to": "none", "save_strategy": "no", "use_cpu": True}
    settings |= {"logging_steps": 100, "disable_tqdm": True}
    args = TrainingArguments(output_dir=str(folder), **{**settings, **arguments})
    return Trainer(model=model, args=args, train_dataset=examples, eval_dataset=examples, callbacks=[callback])


def test_records_start_every_k_steps_and_end(tiny_bert: TinyModel, tmp_path: Path) -> None:
    callback = RankLogger(every=4)
    trainer = make_trainer(tiny_bert, tmp_path, callback)
    trainer.train()
    assert [step for step, _ in callback.history] == [0, 4, 6]
    assert all(row.stable_rank == 0 for row in callback.history[0][1].rows)
    assert all(row.stable_rank >= 1 for row in callback.history[-1][1].rows)
    assert [bool(report.curves) for _, report in callback.history] == [False, False, True]
    saved = read_history(tmp_path / HISTORY_FILE)
    assert [(step, report.rows) for step, report in saved] == [(step, r.rows) for step, r in callback.history]
    logged = [entry for entry in trainer.state.log_history if "rank/stable_rank_mean" in entry]
    assert [entry["step"] for entry in logged] == [0, 4, 6]


def test_hands_the_summary_to_report_to(tiny_bert: TinyModel, tmp_path: Path) -> None:
    make_trainer(tiny_bert, tmp_path, RankLogger(every=3), report_to="tensorboard").train()
    steps: set[int] = set()
    for folder in {path.parent for path in tmp_path.rglob("events.out.tfevents.*")}:
        events = EventAccumulator(str(folder)).Reload()
        if "train/rank/stable_rank_mean" in events.Tags()["scalars"]:
            steps |= {event.step for event in events.Scalars("train/rank/stable_rank_mean")}
    assert steps == {0, 3, 6}


def test_a_resumed_run_continues_the_history(tiny_bert: TinyModel, tmp_path: Path) -> None:
    whole, resumed = RankLogger(every=2), RankLogger(every=2)
    make_trainer(tiny_bert, tmp_path / "whole", whole).train()
    saving = {"save_strategy": "steps", "save_steps": 3}
    make_trainer(tiny_bert, tmp_path / "resumed", RankLogger(every=2), **saving).train()
    with (tmp_path / "resumed" / HISTORY_FILE).open("a") as file:
        file.write('{"step": 8, "ro')  # killed while writing
    checkpoint = str(tmp_path / "resumed" / "checkpoint-3")
    make_trainer(tiny_bert, tmp_path / "resumed", resumed, **saving).train(resume_from_checkpoint=checkpoint)
    assert [step for step, _ in resumed.history] == [step for step, _ in whole.history] == [0, 2, 4, 6]
    assert resumed.history[-1][1].rows == whole.history[-1][1].rows


def test_the_last_step_is_recorded_before_the_best_checkpoint_comes_back(tiny_bert: TinyModel, tmp_path: Path) -> None:
    callback = RankLogger(every=4)
    best = {"load_best_model_at_end": True, "metric_for_best_model": "step", "greater_is_better": False}
    steps = {"save_strategy": "steps", "eval_strategy": "steps", "save_steps": 2, "eval_steps": 2}
    trainer = make_trainer(tiny_bert, tmp_path, callback, **best, **steps)
    trainer.compute_metrics = lambda prediction: {"step": float(trainer.state.global_step)}  # the first is the best
    trainer.train()
    assert trainer.state.best_model_checkpoint.endswith("checkpoint-2")
    assert [step for step, _ in callback.history] == [0, 4, 6]
    at_step_6 = PeftModel.from_pretrained(tiny_bert.build(), tmp_path / "checkpoint-6")
    recorded = {row.module: row.stable_rank for row in callback.history[-1][1].rows}
    assert {row.module: row.stable_rank for row in rank_report(at_step_6).rows} == pytest.approx(recorded, rel=1e-4)


def test_the_clock_counts_steps_and_not_what_comes_between(tmp_path: Path) -> None:
    def work(seconds: float) -> None:
        end = time.process_time() + seconds
        while time.process_time() < end:
            pass

    clock, state, control = StepClock(), TrainerState(), TrainerControl()
    arguments = TrainingArguments(output_dir=str(tmp_path), use_cpu=True)
    assert math.isnan(clock.seconds_per_step)
    for _ in range(2):
        clock.on_step_begin(arguments, state, control)
        work(0.02)
        clock.on_step_end(arguments, state, control)
        work(0.2)  # an evaluation, say
    assert 0.02 <= clock.seconds_per_step < 0.2


def test_every_must_be_positive() -> None:
    with pytest.raises(ValueError, match=r"every .*≥ 1, got 0"):
        RankLogger(every=0)


def test_what_cannot_be_measured_at_the_start_is_an_error(tiny_bert: TinyModel, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="other"):
        make_trainer(tiny_bert, tmp_path, RankLogger(every=2, adapter="other")).train()


def test_a_diverged_run_goes_on_without_a_record(tiny_bert: TinyModel, tmp_path: Path) -> None:
    callback = RankLogger(every=2)
    trainer = make_trainer(tiny_bert, tmp_path, callback)

    class Diverge(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, model: Any, **kwargs: Any) -> None:
            if state.global_step == 3:
                next(p for n, p in model.named_parameters() if "lrlora_B" in n).data.fill_(float("nan"))

    trainer.add_callback(Diverge)
    with pytest.warns(UserWarning, match=r"step [46] .*recorded: .*\bNaN\b"):
        trainer.train()
    assert trainer.state.global_step == 6
    assert [step for step, _ in callback.history] == [0, 2]
