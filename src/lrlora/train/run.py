"""`train`: fine-tune a model on user data.

A run has four steps after the checks of its settings: load the inputs (`Inputs.read`), prepare the Trainer and announce
the plan (`prepare`), train (`_fit`), and save results with ranks, card and metrics (`_finish`).
"""

from __future__ import annotations

import math
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from torch import nn
from transformers import (
    EarlyStoppingCallback,
    PreTrainedTokenizerBase,
    ProcessorMixin,
    Trainer,
    TrainerCallback,
    TrainerState,
)
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import align_special_tokens

from ..adapters import factorize, read_updates, save_as_lora
from ..adapters.card import LORA_FOLDER
from ..by_class import CLASSES_FILE
from ..checks import DEFAULT_ENERGY
from ..files import readable, replacing_files, write_json, writing
from ..learned.callback import FittedRanksCallback
from ..learning_rate import PROBES, find_learning_rate, probe_steps
from ..locks import only_writer, remove_left
from ..lora.config import variant_option
from ..rank_logger import RankLogger
from ..ranks import RankReport, rank_report
from ..run_folder import (
    ANOTHER_CHECKPOINT,
    CHOSE,
    LOG_FILE,
    METRICS_FILE,
    REPORT_FILE,
    RUN_FILE,
    RunRecord,
    is_chosen,
    resume_hint,
    with_guess,
)
from ..shrunk import SHRUNK_FILE
from ..tuner import LrLoraConfig
from ..views.model_card import write_card
from .inputs import Inputs, examples_per_step
from .methods import METHODS
from .plan import learned_in, ranks_line, seconds_per_batch
from .prepare import last_checkpoint, prepare, require_same_run, require_startable
from .progress import Announce, Progress, StepClock, StopOnNonFinite, StopOnSignal, TiesToLowerLoss
from .settings import TrainConfig
from .tasks import TASKS
from .undertraining import undertraining


class Interrupted(KeyboardInterrupt):
    """Training was stopped externally (Ctrl-C, SIGTERM), after saving a checkpoint."""


@dataclass(frozen=True)
class TrainResult:
    """Result of a finished run.

    Attributes:
        output: folder with adapter, tokenizer, metrics and rank history.
        metrics: validation metrics of the best checkpoint.
        log_history: the Trainer's log with losses, metrics and mean fitted ranks by step.
        model: the trained model.
        is_first: whether this is the main process, which writes files and prints.
        seconds_per_step: mean time of a training step; CPU time when training on a CPU.
        examples: number of examples, by split.
        fitted_ranks: module → rank after the cut; None if ranks were not fitted.

    """

    output: Path
    metrics: dict[str, float]
    log_history: list[dict[str, float]]
    model: nn.Module
    is_first: bool = True
    seconds_per_step: float = math.nan
    examples: dict[str, int] = field(default_factory=dict)
    fitted_ranks: dict[str, int] | None = None


def train(
    config: TrainConfig,
    *,
    resume: bool = False,
    overwrite: bool = False,
    announce: Announce = print,
) -> TrainResult:
    """Fine-tune a model on data; writes all results to `config.output`.

    Settings, data and the fit of task and model are checked before training. Ctrl-C or SIGTERM saves a
    checkpoint first; a second one stops immediately.

    Args:
        config: the run.
        resume: continue from the last checkpoint in the output folder, of the same run.
        overwrite: replace the run in the output folder.
        announce: receives the plan and progress messages, line by line.

    Raises:
        BlockingIOError: another process trains in the output folder.
        FileExistsError: the output folder is in use.
        FileNotFoundError: model or data is missing.
        ValueError: the data or a setting is invalid.
        Interrupted: the run was stopped; the message explains how to resume it.

    """
    output = Path(config.output)
    announce = _in_first_process(announce)
    clock, stop, progress = StepClock(), StopOnSignal(), Progress(announce, TASKS[config.task])
    with only_writer(output):
        resumed = require_startable(config, resume=resume, overwrite=overwrite)
        inputs = Inputs.read(config)
        if resumed is not None:
            require_same_run(output, resumed, inputs.record)
            # The number of processes may change, the examples per step may not.
            inputs = replace(inputs, record=replace(inputs.record, examples_per_step=resumed.examples_per_step))
        rate = resumed.found_rate if resumed is not None else None
        with _leaving_no_folder(output):
            trainer = prepare(config, inputs, _callbacks(config, clock, progress, stop), announce)
            if config.find_rate and rate is None:
                found = find_learning_rate(trainer, update=False)  # as where it is read from the record
                announce(str(found))
                rate = found.rate
        if rate is not None:
            trainer.args.learning_rate = rate
        record = replace(inputs.record, examples_per_step=examples_per_step(trainer.args), found_rate=rate)
        last = last_checkpoint(output, trainer, announce) if resumed else None
        # Modify files only after all checks have passed in every process.
        trainer.accelerator.wait_for_everyone()
        if trainer.is_world_process_zero():
            _make_folder(output, overwrite, None if resume else record)
        trainer.accelerator.wait_for_everyone()
        with stop.listening(), closing(progress):
            _fit(trainer, last, clock, announce)
        done, steps = trainer.state.global_step, trainer.args.max_steps
        if stop.signal is not None and done < steps:
            where = f"after step {done} of {steps}; a checkpoint is in {output}. {resume_hint(output)}"
            raise Interrupted(f"Stopped by {stop.signal} {where}")
        return _finish(config, inputs, trainer, clock.seconds_per_step, announce)


