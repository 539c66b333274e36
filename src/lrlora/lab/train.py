"""`train`: fine-tune a user's own model on their own data."""

from __future__ import annotations

import copy
import math
import platform
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import peft
import torch
import transformers
from datasets import Dataset
from peft import PeftConfig, get_peft_model
from torch import nn
from transformers import (
    AutoTokenizer,
    EarlyStoppingCallback,
    PreTrainedTokenizerBase,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)
from transformers.trainer_utils import SchedulerType

from .. import __version__
from ..callback import RankCallback
from ..distributed import is_sharded, trained_parameters
from ..files import readable, replacing_files, write_json
from ..rank import RankReport, rank_report
from ..report.card import write_card
from ..run_folder import (
    ANOTHER_CHECKPOINT,
    CHAT,
    LOG_FILE,
    METRICS_FILE,
    PLAIN,
    REPORT_FILE,
    RUN_FILE,
    TEXT,
    last_whole_checkpoint,
    require_readable,
)
from .chat import choose_template, format_of, rendering_of, shown_example
from .config import TrainConfig, read_run, require_startable
from .data import TaskData, choose_max_length, load_task_data
from .kinds import Kind, kind_for
from .methods import METHODS, AdaLoraCallback, adapter_config, set_rank_pattern, start_from_data
from .metrics import plain_metrics
from .models import (
    MODEL_EXPECTED,
    check_model,
    give_head_its_rate,
    load_model,
    make_trainer,
    max_tokens,
    model_source,
    training_arguments,
)
from .progress import Announce, Progress, StepClock, StopOnNonFinite, StopOnSignal
from .sharding import check_sharding, load_in_every_process, prepare_sharding, require_same_sharding


class Interrupted(Exception):  # noqa: N818 (it is no error)
    """Training was stopped from outside (Ctrl-C, SIGTERM), after a checkpoint was written."""


@dataclass(frozen=True)
class TrainResult:
    """What a finished run gives.

    Attributes:
        output: the folder with adapter, tokenizer, metrics and rank history.
        metrics: of the best checkpoint on the validation split.
        log_history: the Trainer's, with losses, metrics and mean learned ranks by step.
        model: the trained model.
        is_first: whether this is the first of the processes that train together, which writes and tells.
        seconds_per_step: mean time of a training step; on a CPU processor time.

    """

    output: Path
    metrics: dict[str, float]
    log_history: list[dict[str, float]]
    model: nn.Module
    is_first: bool = True
    seconds_per_step: float = math.nan


def train(
    config: TrainConfig,
    *,
    resume: bool = False,
    overwrite: bool = False,
    announce: Announce = print,
    illustrate: Callable[[Path], None] | None = None,
) -> TrainResult:
    """Fine-tune a model on data; everything that goes with it lands in `config.output`.

    Data, settings and the fit of task and model are checked before the model is loaded. Ctrl-C or SIGTERM writes a
    checkpoint first; a second one stops at once.

    Args:
        config: the run.
        resume: go on from the last checkpoint in the output folder, which must be of the same run.
        overwrite: replace the run in the output folder.
        announce: is given the plan and what is being done, line by line.
        illustrate: is given the folder once the ranks are in it, to draw the picture of the model card, as
            `lrlora.report.figure.illustrate` does. Default: no picture, and no charts are imported.

    Raises:
        FileExistsError: the output folder is in use.
        FileNotFoundError: model or data is missing.
        ValueError: the data or a setting cannot be used.
        Interrupted: the run was stopped; the message says how to resume it.

    """
    output = Path(config.output)
    require_startable(config, resume=resume, overwrite=overwrite)
    check_sharding(config)
    inputs = _Inputs.read(config)
    # A resumed run may have another number of processes, and must go on with the same examples in every step.
    examples_per_step = read_run(output)[1].examples_per_step if resume else None
    arguments = training_arguments(config, inputs.kind, inputs.examples, inputs.max_length, examples_per_step)
    if arguments.process_index != 0:
        announce = _say_nothing
    model, adapter = _adapted_model(config, inputs, arguments.max_steps)
    for line in _plan(config, inputs, model, arguments):
        announce(line)
    if inputs.rendering is not None:
        announce(f"Format: {_format_line(config, inputs)}")
    clock, stop, progress = StepClock(), StopOnSignal(), Progress(announce)
    callbacks = _callbacks(config, clock, progress, stop)
    trainer = make_trainer(inputs.kind, model, inputs.tokenizer, arguments, *inputs.encoded(), callbacks)
    if inputs.rendering is not None:
        for line in _encoded_lines(trainer, inputs):
            announce(line)
    prepare_sharding(trainer)
    start_from_data(trainer, adapter)
    if config.head_learning_rate is not None:
        give_head_its_rate(trainer, config.head_learning_rate)
    last = _last_checkpoint(output, trainer) if resume else None
    # Only now, when all is known to work in every process, is anything on disk touched.
    _wait_for_all(arguments)
    if arguments.process_index == 0:
        _make_folder(output, overwrite, None if resume else _record_of(config, inputs, arguments))
    _wait_for_all(arguments)
    with stop.listening(), progress.closed_at_the_end():
        _run(trainer, last, clock, announce)
    if stop.signal is not None and (done := trainer.state.global_step) < (steps := arguments.max_steps):
        where = f"after step {done} of {steps}; a checkpoint is in {output}. {resume_hint(output)}"
        raise Interrupted(f"Stopped by {stop.signal} {where}")
    metrics = plain_metrics(trainer.evaluate())
    return _finish(trainer, config, inputs.untouched, output, metrics, clock.seconds_per_step, illustrate)


