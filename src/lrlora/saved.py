"""A saved adapter: read without running, or even having, its base model, and checked.

PEFT leaves out of a model what does not fit it, and says little of it.
"""

from __future__ import annotations

import copy
import functools
import os
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftConfig, PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from peft.mapping import PEFT_TYPE_TO_PREFIX_MAPPING
from peft.utils import load_peft_weights
from torch import Tensor, nn
from transformers import AutoModel
from transformers.pytorch_utils import Conv1D

from .files import ADAPTER_EXPECTED, readable, require_adapter
from .naming import PEFT_PREFIX
from .tuner import LrLoraConfig as _  # noqa: F401 (registers the method)

_FACTOR_SUFFIXES = {"LRLORA": "lrlora_A.weight", "LORA": "lora_A.weight"}


@dataclass(frozen=True)
class SavedAdapter:
    """An adapter in a folder or on the hub: its configuration, and its weights when they are asked for, read once.

    Args:
        name: folder or hub name.
        config: as PEFT reads it.

    """

    name: str
    config: Any

    @classmethod
    def read(cls, adapter: AdapterSource) -> SavedAdapter:
        """Read an adapter from a folder or the hub; one that has been read is returned as it is.

        Raises:
            ValueError: there is none, or its configuration is damaged.

        """
        if isinstance(adapter, SavedAdapter):
            return adapter
        name = os.fspath(adapter)
        require_adapter(name)
        with readable(name, ADAPTER_EXPECTED):
            try:
                return cls(name, PeftConfig.from_pretrained(name))
            except ValueError as error:
                raise ValueError(f"{name} does not hold a readable adapter ({error}). {ADAPTER_EXPECTED}") from None

    @functools.cached_property
    def weights(self) -> dict[str, Tensor]:
        """By their names in the file, on the CPU."""
        return load_peft_weights(self.name, device="cpu")


AdapterSource = str | os.PathLike[str] | SavedAdapter


def load_on_skeleton(adapter: AdapterSource, *, with_base_weights: bool = False) -> PeftModel:
    """Load a saved LR-LoRA or LoRA adapter onto a skeleton that has only the adapted linear layers.

    The result can be measured with `rank_report`; it cannot run. The skeleton's weights are zeros that take no
    memory, or the base model's own if asked for and there (a task head is not).

    Args:
        adapter: folder or hub name, or what was read there.
        with_base_weights: load the base model that the adapter names and take its weights.

    Raises:
        ValueError: there is no adapter, its files are damaged, or it is of another method.

    """
    saved = SavedAdapter.read(adapter)
    with readable(saved.name, ADAPTER_EXPECTED):
        return _load_on_skeleton(saved, with_base_weights)


def _load_on_skeleton(saved: SavedAdapter, with_base_weights: bool) -> PeftModel:
    name, config = saved.name, copy.deepcopy(saved.config)
    method = config.peft_type.value
    if method not in _FACTOR_SUFFIXES:
        raise ValueError(f"{name} is an adapter of type {method}; ranks are read from LRLORA and LORA ones.")
    if getattr(config, "target_parameters", None):
        raise ValueError(
            f"{name} adapts parameters of modules ({', '.join(config.target_parameters)}), which cannot be told apart "
            "without the base model. Load the adapter on it and call `rank_report(model)`."
        )
    weights = saved.weights
    suffix = "." + _FACTOR_SUFFIXES[method]
    factors = sorted((key for key in weights if key.endswith(suffix)), key=_natural_order)
    modules = {key.removesuffix(suffix).removeprefix(PEFT_PREFIX): key for key in factors}
    if not modules:
        raise ValueError(f"{name} holds no adapted linear layer.")

    base = AutoModel.from_pretrained(config.base_model_name_or_path) if with_base_weights else nn.Module()
    skeleton = nn.Module()
    skeleton.name_or_path = config.base_model_name_or_path  # PEFT writes it into the configuration
    for path, key in modules.items():
        in_features, out_features = weights[key].shape[1], weights[key.replace("_A.", "_B.")].shape[0]
        linear = nn.Linear(1, 1, bias=False)
        linear.in_features, linear.out_features = in_features, out_features
        weight = _base_weight(base, path)
        weight = torch.zeros(()).expand(out_features, in_features) if weight is None else weight
        linear.weight = nn.Parameter(weight, requires_grad=False)
        _place(skeleton, path, linear)
    # The skeleton has exactly the adapted layers: whatever selected them among others no longer applies.
    config.target_modules = set(modules)
    config.exclude_modules = config.layers_to_transform = config.layers_pattern = config.modules_to_save = None
    config.task_type = None
    config.trainable_token_indices = None
    config.fan_in_fan_out = False
    model = get_peft_model(skeleton, config)
    # Files may also hold weights of the base model: embeddings, heads, biases.
    prefix = PEFT_TYPE_TO_PREFIX_MAPPING[config.peft_type]
    set_peft_model_state_dict(model, {key: weight for key, weight in weights.items() if f".{prefix}" in key})
    require_all_weights(model, saved)
    return model


def _natural_order(key: str) -> list[tuple[int, str]]:
    """Sorts layer.2 before layer.10."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in key.split(".")]


def _base_weight(base: nn.Module, path: str) -> Tensor | None:
    """The weight (m, n) of the adapted module `path` in the base model; None where that lacks it, as a task head."""
    prefix = getattr(base, "base_model_prefix", "")
    module: Any = dict(base.named_modules()).get(path.removeprefix(f"{prefix}."))
    if module is None:
        return None
    return module.weight.data.T if isinstance(module, Conv1D) else module.weight.data.flatten(1)


def _place(root: nn.Module, path: str, module: nn.Module) -> None:
    *parents, name = path.split(".")
    for parent in parents:
        if parent not in root._modules:
            root.add_module(parent, nn.Module())
        root = root.get_submodule(parent)
    root.add_module(name, module)


def require_all_weights(model: PeftModel, saved: SavedAdapter) -> None:
    """Raise a ValueError unless a saved LR-LoRA adapter holds the weights of the model made of it, and no more.

    What is missing would stay as it starts, and what has another name would be left out.
    """
    config: Any = model.peft_config["default"]
    if config.peft_type.value != "LRLORA":
        return  # other methods have had other names for their weights
    wanted = set(get_peft_model_state_dict(model, save_embedding_layers=False))
    there = set(saved.weights)
    for what, keys in (
        ("lacks", wanted - there),
        ("does not fit its configuration, which knows no", {key for key in there - wanted if ".lrlora_" in key}),
    ):
        if keys:
            raise ValueError(
                f"The adapter {saved.name} {what} {min(keys)} ({len(keys)} of such weights). {ADAPTER_EXPECTED}"
            )
