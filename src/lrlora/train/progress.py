"""What a user sees and can do while a run trains: a bar, lines of news, and stopping it."""

from __future__ import annotations

import math
import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
from tqdm import tqdm
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..run_folder import shown_metrics
from ..tuner.sharding import local_part
from .metrics import plain_metrics

Announce = Callable[[str], None]
_STEPS_TIMED = 10


class StopOnSignal(TrainerCallback):
    """Ends training after the step at hand, with a checkpoint, on SIGINT or SIGTERM; at once on the second."""

    def __init__(self) -> None:
        self.signal: str | None = None

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Until the end of the block, signals end training and not the process."""

        def receive(number: int, frame: Any) -> None:
            if self.signal is not None:
                raise KeyboardInterrupt
            self.signal = signal.Signals(number).name

        before = {number: signal.signal(number, receive) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if args.world_size > 1:
            # All processes end after the same step, or those that go on would wait for the others for ever.
            name = torch.tensor(signal.Signals[self.signal] if self.signal else 0, device=args.device)
            torch.distributed.all_reduce(name, torch.distributed.ReduceOp.MAX)
            if name:  # and if not, one may have come meanwhile: it counts at the next step
                self.signal = signal.Signals(int(name)).name
            else:
                return
        if self.signal is not None:
            control.should_save = control.should_training_stop = True


class StepClock(TrainerCallback):
    """Adds up the time of the steps alone, without evaluations and rank reports.

    On a CPU it is the processor's time, which other programs on the machine do not lengthen.
    """

    def __init__(self) -> None:
        self._total, self._began, self._steps = 0.0, 0.0, 0

    @property
    def has_begun(self) -> bool:
        """Whether a step has."""
        return self._began > 0

    @property
    def seconds_per_step(self) -> float:
        """The mean over the steps of this process; NaN before the first."""
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
    """Ends a run whose gradients are no longer finite before they reach the weights, or whose metrics are not.

    It says where and when.

    DeepSpeed has made its step by then, and has left it out if they are not; which they are it does not say.
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
            return  # its loss scaler meets infinite gradients now and then, and skips those steps
        named = [(name, local_part(p.grad)) for name, p in model.named_parameters() if p.grad is not None]
        norms = torch._foreach_norm([part for _, part in named]) if named else []
        finite = [math.isfinite(norm) for norm in torch.stack([n.float() for n in norms]).tolist()] if named else []
        wrong = [name for (name, _), is_finite in zip(named, finite, strict=True) if not is_finite]
        is_wrong = torch.tensor(bool(wrong) or getattr(optimizer, "step_was_skipped", False), device=args.device).int()
        if args.world_size > 1:  # each may have another part
            torch.distributed.all_reduce(is_wrong, torch.distributed.ReduceOp.MAX)
        if not is_wrong:
            return
        # A weight that does spoils all gradients: it is what should be told.
        broken = [name for name, p in model.named_parameters() if not local_part(p).isfinite().all()]
        if args.world_size > 1:
            found: list[Any] = [None] * args.world_size
            torch.distributed.all_gather_object(found, (wrong, broken))
            wrong, broken = (max(names, key=len) for names in zip(*found, strict=True))
        what = "gradients hold NaN or infinite values"
        if wrong:
            what = f"{len(wrong)} of {len(named)} {what}, first that of {wrong[0]}"
        if broken:
            what = f"the weight {broken[0]} holds NaN or infinite values"
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
        losses = {entry["step"]: entry["eval_loss"] for entry in state.log_history if "eval_loss" in entry}
        if value == state.best_metric and metrics["eval_loss"] < losses.get(state.best_global_step, -math.inf):
            state.best_metric = None  # the Trainer then takes the next one, which is this


class DivergedError(ValueError):
    """A loss, gradient, weight or metric is not finite."""


def _diverged(step: int, what: str, args: TrainingArguments) -> DivergedError:
    return DivergedError(
        f"Training has diverged: at step {step} {what}. Lower the learning rate, or look for extreme values in the "
        f"data. Checkpoints in {args.output_dir} are kept."
    )


class Progress(TrainerCallback):
    """A bar with loss, metric and mean learned rank; a line for every evaluation; the time after the first steps."""

    def __init__(self, announce: Announce) -> None:
        self.announce = announce
        self.shown: dict[str, str] = {}

    @contextmanager
    def closed_at_the_end(self) -> Iterator[None]:
        """However the block ends, the bar does not stay open over what is printed next."""
        try:
            yield
        finally:
            if hasattr(self, "bar"):
                self.bar.close()

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.bar = tqdm(
            total=state.max_steps,
            initial=state.global_step,
            desc="Training",
            unit="step",
            disable=not state.is_world_process_zero,
        )
        self.first, self.start = state.global_step, time.perf_counter()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.bar.update()
        done = state.global_step - self.first
        if done == _STEPS_TIMED:
            left = (state.max_steps - state.global_step) * (time.perf_counter() - self.start) / done
            self._say(f"After {done} steps: about {timedelta(seconds=round(left))} to go, without evaluations.")

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: Any = None, **kwargs: Any
    ) -> None:
        ranks = next((r for r in reversed(state.log_history) if "rank/stable_rank_mean" in r and r["step"]), {})
        for name, key, source in (("loss", "loss", logs), ("stable rank", "rank/stable_rank_mean", ranks)):
            if key in source:
                self.shown[name] = f"{source[key]:.4g}"
        self.bar.set_postfix(self.shown)

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, metrics: Any = None, **kwargs: Any
    ) -> None:
        if self.bar.disable:
            return  # the best checkpoint's, after training
        values = ", ".join(f"{name} {value:.4g}" for name, value in shown_metrics(plain_metrics(metrics)).items())
        rank = f", stable rank {self.shown['stable rank']}" if "stable rank" in self.shown else ""
        self._say(f"Step {state.global_step}: {values}{rank}")

    def _say(self, line: str) -> None:
        with self.bar.external_write_mode():
            self.announce(line)
