"""Preparation of a run: settings, model and Trainer, checked and announced before the files of the run are written."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from peft import PeftModel, get_peft_model
from transformers import Trainer, TrainerCallback, set_seed

from ..files import ADAPTER_EXPECTED, readable
from ..learned.callback import LearnedRanksCallback
from ..learned.learned_ranks import FEWEST_STEPS
from ..learned.size import Size
from .compress import FEWEST
from .inputs import Inputs
from .methods import adapter_config
from .models import give_head_its_rate, load_model, make_trainer, training_arguments
from .plan import describe_encoded, plan
from .progress import Announce
from .settings import TrainConfig
from .sharding import load_in_every_process, prepare_sharding


def prepare(
    config: TrainConfig,
    inputs: Inputs,
    callbacks: list[TrainerCallback],
    announce: Announce,
) -> Trainer:
    """Create and check the Trainer of a run, and announce its plan.

    Args:
        config: the run.
        inputs: its inputs. `record.examples_per_step`, if set, fixes the examples per step of all processes together.
        callbacks: of the Trainer.
        announce: receives the plan and the first example, line by line.

    Raises:
        ValueError: a setting is invalid, or does not fit the data.

    """
    arguments = training_arguments(
        inputs.kind,
        config.arguments,
        config.output,
        rows=inputs.rows,
        max_length=inputs.record.max_length,
        is_full=config.method == "full",
        examples_per_step=inputs.record.examples_per_step,
    )
    count = len(inputs.data.splits["validation"])
    if config.filled_by and inputs.kind.has_head and count < FEWEST:
        raise ValueError(
            f"{count} validation examples are too few to measure the loss of lora/; at least {FEWEST} are needed. "
            "Raise --validation-share, or remove --keep and --size."
        )
    if (rank := _rank_of_short(config, arguments.max_steps)) is not None:
        announce(f"Ranks: {arguments.max_steps} steps are too few to learn them, so r = {rank} in all modules.")
        fields = {name: value for name, value in config.adapter.items() if name != "r"}
        config = replace(config, size=None, rank=rank, adapter=fields)
        callbacks = [each for each in callbacks if not isinstance(each, LearnedRanksCallback)]
    model = _adapted_model(config, inputs, arguments.max_steps)
    for line in plan(config, inputs, model, arguments):
        announce(line)
    trainer = make_trainer(inputs.kind, model, inputs.processor, arguments, *inputs.encoded(), callbacks)
    for line in describe_encoded(config.chat_template, trainer, inputs):
        announce(line)
    prepare_sharding(trainer)
    if config.head_learning_rate is not None:
        give_head_its_rate(trainer, config.head_learning_rate)
    return trainer


def _rank_of_short(config: TrainConfig, steps: int) -> int | None:
    """Rank of a LoRA of the size, if there are too few steps to learn ranks; None otherwise."""
    if config.learned_size is None or steps >= FEWEST_STEPS or config.start_from is not None:
        return None
    size = Size.parse(config.learned_size)
    return int(size.number) if size.unit == "ranks" else None


def _adapted_model(config: TrainConfig, inputs: Inputs, steps: int) -> Any:
    """Model to train, with its adapter, if any."""
    options = config.adapter_fields
    if config.learned_size is not None:
        options = {"r": Size.parse(config.learned_size).wide_rank} | options
    adapter: Any = adapter_config(config.method, inputs.kind.adapter_fields, steps, options)
    if adapter is None or inputs.kind.has_head:
        load_in_every_process()
    set_seed(config.seed)
    is_full = adapter is None
    name, source = (config.start_from,) * 2 if config.start_from and is_full else (config.model, inputs.source)
    model, new = load_model(name, source, inputs.kind, inputs.data.labels, inputs.processor, in_float32=is_full)
    if adapter is None:
        return model
    is_tied = inputs.kind.generates and model.config.get_text_config().tie_word_embeddings
    if is_tied and getattr(adapter, "trainable_token_indices", None):
        raise ValueError(
            f"adapter: trainable_token_indices is not supported for {config.model}, whose embeddings are tied to its "
            "output layer: TRL cannot take the loss of PEFT's wrapper around it. Remove it."
        )
    # Save randomly initialized modules with the adapter, or a reloaded model would have different ones.
    adapter.modules_to_save = list(dict.fromkeys([*(adapter.modules_to_save or []), *new])) or None
    if config.start_from is not None:
        with readable(config.start_from, ADAPTER_EXPECTED):
            return PeftModel.from_pretrained(model, config.start_from, is_trainable=True)
    return get_peft_model(model, adapter)
