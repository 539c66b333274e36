"""Messages of a run before it starts: its plan, its data, and its first example."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping
from itertools import islice
from statistics import median
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers import Trainer, TrainingArguments
from transformers.trainer_utils import SchedulerType

from ..learned.callback import FittedRanksCallback, planned_cut
from ..learned.cut import WIDTH
from ..learned.fitted_ranks import FittedRanks
from ..run_folder import ANSWERS, CHAT, PLAIN, TEXT, shown_metrics
from .chat import format_of, without_answer
from .inputs import Inputs, examples_per_step
from .methods import LEARNED, METHODS
from .settings import TrainConfig

# Best rates of LoRA, at α/r of 1 to 2 and 60 to 400 steps: lab/studies/finder.md, heads.md and rates.md.
_HEAD_RATES, _LANGUAGE_RATES = (1e-3, 2e-3), (5e-4, 3.2e-3)
_SLOW = 20.0  # seconds of a batch, after which no other is timed


def plan(
    config: TrainConfig, inputs: Inputs, model: Any, arguments: TrainingArguments, head_factor: float | None
) -> list[str]:
    """Summary of the run in a few lines; `head_factor` is the head's learning rate over the adapter's."""
    counts = [(p.numel(), p.requires_grad) for p in model.parameters()]
    trainable = sum(count for count, is_trained in counts if is_trained)
    schedule, splits = SchedulerType(arguments.lr_scheduler_type).value, inputs.data.splits
    evaluates = arguments.eval_strategy != "no"
    evaluation = f"evaluation every {arguments.eval_steps:g} steps" if evaluates else "evaluation only at the end"
    examples = examples_per_step(arguments)
    ranks = []
    cut = config.cut
    if cut is not None and config.learns_ranks:
        size, step = planned_cut(model, arguments, cut)
        wide = model.peft_config["default"].r
        kept = (
            f"the {size:,} parameters ({config.size}) that the loss needs most"
            if size is not None
            else f"the fewest parameters found that keep {cut.keep:.4g} of the gain so far on validation data"
        )
        rate = "(parameters before / after)^½" if cut.rate is None else f"{cut.rate:g}"
        ranks = [f"Ranks: fitted: r = {wide} until step {step}, then {kept}, at {rate} times the learning rate."]
    elif cut is not None:
        goal = f"of {config.size}" if config.size else f"that keeps {cut.keep:.4g} of the gain"
        ranks = [f"After training: lora/ is a plain LoRA {goal}, of the directions that the loss needs most."]
    warm_up = f"{arguments.warmup_steps:g} steps"
    if 0 < arguments.warmup_steps < 1:
        warm_up = f"{100 * arguments.warmup_steps:g} %"
    longest = inputs.record.max_length
    truncated = f"; {inputs.too_long:,} training examples are truncated to {longest} tokens" if inputs.too_long else ""
    method = LEARNED if config.learns_ranks else config.method
    rate = f"Learning rate {arguments.learning_rate:g}"
    head_rate = "" if head_factor is None else f", of the head {head_factor * arguments.learning_rate:g},"
    if config.find_rate:
        rate = "Learning rate found by short trainings first"
        head_rate = "" if head_factor is None else f", of the head {head_factor:g} times as high,"
    epochs = arguments.max_steps / max(1, math.ceil(inputs.rows / examples))
    return [
        f"Plan: {method} on {config.model}, {config.task}: {trainable:,} trainable parameters "
        f"({trainable / sum(count for count, _ in counts):.2%} of all), {arguments.max_steps} steps of {examples} "
        f"examples, {epochs:.2g} epochs.",
        *_adapter_lines(config.method, model),
        *ranks,
        *([] if config.start_from is None else [f"Starts from: {config.start_from}."]),
        f"Data: {len(splits['train']):,} training and {len(splits['validation']):,} validation examples{truncated}.",
        *inputs.data.notes,
        *_guess_line(inputs),
        f"{rate}{head_rate} with schedule {schedule} and {warm_up} of warm-up, {evaluation}, seed {config.seed}.",
        *(
            []
            if config.find_rate
            else _rate_line(arguments.learning_rate, config.method, has_head=inputs.task.has_head)
        ),
    ]


def _rate_line(rate: float, method: str, *, has_head: bool) -> Iterator[str]:
    """Warning of a LoRA's learning rate that is far from those that were best in the studies."""
    low, high = _HEAD_RATES if has_head else _LANGUAGE_RATES
    if method == "lora" and not low / 2 <= rate <= 2 * high:
        yield (
            f"Warning: a learning rate of {rate:g} is far from the best of LoRA in our studies of such tasks, "
            f"{low:g} to {high:g}. Pass --learning-rate, or --find-rate."
        )


