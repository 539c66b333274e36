"""User feedback and control during training: progress bar, messages, and stopping."""

from __future__ import annotations

import math
import os
import signal
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from tqdm import tqdm
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..progress_bar import is_live, progress_bar
from ..run_folder import shown_metrics
from .tasks.base import Task, plain_metrics

Announce = Callable[[str], None]


class StopOnSignal(TrainerCallback):
    """Stops training after the current step, with a checkpoint, on SIGINT or SIGTERM; at once on the second."""

    def __init__(self) -> None:
        self.signal: str | None = None

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Context in which signals stop training instead of the process."""

        def receive(number: int, frame: Any) -> None:
            if self.signal is not None:
                raise KeyboardInterrupt
            self.signal = signal.Signals(number).name

        # Other threads do not receive signals.
        is_main = threading.current_thread() is threading.main_thread()
        numbers = (signal.SIGINT, signal.SIGTERM) if is_main else ()
        before = {number: signal.signal(number, receive) for number in numbers}
        try:
            with warnings.catch_warnings():  # restores the filters, to which a stop adds one
                yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if args.world_size > 1:
            # All processes must stop after the same step, or the others would hang.
            name = torch.tensor(signal.Signals[self.signal] if self.signal else 0, device=args.device)
            torch.distributed.all_reduce(name, torch.distributed.ReduceOp.MAX)
            if name:  # a signal that arrives later counts at the next step
                self.signal = signal.Signals(int(name)).name
            else:
                return
        if self.signal is not None:
            control.should_save = control.should_training_stop = True
            warnings.filterwarnings("ignore", message="Training ended at step .* before the cut")  # it can be resumed


class StepClock(TrainerCallback):
    """Measures training steps only, without evaluations and rank reports.

    On a CPU, uses processor time, which other programs do not affect.
    """

    def __init__(self) -> None:
        self._total, self._began, self._steps = 0.0, 0.0, 0

    @property
    def has_begun(self) -> bool:
        """Whether a step began."""
        return self._began > 0

    @property
    def seconds_per_step(self) -> float:
        """Mean over this process's steps; NaN before the first."""
        return self._total / self._steps if self._steps else math.nan

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._began = _now(args)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._total += _now(args) - self._began
        self._steps += 1


def _now(args: TrainingArguments) -> float:
    return time.process_time() if args.device.type == "cpu" else time.perf_counter()


class StopOnNonFinite(TrainerCallback):
    """Raises if gradients are not finite, before they reach the weights, or if metrics are not.

    The error names place and step.
    DeepSpeed has already taken its step by then (skipping non-finite gradients), and does not report which ones.
    """

    def on_pre_optimizer_step(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: Any = None,
        optimizer: Any = None,
        **kwargs: Any,
    ) -> None:
        if args.fp16 or os.environ.get("ACCELERATE_MIXED_PRECISION") == "fp16":
            return  # the loss scaler occasionally skips steps with infinite gradients
        named = [(name, p.grad) for name, p in model.named_parameters() if p.grad is not None]
        is_finite = torch.nn.utils.get_total_norm([part for _, part in named]).isfinite()
        wrong = [] if is_finite else [name for name, part in named if not part.isfinite().all()]
        if not wrong and not getattr(optimizer, "step_was_skipped", False):
            return
        # A non-finite weight makes all gradients non-finite, so report the weight.
        broken = [name for name, p in model.named_parameters() if not p.isfinite().all()]
        what = "gradients contain NaN or infinite values"
        if wrong:
            what = f"{len(wrong)} of {len(named)} {what}, the first in {wrong[0]}"
        if broken:
            what = f"the weight {broken[0]} contains NaN or infinite values"
        raise _diverged(state.global_step + 1, what, args)

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, metrics: Any = None, **kwargs: Any
    ) -> None:
        wrong = [f"{name} is {value}" for name, value in plain_metrics(metrics).items() if not math.isfinite(value)]
        if wrong:
            raise _diverged(state.global_step, f"the evaluation's {' and '.join(wrong)}", args)


class TiesToLowerLoss(TrainerCallback):
    """Makes an evaluation the best one if it equals the best metric so far at a lower loss."""

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, metrics: Any = None, **kwargs: Any
    ) -> None:
        value = metrics.get(f"eval_{str(args.metric_for_best_model).removeprefix('eval_')}")
        losses: dict[Any, float] = {
            entry["step"]: entry["eval_loss"] for entry in state.log_history if "eval_loss" in entry
        }
        if value == state.best_metric and metrics["eval_loss"] < losses.get(state.best_global_step, -math.inf):
            state.best_metric = None  # the Trainer then takes the next one, which is this


class DivergedError(ValueError):
    """A loss, gradient, weight or metric is not finite."""


def _diverged(step: int, what: str, args: TrainingArguments) -> DivergedError:
    return DivergedError(
        f"Training has diverged: at step {step} {what}. Lower the learning rate, or check the data for extreme "
        f"values. Checkpoints in {args.output_dir} are kept."
    )


class Progress(TrainerCallback):
    """Progress bar with loss, metric and mean rank; one line per evaluation."""

    def __init__(self, announce: Announce, task: Task) -> None:
        self.announce, self.task = announce, task
        self.shown: dict[str, str] = {}
        self.bar = tqdm(disable=True)  # until training starts

    def close(self) -> None:
        """Close the bar, so that it does not overlap later output."""
        self.bar.close()

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.bar = progress_bar(
            total=state.max_steps,
            initial=state.global_step,
            desc="Training",
            unit="step",
            disable=not state.is_world_process_zero,
        )

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.bar.update()

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: Any = None, **kwargs: Any
    ) -> None:
        ranks = next((r for r in reversed(state.log_history) if "rank/stable_rank_mean" in r and r["step"]), {})
        for name, key, source in (("loss", "loss", logs), ("stable rank", "rank/stable_rank_mean", ranks)):
            if key in source:
                self.shown[name] = f"{source[key]:.4g}"
        self.bar.set_postfix(self.shown, refresh=False)

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, metrics: Any = None, **kwargs: Any
    ) -> None:
        if self.bar.disable:
            return  # evaluation of the best checkpoint, after training
        values = ", ".join(f"{name} {value:.4g}" for name, value in shown_metrics(self.task.reported(metrics)).items())
        rank = f", stable rank {self.shown['stable rank']}" if "stable rank" in self.shown else ""
        self.say(f"Step {state.global_step}: {values}{rank}")

    def say(self, line: str) -> None:
        """Announce a line without breaking the bar."""
        if not is_live():
            self.announce(line)
            return
        with self.bar.external_write_mode():
            self.announce(line)
