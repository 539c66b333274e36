"""Shrink a trained LoRA to the smallest size that keeps a share of its gain, in the units of its own loss."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable
from dataclasses import asdict, replace
from functools import partial
from itertools import chain, count
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from peft import PeftModel
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors.torch import load_file
from tqdm import tqdm

from ..checks import DEFAULT_KEEP
from ..files import write_json
from ..lora.factors import require_finite
from ..lora.host import host_of, saves_adapter, without_wrapper
from ..lora.live import (
    SmallSave,
    lora_factors,
    lora_layers,
    make_small,
    pad_state,
    put,
    require_plain_lora,
    weights_of,
)
from ..sharding import full_value, is_whole, process_index
from ..shrunk import SHRUNK_FILE, Shrunk
from .cut import Cut
from .fitted_ranks import budget_of, learning
from .held_out import LiveLosses, at_rest, held_out_examples, is_trainer_of, require_data, sample
from .live_cut import LiveCut, loss_curve, restored
from .moments import Loss, model_loss
from .optimizers import unwrapped
from .search import PASSES

if TYPE_CHECKING:
    from transformers import Trainer  # imports `datasets`, which an adapter does without

WHOLE_FOLDER = "whole"  # in the Trainer's output folder


def shrink(
    model: Any,
    batches: Iterable[Any] = (),
    held_out: Iterable[Any] = (),
    *,
    keep: float | None = None,
    size: str | None = None,
    loss: Loss = model_loss,
    max_rank: int | None = None,
    on: str = "eval",
) -> Shrunk:
    """Shrink a LoRA after training, to the smallest size found that keeps a share of its gain.

        trainer.train()
        print(lrlora.shrink(trainer, keep=0.99))
        trainer.save_model("small")

    The adapter becomes smaller, not better, and stays a plain LoRA. The whole one is saved before, in the folder
    `whole` (then `whole-2`, …) of the Trainer's output folder. A LoRA that is trained at this size may gain more or
    less. It measures about six times the loss of 150 to 600 held-out examples, as many as cost a tenth of the
    training.

    Call it on every process.

    Args:
        model: Trainer after training, of transformers, TRL or sentence-transformers; or a PEFT model, with `batches`.
        batches: training batches, on the model's device, for the gradients; the same on every process.
        held_out: batches that were not trained on, for the losses; the same on every process.
        keep: share of the gain, in (0, 1); default: 0.99, without a size.
        size: size instead of a share; see `FittedRanks`.
        loss: of batches; see `FittedRanks`.
        max_rank: largest rank of any module.
        on: "eval" for the Trainer's evaluation data, or "train" for its training data, which it may have learned by
            heart.

    Raises:
        ValueError: there are too few held-out examples, or some are training batches; there is no gain; or the adapter
            cannot be cut.

    """
    trainer = model if is_trainer_of("transformers", model) else None
    whole_model = without_wrapper(model if trainer is None else trainer.model)
    host = host_of(whole_model)
    adapter = require_plain_lora(host)
    for pair in lora_factors(host, adapter):
        require_finite(pair.module, pair.A, pair.B)
    keep = DEFAULT_KEEP if keep is None and size is None else keep
    goal = Cut.parse(size, keep, at=1.0, max_rank=max_rank)
    folder: Path | None = None
    optimizer: Any = None
    if trainer is not None:
        if loss is not model_loss or batches or held_out:
            raise ValueError(
                "A Trainer has its own batches and loss. Remove batches, held_out and loss, or pass a model."
            )
        require_data(trainer, on)
        if not saves_adapter(host):
            raise ValueError("shrink of a Trainer needs a model whose adapter it can save: PEFT's or transformers'.")
        optimizer = None if trainer.optimizer is None else unwrapped(trainer.optimizer)[-1]
        if hasattr(optimizer, "eval"):
            optimizer.eval()  # averaged weights, of schedule-free optimizers
    else:
        is_shared = batches is held_out  # perhaps a loader
        batches, held_out = list(batches), list(held_out)
        if not batches:
            raise ValueError("shrink needs training batches, for the gradients. Pass batches.")
        if is_shared or not {*map(id, batches)}.isdisjoint(map(id, held_out)):
            raise ValueError("held_out has training batches (batches). Pass batches that were not trained on.")
    with at_rest(whole_model, trainer):
        losses = (
            LiveLosses.of_batches(whole_model, held_out, loss, batches)
            if trainer is None
            else LiveLosses.of_trainer(trainer, on)
        )
        losses.require_enough()
        if (learned := learning(host)) is not None:
            learned.end()
        budget = None if goal.size is None else budget_of(goal.size, host, adapter)
        with restored(host, adapter, after_errors_alone=True):
            if trainer is not None:
                folder = _save_whole(host, adapter, Path(str(trainer.args.output_dir)))
            _tell_cost(losses, trainer)
            before = {} if trainer is None else _metrics(trainer, on)
            cut = LiveCut(host, adapter, losses, loss_curve(host, adapter, losses))
            factors, record = cut.within(budget, max_rank) if keep is None else cut.smallest(keep, max_rank)
            put(host, adapter, factors)
            if before:
                after = _metrics(trainer, on)
                record = replace(
                    record, metrics={name: [before[name], after[name]] for name in before if name in after}
                )
    _make_small(host, adapter, record, optimizer)
    if folder is not None and process_index() == 0:
        write_json(folder / SHRUNK_FILE, asdict(record))
    return record


def _save_whole(model: Any, adapter: str, output: Path) -> Path:
    """Save the whole adapter in the first folder of whole, whole-2, … that does not exist or has the same."""
    state = None
    if not is_whole(model):
        trained = {name: full_value(p).to(p.dtype) for name, p in model.named_parameters() if p.requires_grad}
        state = {name: value.cpu() for name, value in trained.items()}
    names = chain([WHOLE_FOLDER], (f"{WHOLE_FOLDER}-{number}" for number in count(2)))
    folder = output / WHOLE_FOLDER
    if process_index():
        return folder
    output.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output, suffix=".partial") as scratch:
        new_folder = Path(scratch) / WHOLE_FOLDER
        options = {"selected_adapters": [adapter]} if isinstance(model, PeftModel) else {}
        model.save_pretrained(str(new_folder), state_dict=state, **options)
        if options and adapter != "default":
            new_folder /= adapter
        for folder in (output / name for name in names):
            if not folder.exists():
                new_folder.rename(folder)
                break
            if _is_same(folder, new_folder):  # of a process that was killed
                break
    return folder


def _is_same(folder: Path, other_folder: Path) -> bool:
    """Whether two folders have the same adapter."""
    first, second = (path / SAFETENSORS_WEIGHTS_NAME for path in (folder, other_folder))
    if not (first.exists() and second.exists()):
        return False
    state, other_state = load_file(first), load_file(second)
    return state.keys() == other_state.keys() and all(torch.equal(state[name], other_state[name]) for name in state)


def _tell_cost(losses: LiveLosses, trainer: Trainer | None) -> None:
    passes = PASSES * len(losses.held_out) + 3 * len(losses.training)
    line = f"Shrinking takes about {passes:,} forward passes of a batch"
    if trainer is not None:
        steps = trainer.state.global_step * trainer.args.gradient_accumulation_steps
        line += f"; training took {steps:,} forward and backward passes"
    if process_index() == 0:
        tqdm.write(f"{line}.")


def _metrics(trainer: Any, on: str) -> dict[str, float]:
    """Metrics of the task on the held-out sample; empty without any."""
    if is_trainer_of("sentence_transformers", trainer) and trainer.evaluator is not None:
        return {name: float(value) for name, value in trainer.evaluator(trainer.model).items()}
    if trainer.compute_metrics is None:
        return {}
    data = sample(trainer.train_dataset if on == "train" else trainer.eval_dataset, held_out_examples(trainer))
    metrics = trainer.predict(data, metric_key_prefix="").metrics
    numbers = {name.removeprefix("_"): value for name, value in metrics.items() if isinstance(value, (int, float))}
    excluded = ("loss", "runtime", "samples_per_second", "steps_per_second", "model_preparation_time")
    return {name: float(value) for name, value in numbers.items() if name not in excluded}


def _make_small(model: Any, adapter: str, record: Shrunk, optimizer: Any) -> None:
    """Make the live model as small as what is saved; where it is shared or sharded, what is saved alone."""
    if is_whole(model):
        if optimizer is not None:  # its state is that of other directions
            for weight in weights_of(lora_layers(model, adapter), adapter):
                optimizer.state.pop(weight, None)
        make_small(model, adapter, record.ranks, None)
        return
    save = SmallSave(model, adapter, 0)
    save.ranks = record.ranks
    model.save_pretrained = save
    model.register_load_state_dict_pre_hook(partial(pad_state, adapter))
