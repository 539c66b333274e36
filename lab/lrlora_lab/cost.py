"""Time and memory of a comparison on a GPU, estimated before it runs; never measured.

A step of LoRA takes 4 FLOPs for each weight and token, forward and for the gradients of activations, and 6 with
gradient checkpointing, which repeats the forward. Memory holds the weights, 16 bytes for each parameter of the widest
adapter, three copies of the logits in float32, and activations: with checkpointing, the inputs of all layers and the
activations of one. The adapter counts as one on all linear layers.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from lrlora.train.models import model_source
from lrlora.train.tasks.causal_lm import CausalLm

from .inputs import located
from .jobs import Comparison
from .methods import find_method

CARD, PEAK, SHARE = "H100", 989e12, 0.3  # dense bfloat16 FLOPs per second, and the share of them that training reaches
LINEAR = (nn.Linear, Conv1D)
_IN_LAYER = (16, 4)  # activations of a layer, in hidden sizes and in the largest size of a weight, that of the MLP


def measured_hours(comparison: Comparison, jobs: list[tuple[str, str]]) -> Iterator[str]:
    """One line for each task whose minutes were measured.

    Args:
        comparison: a comparison.
        jobs: (task, method) of each job to run.

    """
    counts = Counter(task for task, _ in jobs)
    for name, task in comparison.chosen_tasks.items():
        if task.minutes and counts[name]:
            hours = counts[name] * task.minutes / 60
            yield f"Estimate for {name}: {hours:.1f} hours on two CPU cores, {task.minutes:g} minutes a job."


def estimates(comparison: Comparison, jobs: list[tuple[str, str]]) -> list[str]:
    """One line for each task of next-token prediction with a `max_length`, if all its methods train a plain LoRA.

    Args:
        comparison: a comparison.
        jobs: (task, method) of each job to run.

    """
    definition, counts = comparison.definition, Counter(task for task, _ in jobs)
    methods = {name: [find_method(method) for method in comparison.methods_of(name)] for name in comparison.task_names}
    sized = {
        name: task
        for name, task in definition.training_tasks.items()
        if counts[name]
        and task.max_length
        and task.task == CausalLm.name
        and all(m.train == "lora" for m in methods[name])
    }
    if not sized:
        return []
    try:
        config = AutoConfig.from_pretrained(model_source(located(definition.model)))
        with init_empty_weights():
            model: Any = AutoModelForCausalLM.from_config(config)
    except (OSError, ValueError):
        return [f"No estimate of hours and memory: the configuration of {definition.model} cannot be read."]
    config, dtype = config.get_text_config(), config.dtype or torch.float32
    weights = sum(parameter.numel() for parameter in model.parameters())
    adapted = [m for m in model.modules() if isinstance(m, LINEAR) and m is not model.get_output_embeddings()]
    shapes = [module.weight.shape for module in adapted]
    widest = max(max(shape) for shape in shapes)
    repeats = bool(definition.training.get("gradient_checkpointing"))
    lines = []
    for name, task in sized.items():
        rank = max(method.adapter(comparison.r)["r"] for method in methods[name])
        tokens = task.batch_size * (task.max_length or 0)
        hours = counts[name] * task.steps * tokens * weights * (6 if repeats else 4) / (PEAK * SHARE) / 3600
        layer = _IN_LAYER[0] * config.hidden_size + _IN_LAYER[1] * widest
        layers = config.num_hidden_layers
        values = tokens * (layers * config.hidden_size + layer if repeats else layers * layer)
        adapter = rank * sum(map(sum, shapes))
        memory = (weights + values) * dtype.itemsize + 16 * adapter + 12 * tokens * config.vocab_size
        lines.append(
            f"Estimate for {name}: {hours:.2g} hours on one {CARD} at {SHARE:.0%} of its bfloat16 speed, "
            f"{memory / 2**30:.2g} GiB of its memory; every example counted as {task.max_length} tokens."
        )
    return lines