@dataclass(frozen=True)
class _Inputs:
    """What a run is made from, read and checked."""

    kind: Kind
    source: str  # of the model
    data: TaskData
    tokenizer: PreTrainedTokenizerBase
    untouched: PreTrainedTokenizerBase  # encoding leaves its length in a tokenizer, unless a cache has spared it
    max_length: int
    too_long: int  # examples that are cut
    rendering: str | None  # of prompts and chats

    @classmethod
    def read(cls, config: TrainConfig) -> _Inputs:
        source = model_source(config.model)
        model_config = check_model(source, config)
        kind = kind_for(config.task, model_config)
        if not kind.has_head and config.head_learning_rate is not None:
            raise ValueError(
                f"head_learning_rate={config.head_learning_rate!r} is for a new head, and {config.model} answers "
                "multiple choice without one. Leave it out."
            )
        data = load_task_data(config)
        with readable(config.model, MODEL_EXPECTED):
            tokenizer = AutoTokenizer.from_pretrained(source)
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
        choose_template(tokenizer, config.chat_template)
        untouched = copy.deepcopy(tokenizer)
        limit = max_tokens(tokenizer, model_config)
        counts = kind.lengths(data.splits["train"], tokenizer)
        max_length = config.max_length or choose_max_length(counts, limit)
        if max_length > limit:
            raise ValueError(f"max_length must be at most {limit}, the model's own limit, and is {max_length}.")
        too_long = sum(count > max_length for count in counts)
        rendering = rendering_of(data.splits["train"], tokenizer) if kind.generates else None
        return cls(kind, source, data, tokenizer, untouched, max_length, too_long, rendering)

    @property
    def examples(self) -> int:
        """To train on."""
        return len(self.data.splits["train"])

    def encoded(self) -> tuple[Dataset, Dataset]:
        """Training and validation."""
        train, validation = (
            self.kind.encode(self.data.splits[name], self.tokenizer, self.max_length)
            for name in ("train", "validation")
        )
        return train, validation


def _adapted_model(config: TrainConfig, inputs: _Inputs, steps: int) -> tuple[Any, PeftConfig | None]:
    """The model to train, and the configuration of its adapter, if it has one."""
    adapter = adapter_config(config.method, inputs.kind.adapter_fields, steps, config.adapter)
    if adapter is None or inputs.kind.has_head:
        load_in_every_process()
    set_seed(config.seed)
    model = load_model(inputs.source, config, inputs.data.labels, inputs.tokenizer)
    return (model if adapter is None else get_peft_model(model, adapter)), adapter


def _callbacks(config: TrainConfig, clock: StepClock, progress: Progress, stop: StopOnSignal) -> list[TrainerCallback]:
    # A step's end is the clock's first, and what the ranks' record costs is no part of the step.
    callbacks: list[TrainerCallback] = [clock]
    if METHODS[config.method].has_ranks:
        callbacks.append(RankCallback(every=config.rank_every))
    callbacks += [progress, stop, StopOnNonFinite()]
    if config.method == "adalora":
        callbacks.append(AdaLoraCallback())
    if config.early_stopping:
        callbacks.append(EarlyStoppingCallback(config.early_stopping))
    return callbacks


def _last_checkpoint(output: Path, trainer: Trainer) -> Path | None:
    """Where the run goes on from; None: from its start."""
    last = last_whole_checkpoint(output)
    if last is not None:
        require_same_sharding(last, trainer)
        require_readable(last)
    return last


def _run(trainer: Trainer, last: Path | None, clock: StepClock, announce: Announce) -> None:
    if last is None:
        trainer.train()
        return
    announce(f"Resuming from step {last.name.rpartition('-')[2]}.")
    with readable(last, ANOTHER_CHECKPOINT, until=lambda: clock.has_begun):
        trainer.train(resume_from_checkpoint=str(last))


def _make_folder(output: Path, overwrite: bool, record: dict[str, Any] | None) -> None:
    folder = output.resolve()  # it may be a link
    if overwrite and output.exists():
        # Under another name first: whenever this process is killed, there is no half of the old run.
        old = folder.with_name(f".{folder.name}.partial")
        shutil.rmtree(old, ignore_errors=True)
        folder.rename(old)
        shutil.rmtree(old)
    folder.mkdir(parents=True, exist_ok=True)
    if record is not None:
        write_json(output / RUN_FILE, record)