def show_plan(
    config: TrainConfig, *, resume: bool = False, overwrite: bool = False, announce: Announce = print
) -> None:
    """Print the plan of `train`, with an example as the model reads it, and its time; trains nothing.

    Raises:
        FileExistsError: the output folder is in use.
        FileNotFoundError: model or data is missing.
        ValueError: the data or a setting is invalid.

    """
    require_startable(config, resume=resume, overwrite=overwrite)
    announce = _in_first_process(announce)
    with tempfile.TemporaryDirectory() as elsewhere:  # the Trainer creates its output folder immediately
        config = replace(config, output=elsewhere)
        trainer = prepare(config, Inputs.read(config), [], announce)
        arguments, steps = trainer.args, trainer.args.max_steps
        if config.find_rate:
            steps += PROBES * probe_steps(arguments.max_steps)
        if arguments.world_size == 1 and not arguments.deepspeed:
            total = steps * arguments.gradient_accumulation_steps * seconds_per_batch(trainer)
            announce(f"Time: about {timedelta(seconds=round(total))} on this machine, without evaluations.")


@contextmanager
def _leaving_no_folder(output: Path) -> Iterator[None]:
    """Remove the folder that a Trainer made, if an error occurs before anything is in it."""
    is_new = not output.exists()
    try:
        yield
    except BaseException:
        if is_new:
            with suppress(OSError):
                output.rmdir()
        raise


def _has_live_ranks(config: TrainConfig) -> bool:
    """Whether the ranks of the model in memory are those of its update, which a start such as PiSSA's is not."""
    return METHODS[config.method].has_ranks and variant_option(SimpleNamespace(**config.adapter)) is None


def _callbacks(config: TrainConfig, clock: StepClock, progress: Progress, stop: StopOnSignal) -> list[TrainerCallback]:
    # The clock comes first at a step's end, so that it excludes the cost of rank records.
    callbacks: list[TrainerCallback] = [clock]
    if config.cut is not None and config.learns_ranks and config.size is not None:
        callbacks.append(FittedRanksCallback(**config.cut.options))
    if _has_live_ranks(config):
        callbacks.append(RankLogger(every=config.rank_every))
    callbacks += [progress, stop, StopOnNonFinite(), TiesToLowerLoss(), *METHODS[config.method].callbacks()]
    if config.early_stopping:
        callbacks.append(EarlyStoppingCallback(config.early_stopping))
    return callbacks


def _fit(trainer: Trainer, last: Path | None, clock: StepClock, announce: Announce) -> None:
    with writing(Path(str(trainer.args.output_dir))):
        if last is None:
            trainer.train()
            return
        step = int(last.name.rpartition("-")[2])
        announce(f"Resuming from step {step}.")
        if step >= trainer.args.max_steps:
            _load_trained(trainer, last)
            return
        with readable(last, ANOTHER_CHECKPOINT, until=lambda: clock.has_begun):
            trainer.train(resume_from_checkpoint=str(last))


def _load_trained(trainer: Trainer, last: Path) -> None:
    """Load the final checkpoint of a run that was killed before it finished; the Trainer would train one more step."""
    with readable(last, ANOTHER_CHECKPOINT):
        trainer._load_from_checkpoint(str(last))
        trainer.state = TrainerState.load_from_json(str(last / TRAINER_STATE_NAME))
    if isinstance(trainer.processing_class, (PreTrainedTokenizerBase, ProcessorMixin)):
        # As `train` does, so that config.json is the same.
        align_special_tokens(trainer.model, trainer.processing_class)
    callbacks = [each for each in trainer.callback_handler.callbacks if isinstance(each, FittedRanksCallback)]
    parts = {"model": trainer.model, "optimizer": trainer.create_optimizer()} if callbacks else {}
    for callback in callbacks:  # reads the ranks from the state, with the factors of the final checkpoint
        callback.on_train_begin(trainer.args, trainer.state, trainer.control, **parts)
    if trainer.args.load_best_model_at_end and trainer.state.best_model_checkpoint:
        with readable(Path(trainer.state.best_model_checkpoint), ANOTHER_CHECKPOINT):
            trainer._load_best_model()
    for callback in callbacks:
        callback.on_train_end(trainer.args, trainer.state, trainer.control, **parts)


