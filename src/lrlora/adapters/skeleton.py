"""Saved adapters on a skeleton: a model of the adapted layers only, or on the meta device, which cannot be run."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, PeftType, get_peft_model, set_peft_model_state_dict
from torch import nn
from transformers import PreTrainedModel

from ..lora.config import variant_option
from ..lora.factors import Layout, Stack
from ..lora.host import tuner_layers
from ..naming import PEFT_PREFIX, natural_order
from .checkpoint import MODELS, model_on_meta
from .layers import stack_of_layer, updates_of_model
from .peft_folder import SavedAdapter, require_all_weights
from .update import Update

# Fields of a configuration that select other modules, which a skeleton has not.
_SELECTION = (
    *("exclude_modules", "layers_to_transform", "layers_pattern", "modules_to_save", "trainable_token_indices"),
    *("task_type", "base_model_name_or_path"),
)


def updates_of_lrlora(saved: SavedAdapter) -> list[Update]:
    """Updates of an LR-LoRA adapter, without the base model: all layers as linear ones, of zeros without memory."""
    layers: dict[str, nn.Module] = {}
    for key in sorted((key for key in saved.weights if key.endswith(".lrlora_A.weight")), key=natural_order):
        m, n = len(saved.weights[key.replace("_A.", "_B.")]), saved.weights[key].shape[1]
        layer = nn.Linear(n, m, bias=False, device="meta")
        layer.weight = nn.Parameter(torch.zeros(()).expand(m, n), requires_grad=False)
        layers[key.removesuffix(".lrlora_A.weight").removeprefix(PEFT_PREFIX)] = layer
    if not layers:
        raise ValueError(f"{saved.name} contains no adapted linear layer.")
    linear = updates_of_model(_on_skeleton(saved, layers))
    # Convolutions and embeddings look like linear layers in its files.
    return [replace(update, layout=Layout(is_known=False)) for update in linear]


def _on_skeleton(saved: SavedAdapter, layers: Mapping[str, nn.Module]) -> PeftModel:
    """Load the adapter onto a model of these layers."""
    skeleton = nn.Module()
    for path, layer in layers.items():
        *parents, name = path.split(".")
        module: Any = skeleton
        for parent in parents:
            module = module._modules.setdefault(parent, nn.Module())
        module.add_module(name, layer)
    config = copy.deepcopy(saved.config)
    vars(config).update({"target_modules": set(layers)} | dict.fromkeys(_SELECTION))
    model = get_peft_model(skeleton, config)
    # Files may also contain base model weights: embeddings, heads, biases.
    set_peft_model_state_dict(model, saved.method_weights)
    require_all_weights(model, saved)
    return model


def stacks_of_adapter(saved: SavedAdapter, base: str | None) -> dict[Stack, tuple[int, int]]:
    """Parameters that a saved LoRA adapts, with the outputs and inputs of a matrix; no weights are loaded.

    Raises:
        ValueError: the adapter is no plain LoRA, no base model is named, or transformers knows none that fits.

    """
    config = saved.config
    adapts = f"{saved.name} adapts parameters ({', '.join(config.target_parameters)})"
    option = variant_option(config)
    if config.peft_type != PeftType.LORA or option is not None:
        kind = config.peft_type.value if option is None else f"LoRA with {option}"
        raise ValueError(f"{adapts} by {kind}, but only those of plain LoRA are read. Merge it into its base model.")
    needed = f"{adapts}. To read them, lrlora needs the configuration of the base model"
    name = saved.base_model if base is None or Path(base).is_file() else base  # a file has no configuration
    if not name:
        raise ValueError(f"{needed}, which the adapter does not name. Pass it (base=, --base).")
    ending = ".lora_A.weight"
    stored = {key.removeprefix(PEFT_PREFIX).removesuffix(ending) for key in saved.weights if key.endswith(ending)}
    nested = {module for module in stored if module.endswith(".base_layer")}
    # The class in which it was loaded is not stored, and others have other paths.
    for loader in dict.fromkeys((MODELS.get(config.task_type), None, "AutoModel")):
        model = model_on_meta(name, loader)
        stacks = {} if model is None else _wrap(model, saved)
        modules = {stack.module for stack in stacks}
        if modules and nested <= modules <= stored:
            return stacks
    raise ValueError(
        f"{needed}, but transformers knows no model of {name} with these parameters. Pass another (base=, --base), or "
        "load the adapter on it and call `rank_report(model)`."
    )


def _wrap(model: PreTrainedModel, saved: SavedAdapter) -> dict[Stack, tuple[int, int]]:
    """Parameters of a model that the adapter's configuration matches; none if it lacks one of them."""
    config = copy.copy(saved.config)
    config.target_modules, config.rank_pattern, config.alpha_pattern = [], {}, {}
    config.task_type = config.base_model_name_or_path = None
    config.modules_to_save = config.trainable_token_indices = None
    try:
        wrapped = get_peft_model(model, config, low_cpu_mem_usage=True)
    except ValueError:  # no parameter matches
        return {}
    layers = [(path, layer) for path, layer in tuner_layers(wrapped) if hasattr(layer, "parameter_name")]
    stacks = {stack_of_layer(path, layer): (layer.out_features, layer.in_features) for path, layer in layers}
    paths = [f".{stack.parameter}" for stack in stacks]
    has_all = all(any(path.endswith(f".{name}") for path in paths) for name in saved.config.target_parameters)
    return stacks if has_all else {}