def _say_nothing(line: str) -> None:
    pass


def _wait_for_all(arguments: TrainingArguments) -> None:
    if arguments.world_size > 1:
        torch.distributed.barrier()


def resume_hint(output: Path) -> str:
    """How to go on with the run in a folder."""
    return f"Go on with: lrlora train --resume {output}"


def _plan(config: TrainConfig, inputs: _Inputs, model: nn.Module, arguments: Any) -> list[str]:
    """What is about to happen, in three lines."""
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    schedule, splits = SchedulerType(arguments.lr_scheduler_type).value, inputs.data.splits
    return [
        f"Plan: {config.method} on {config.model}, {config.task}: {trainable:,} trainable parameters, "
        f"{arguments.max_steps} steps of {_examples_per_step(arguments)} examples.",
        f"Data: {len(splits['train']):,} examples to train on, {len(splits['validation']):,} to validate; "
        f"{inputs.too_long:,} of the first are longer than {inputs.max_length} tokens and are cut there.",
        f"Learning rate {arguments.learning_rate:g} with schedule {schedule} and warm-up {arguments.warmup_steps:g}, "
        f"evaluation every {arguments.eval_steps:g} steps, seed {config.seed}.",
    ]


def _encoded_lines(trainer: Trainer, inputs: _Inputs) -> Iterator[str]:
    """What became of the examples: how many TRL leaves out, and how the first one is read."""
    encoded, arguments = trainer.train_dataset, trainer.args
    left = inputs.examples - len(encoded)  # type: ignore[arg-type]
    if left and not getattr(arguments, "packing", False):
        yield (
            f"Left out: {left:,} of {inputs.examples:,} examples, whose first {inputs.max_length} tokens hold nothing "
            "that the loss is taken of."
        )
    first = next(iter(encoded))  # type: ignore[arg-type]
    yield f"Example, with the loss taken in ⟦ ⟧: {shown_example(first, inputs.tokenizer)!r}"


def _format_line(config: TrainConfig, inputs: _Inputs) -> str:
    """What the data was taken for, and how it is read."""
    found = format_of(inputs.data.splits["train"].column_names)
    given = config.chat_template
    template = "the model's own chat template" if given is None else f"the chat template {given}"
    how = {CHAT: f"as chats, written with {template}", PLAIN: "as plain text, without a template", TEXT: "as it is"}
    return f"{found.name}, read {how[str(inputs.rendering)]}."


def _finish(
    trainer: Trainer,
    config: TrainConfig,
    tokenizer: PreTrainedTokenizerBase,
    output: Path,
    metrics: dict[str, float],
    seconds_per_step: float,
    illustrate: Callable[[Path], None] | None,
) -> TrainResult:
    model: Any = trainer.model
    is_first = trainer.is_world_process_zero()
    result = TrainResult(output, metrics, trainer.state.log_history, model, is_first, seconds_per_step)
    if config.method == "adalora":
        set_rank_pattern(model)
    # Of a sharded model, all processes gather it together.
    state = trained_parameters(model) if is_sharded(model) else None
    report = rank_report(model) if METHODS[config.method].has_ranks and (result.is_first or state is not None) else None
    if not result.is_first:
        _wait_for_all(trainer.args)
        return result
    if report is not None:
        report.to_json(output / REPORT_FILE)
    with replacing_files(output) as partial:
        model.save_pretrained(partial, state_dict=state)
        tokenizer.save_pretrained(partial)
    write_json(output / LOG_FILE, trainer.state.log_history)
    if METHODS[config.method].has_ranks:
        if illustrate is not None:
            illustrate(output)
        write_card(output, metrics)
    # Last: a run with metrics is a finished one.
    write_json(output / METRICS_FILE, metrics)
    for folder in output.glob("checkpoint-*"):
        shutil.rmtree(folder)
    for left in output.glob("*.partial"):
        left.unlink()
    _wait_for_all(trainer.args)
    return result


def rank_report_of(output: Path) -> RankReport | None:
    """The learned ranks of a finished run, if its method has them."""
    path = output / REPORT_FILE
    return RankReport.from_json(path) if path.exists() else None


def _record_of(config: TrainConfig, inputs: _Inputs, arguments: TrainingArguments) -> dict[str, Any]:
    modules = (torch, transformers, peft, datasets)
    versions = {"lrlora": __version__, "python": platform.python_version()}
    return {
        "config": config.to_dict(),
        "labels": inputs.data.labels,
        "max_length": inputs.max_length,
        "examples_per_step": _examples_per_step(arguments),
        "rendering": inputs.rendering,
        "chat_template": inputs.tokenizer.chat_template if inputs.rendering == CHAT else None,
        "versions": versions | {module.__name__: module.__version__ for module in modules},
    }


def _examples_per_step(arguments: TrainingArguments) -> int:
    # `train_batch_size` is that of all GPUs of a process.
    return arguments.train_batch_size * arguments.gradient_accumulation_steps * arguments.world_size