def _guess_line(inputs: Inputs) -> Iterator[str]:
    """Metrics to beat: those of the best constant answer to the validation examples."""
    guess = shown_metrics(inputs.task.guess(inputs.data.splits["validation"]))
    if guess:
        yield f"Guessing: {', '.join(f'{name} {value:.4g}' for name, value in guess.items())}, by one answer to all."


def _adapter_lines(method: str, model: nn.Module) -> list[str]:
    """Rank, α and targets; and a warning about ranks that exceed a layer's size."""
    if not isinstance(model, PeftModel):
        return []
    config: Any = model.peft_config["default"]
    layers: list[Any] = [m for m in model.modules() if isinstance(m, BaseTunerLayer)]
    known = METHODS[method]
    r, name = getattr(config, known.rank, None), known.alpha
    alpha = f", α = {getattr(config, name):g}" if name else ""
    # PEFT replaces "all-linear" by the modules it finds.
    targets = config.target_modules
    told = (
        targets if isinstance(targets, str) else ", ".join(sorted({path.rpartition(".")[2] for path in targets or ()}))
    )
    lines = [f"Adapter: {method}, r = {r}{alpha}, on {told} ({len(layers)} modules)."]
    limits = [min(each.in_features, each.out_features) for each in layers if hasattr(each, "in_features")]
    if r and limits and r > WIDTH * max(limits):
        raise ValueError(
            f"r = {r} is too large: the layers have a rank of at most {max(limits)}. Lower --rank or --size."
        )
    if r and (narrow := [limit for limit in limits if limit < r]):
        lines.append(
            f"Warning: r = {r} exceeds the maximum rank of {len(narrow)} of {len(layers)} layers ({min(narrow)})."
        )
    return lines


def describe_encoded(trainer: Trainer, inputs: Inputs) -> Iterator[str]:
    """Data format, number of examples that TRL drops, and the first example as the model reads it.

    Raises:
        ValueError: no example is left to train on.

    """
    if inputs.record.rendering is not None:
        yield f"Format: {_format_line(inputs)}"
        if unanswered := without_answer(inputs.data.splits["train"]):
            last = " The loss leaves their last turns out." if inputs.record.loss_on == ANSWERS else ""
            yield f"Warning: {unanswered:,} of {inputs.count:,} chats do not end with an answer.{last}"
    encoded, arguments = trainer.train_dataset, trainer.args
    if not len(encoded):  # type: ignore[arg-type]
        raise ValueError(
            f"No example has an answer within its first {inputs.record.max_length} tokens. Increase --max-length, or "
            "use shorter chats."
        )
    validation: Any = trainer.eval_dataset
    for kind, count, left in (
        ("", inputs.count, len(encoded)),  # type: ignore[arg-type]
        ("validation ", len(inputs.data.splits["validation"]), len(validation)),
    ):
        if count > left and not getattr(arguments, "packing", False):
            yield (
                f"Skipped {count - left:,} of {count:,} {kind}examples, whose first {inputs.record.max_length} tokens "
                "contain nothing to compute the loss on."
            )
    first = next(iter(encoded))  # type: ignore[arg-type]
    yield inputs.task.shown(first, inputs.processor, inputs.data.labels)


def _format_line(inputs: Inputs) -> str:
    """Detected data format and rendering."""
    format_ = format_of(inputs.data.splits["train"].column_names)
    given = inputs.record.config["chat_template"]
    template = "the model's own chat template" if given is None else f"the chat template {given}"
    how = {CHAT: f"as chats, rendered with {template}", PLAIN: "as plain text, without a template", TEXT: "as is"}
    part = ", with the loss on the answers" if inputs.record.loss_on == ANSWERS else ""
    return f"{format_.name}, read {how[str(inputs.record.rendering)]}{part}."


def learned_in(trainer: Trainer) -> FittedRanks | None:
    """Fitted ranks of a run; None if it learns none, or did not begin."""
    callbacks = trainer.callback_handler.callbacks
    return next((each.learned for each in callbacks if isinstance(each, FittedRanksCallback)), None)


def ranks_line(learned: Mapping[str, int], parameters: int) -> str:
    """Size and ranks of an adapter whose ranks were learned."""
    ranks = sorted(rank for rank in learned.values() if rank)
    shown = f"{ranks[0]}" if ranks[0] == ranks[-1] else f"{ranks[0]} to {ranks[-1]}"
    return f"Ranks: {parameters:,} parameters in {len(ranks)} modules, r = {shown}."


def seconds_per_batch(trainer: Trainer) -> float:
    """Time of a forward and backward pass: the median of three, after one warm-up batch; of one if it is slow."""
    model: Any = trainer.model
    model.train()
    times = []
    for batch in islice(trainer.get_train_dataloader(), 4):
        start = time.perf_counter()
        with trainer.compute_loss_context_manager():
            loss: Any = trainer.compute_loss(model, batch)
        loss.backward()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
        if times[0] > _SLOW:
            break
    return median(times[1:] or times)