def _make_folder(output: Path, overwrite: bool, record: RunRecord | None) -> None:
    folder = output.resolve()  # it may be a link
    if overwrite and output.exists():
        # Rename first: if the process is killed, no partial old run remains.
        old = folder.with_name(f".{folder.name}-{os.getpid()}.partial")
        shutil.rmtree(old, ignore_errors=True)  # of a killed process with the same number
        folder.rename(old)
        shutil.rmtree(old)
    folder.mkdir(parents=True, exist_ok=True)
    remove_left(folder)
    if record is not None:
        write_json(output / RUN_FILE, asdict(record))


def _in_first_process(announce: Announce) -> Announce:
    """Restrict messages to rank 0, as numbered by the launcher before the processes join."""
    return announce if os.environ.get("RANK", "0") == "0" else lambda line: None


def _finish(
    config: TrainConfig, inputs: Inputs, trainer: Trainer, seconds_per_step: float, announce: Announce
) -> TrainResult:
    """Evaluate the trained model, and save it with ranks, card and metrics."""
    arguments, output = trainer.args, Path(config.output)
    learned = learned_in(trainer)
    ranks = None if learned is None else learned.ranks
    if (best := trainer.state.best_global_step) and arguments.load_best_model_at_end:
        measure = str(arguments.metric_for_best_model).removeprefix("eval_")
        announce(f"Kept: step {best} of {arguments.max_steps}, the best by {measure}.")
    guess = inputs.task.guess(inputs.data.splits["validation"])
    course = [*trainer.state.log_history]  # to which the evaluation adds the loss of the kept step
    metrics = with_guess(inputs.task.reported(trainer.evaluate()), guess)
    by_class = inputs.task.by_class(trainer, inputs.data.labels)
    rate = arguments.learning_rate
    head_rate = rate * getattr(trainer, "head_factor", 1) if inputs.task.has_head else None
    for line in undertraining(metrics, course, rate=rate, head_rate=head_rate):
        announce(line)
    if learned is not None and ranks is not None:
        announce(ranks_line(ranks, learned.parameters))
    model: Any = trainer.model
    is_first = trainer.is_world_process_zero()
    examples = {name: len(part) for name, part in inputs.data.splits.items()}
    result = TrainResult(output, metrics, trainer.state.log_history, model, is_first, seconds_per_step, examples, ranks)
    METHODS[config.method].finish(model)
    if not result.is_first:
        trainer.accelerator.wait_for_everyone()
        return result
    report = rank_report(model) if _has_live_ranks(config) else None
    if report is not None:
        report.to_json(output / REPORT_FILE)
    if learned is not None and learned.shrunk is not None:
        write_json(output / SHRUNK_FILE, asdict(learned.shrunk))
    with replacing_files(output) as partial:
        model.save_pretrained(partial)
        inputs.saved_processor.save_pretrained(partial)
        if inputs.task.has_head and config.method != "full":
            model.get_base_model().config.save_pretrained(partial)  # contains the class names
    # JSON cannot store infinite gradients, which a loss scaler skips.
    log = [
        {name: value for name, value in entry.items() if not isinstance(value, float) or math.isfinite(value)}
        for entry in result.log_history
    ]
    write_json(output / LOG_FILE, log)
    if by_class is not None:
        write_json(output / CLASSES_FILE, asdict(by_class))
    if METHODS[config.method].config is LrLoraConfig:
        _save_plain_lora(output, announce)  # before the card, which mentions it
    if report is not None:
        write_card(output, metrics)
    # Last: metrics mark a run as finished.
    write_json(output / METRICS_FILE, {**metrics, CHOSE: is_chosen(inputs.record.config)})
    for folder in output.glob("checkpoint-*"):
        shutil.rmtree(folder)
    trainer.accelerator.wait_for_everyone()
    return result


def _save_plain_lora(output: Path, announce: Announce) -> None:
    """Save the update as a plain LoRA, for use with PEFT alone: exact if it is a product."""
    shutil.rmtree(output / LORA_FOLDER, ignore_errors=True)  # left by a killed process
    try:
        updates = read_updates(output)
        energy = 1.0 if updates.are_products else DEFAULT_ENERGY
        save_as_lora(factorize(updates, energy=energy), updates, output / LORA_FOLDER)
    except ValueError as error:  # not every update can be a LoRA, and the run is done
        announce(f"No plain LoRA was saved with the adapter. {error}")


def rank_report_of(output: Path) -> RankReport | None:
    """Ranks of a finished run, or None."""
    path = output / REPORT_FILE
    return RankReport.from_json(path) if path.exists() else None
