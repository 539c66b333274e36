"""Ranks of ΔW during training, logged by a transformers Trainer callback."""

from __future__ import annotations

import json
import warnings
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.integrations.integration_utils import get_reporting_integration_callbacks

from .files import write_whole
from .ranks.report import RankReport, rank_report, read_history
from .run_folder import HISTORY_FILE
from .sharding import is_sharded


class RankLogger(TrainerCallback):
    """Records the ranks at the start, every `every` steps and at the last training step.

    Each record is added to `history`, appended to `rank_history.jsonl` in the output folder, and logged as `rank/…`
    scalars to the Trainer's log history and every logger in `report_to`. A resumed run continues the file.

    Args:
        every: steps between records, ≥ 1.
        adapter: adapter to measure; default: the active one.

    Attributes:
        history: (step, report) in training order; only the last report keeps its curves and spectra.

    Raises:
        ValueError: `every` is below 1.

    """

    def __init__(self, every: int = 50, adapter: str | None = None) -> None:
        if every < 1:
            raise ValueError(f"every must be a number of steps ≥ 1, got {every!r}.")
        self.every = every
        self.adapter = adapter
        self.history: list[tuple[int, RankReport]] = []
        self._loggers: list[TrainerCallback] = []

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if state.is_world_process_zero:
            # Callbacks cannot access the Trainer's loggers. A second instance of each writes to the same run.
            self._loggers = [logger() for logger in get_reporting_integration_callbacks(args.report_to)]
            for logger in self._loggers:
                logger.on_train_begin(args, state, control, **kwargs)
            path = _history_path(args)
            path.parent.mkdir(parents=True, exist_ok=True)
            self.history = [record for record in read_history(path) if record[0] < state.global_step]
            write_whole(path, "".join(map(_to_line, self.history)))
        if state.global_step % self.every == 0:  # an uninterrupted run has no record at other steps
            self._record(args, state, control, **kwargs)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        # Record the last step here: when training ends, the best checkpoint may be loaded and MLflow's run closed.
        is_last = state.global_step >= state.max_steps or control.should_training_stop
        if state.global_step % self.every == 0 or is_last:
            self._record(args, state, control, **kwargs)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        # TensorBoard's has a file of its own; the others share the Trainer's run, which has ended.
        self._loggers = [logger for logger in self._loggers if getattr(logger, "tb_writer", None) is not None]
        is_recorded = bool(self.history) and self.history[-1][0] == state.global_step
        if not is_recorded and not args.load_best_model_at_end:
            self._record(args, state, control, **kwargs)
        for logger in self._loggers:
            logger.on_train_end(args, state, control, **kwargs)

    def _record(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any, **kwargs: Any
    ) -> None:
        # Processes with shards measure together; otherwise only the first one measures.
        if not state.is_world_process_zero and not is_sharded(model):
            return
        try:
            report = rank_report(model, self.adapter)
        except (ValueError, torch.OutOfMemoryError) as error:
            # Of processes that measure together, one that is out of memory must not leave the others waiting.
            if state.global_step == 0 or (is_sharded(model) and isinstance(error, torch.OutOfMemoryError)):
                raise
            # A rank measurement must not decide what happens to a diverged run.
            warnings.warn(f"Ranks at step {state.global_step} were not recorded: {error}", stacklevel=2)
            return
        if self.history:  # all curves of a long run with many layers take gigabytes
            step, last_report = self.history[-1]
            self.history[-1] = (step, RankReport(last_report.rows))
        self.history.append((state.global_step, report))
        if not state.is_world_process_zero:
            return
        with _history_path(args).open("a", encoding="utf-8") as file:
            file.write(_to_line(self.history[-1]))
        scalars = report.summary()
        entry = {**scalars, "step": state.global_step}
        if entry not in state.log_history:  # a resumed checkpoint's log already contains it
            state.log_history.append(entry)
        for logger in self._loggers:
            logger.on_log(args, state, control, logs=scalars, model=model, **kwargs)


def _history_path(args: TrainingArguments) -> Path:
    return Path(args.output_dir or ".") / HISTORY_FILE


def _to_line(record: tuple[int, RankReport]) -> str:
    step, report = record
    return json.dumps({"step": step, "rows": [asdict(row) for row in report.rows]}) + "\n"
