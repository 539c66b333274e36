"""Checkpoints of base models in safetensors files, read one tensor at a time."""

from __future__ import annotations

import functools
import os
import re
from pathlib import Path
from typing import Any, NoReturn

import torch
import transformers
from safetensors import safe_open
from torch import Tensor
from transformers import AutoConfig, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightRenaming
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME
from transformers.utils.hub import cached_file

from ..files import read_json, readable
from ..sources import is_hub_name

# PEFT task type → class of its models.
MODELS = {
    "CAUSAL_LM": "AutoModelForCausalLM",
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "TOKEN_CLS": "AutoModelForTokenClassification",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
}
_EXPECTED = "Expected a model as written by save_pretrained: model.safetensors, or shards with their index."
_KOHYA = re.compile(r"lora_(unet|te\d?|transformer)_")


class Checkpoint:
    """Lazily read tensors of a full model, by name; nothing is cached.

    Args:
        name: folder, `.safetensors` file, or hub name.

    Raises:
        ValueError: the model is missing or damaged.

    """

    def __init__(self, name: str | os.PathLike[str]) -> None:
        self.name = os.fspath(name)
        with readable(self.name, _EXPECTED):
            self._locations = {
                self._current_name(key): (file, key) for file in self._files() for key in _read_keys(file)
            }

    def _files(self) -> list[str]:
        if Path(self.name).is_file():
            return [self.name]
        if not Path(self.name).is_dir() and (self.name.endswith(".safetensors") or not is_hub_name(self.name)):
            raise ValueError(f"There is no model at {self.name}. {_EXPECTED}")
        index = self._find(SAFE_WEIGHTS_INDEX_NAME)
        if index is None:
            return [self._find(SAFE_WEIGHTS_NAME) or self._raise_missing(SAFE_WEIGHTS_NAME)]
        shards = set(read_json(Path(index), dict[str, Any], _EXPECTED)["weight_map"].values())
        return [self._find(shard) or self._raise_missing(shard) for shard in sorted(shards)]

    def _find(self, file: str) -> str | None:
        """Path of one of the model's files, or None."""
        return cached_file(self.name, file, _raise_exceptions_for_missing_entries=False)

    def _raise_missing(self, file: str) -> NoReturn:
        raise ValueError(f"{self.name} contains no full model: {file} is missing. {_EXPECTED}")

    def _current_name(self, key: str) -> str:
        """Name of a stored tensor in the model, which newer transformers versions may have renamed."""
        return functools.reduce(lambda name, renaming: renaming.rename_source_key(name)[0], self._renamings, key)

    @functools.cached_property
    def _renamings(self) -> list[WeightRenaming]:
        mapping = [] if self.on_meta is None else get_model_conversion_mapping(self.on_meta)
        return [renaming for renaming in mapping if isinstance(renaming, WeightRenaming)]

    @functools.cached_property
    def on_meta(self) -> PreTrainedModel | None:
        """Model on the meta device; None without a configuration, or if the model class is unknown."""
        return model_on_meta(self.name)

    def __contains__(self, key: str) -> bool:
        return key in self._locations

    @property
    def names(self) -> list[str]:
        """Names of all tensors in the model."""
        return list(self._locations)

    def shape(self, key: str) -> tuple[int, ...]:
        """Shape of a tensor, without reading it."""
        path, stored = self._locations[key]
        with safe_open(path, framework="pt") as file:
            return tuple(file.get_slice(stored).get_shape())

    def read(self, key: str) -> Tensor:
        """Memory-map a tensor from its file."""
        path, stored = self._locations[key]
        with readable(path, _EXPECTED), safe_open(path, framework="pt") as file:
            return file.get_tensor(stored)

    def weight_of(self, module: str) -> str | None:
        """Name of a module's weight; None if missing or ambiguous.

        Models with and without a head name their modules differently: a prefix may be missing or extra. Names in
        kohya's format use underscores instead of dots.
        """
        if "." not in module and (kohya := _KOHYA.match(module)):
            ending = module.removeprefix(kohya[0])
            matches = [key for key in self.names if key.removesuffix(".weight").replace(".", "_").endswith(ending)]
            return matches[0] if len(matches) == 1 else None
        return self.name_of(f"{module}.weight")

    def name_of(self, key: str) -> str | None:
        """Name of another model's tensor `key` in this one, whose head may differ; None if ambiguous."""
        while True:
            if key in self:
                return key
            if matches := [name for name in self._locations if name.endswith(f".{key}")]:
                return matches[0] if len(matches) == 1 else None
            first, _, key = key.partition(".")
            # A number is a layer index: the rest of the name occurs in every layer.
            if first.isdigit() or "." not in key:
                return None


def model_on_meta(name: str, loader: str | None = None) -> PreTrainedModel | None:
    """Model on the meta device, from its configuration alone; None without one, or if the model class is unknown.

    Args:
        name: folder or hub name.
        loader: class of transformers that loads it, such as AutoModel; default: the one in its configuration.

    """
    try:
        config = AutoConfig.from_pretrained(name, trust_remote_code=False)
        with torch.device("meta"):
            if loader is None:
                return getattr(transformers, config.architectures[0])._from_config(config)
            return getattr(transformers, loader).from_config(config)
    except Exception:  # model code can raise anything on an unexpected configuration
        return None


def _read_keys(file: str) -> list[str]:
    with safe_open(file, framework="pt") as tensors:
        return list(tensors.keys())
