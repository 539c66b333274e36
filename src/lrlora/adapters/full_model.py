"""Full checkpoints in safetensors files, read one tensor at a time, and the difference between two."""

from __future__ import annotations

import functools
import math
import os
import re
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import torch
import transformers
from peft import LoraConfig
from safetensors import safe_open
from torch import Tensor, nn
from transformers import AutoConfig, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightRenaming
from transformers.pytorch_utils import Conv1D
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME
from transformers.utils.hub import cached_file

from ..files import read_json, readable
from ..lora.factors import Layout
from ..naming import PEFT_PREFIX, natural_order
from ..sources import is_hub_name
from .update import Update, Updates, common_dtype

# PEFT task type → class of its models.
MODELS = {
    "CAUSAL_LM": "AutoModelForCausalLM",
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "TOKEN_CLS": "AutoModelForTokenClassification",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
}
_EXPECTED = "Expected a model as written by save_pretrained: model.safetensors, or shards with their index."
HEADS = {"SEQ_CLS": ("classifier", "score"), "TOKEN_CLS": ("classifier", "score"), "QUESTION_ANS": ("qa_outputs",)}
_KOHYA = re.compile(r"lora_(unet|te\d?|transformer)_")
_EMBEDDING = re.compile(r"(^|\.)(embed\w*|wte|wpe|shared|\w*embeddings?)(\.|$)", re.IGNORECASE)
_WITH_MATRIX = (nn.Linear, Conv1D, nn.Conv1d, nn.Conv2d, nn.Conv3d)


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

    @functools.cached_property
    def layers(self) -> dict[str, nn.Module]:
        """Modules of the model on the meta device, by path; empty if it is unknown."""
        return {} if self.on_meta is None else dict(self.on_meta.named_modules())

    @property
    def task_type(self) -> str | None:
        """PEFT task type; None if the configuration does not determine it."""
        architecture = type(self.on_meta).__name__
        if self.on_meta is not None and self.on_meta.config.is_encoder_decoder:
            return "SEQ_2_SEQ_LM" if architecture.endswith("ForConditionalGeneration") else None
        tasks = (task for task, name in MODELS.items() if architecture.endswith(name.removeprefix("AutoModel")))
        return next(tasks, None)

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


class FineTuned(NamedTuple):
    """Two checkpoints, and what a LoRA between them cannot hold.

    Attributes:
        base: the original checkpoint.
        tuned: the fine-tuned checkpoint.
        whole: module → its tensors, for task heads and modules that the base lacks; an adapter saves these in full.
        linear: names of the weights with an update.

    """

    base: Checkpoint
    tuned: Checkpoint
    whole: dict[str, list[str]]
    linear: list[str]
    parameters: None = None

    @property
    def name(self) -> str:
        return self.tuned.name

    @property
    def config(self) -> LoraConfig:
        """Configuration of an adapter for both."""
        whole = list(self.whole) or None
        return LoraConfig(base_model_name_or_path=self.base.name, task_type=self.tuned.task_type, modules_to_save=whole)

    @property
    def stored_dtype(self) -> torch.dtype:
        return common_dtype(map(self.tuned.read, self.linear))

    def other_weights(self, *, with_magnitudes: bool) -> dict[str, Tensor]:
        return {f"{PEFT_PREFIX}{key}": self.tuned.read(key) for keys in self.whole.values() for key in keys}


def updates_between(base: Checkpoint, tuned: Checkpoint) -> Updates:
    """Changes made by full fine-tuning: ΔW = W − W0 of every linear layer and convolution, computed lazily.

    Task heads, and modules that the base lacks or has in another shape, are kept in full. Other changes (embeddings,
    norms, biases) are omitted with a note.

    Raises:
        ValueError: no weight of the two has the same name and shape.

    """
    heads = HEADS.get(tuned.task_type or "", ())
    updates, linear, changed_keys = [], [], []
    whole: dict[str, list[str]] = {}
    for key in sorted(tuned.names, key=natural_order):
        module, _, name = key.rpartition(".")
        root = key.partition(".")[0]
        counterpart = base.name_of(key)
        if root in heads:
            whole.setdefault(root, []).append(key)
        elif counterpart is None or base.shape(counterpart) != tuned.shape(key):
            whole.setdefault(module, []).append(key)
        elif name == "weight" and _has_matrix(tuned, module, len(tuned.shape(key))):
            updates.append(_difference(base, counterpart, tuned, module))
            linear.append(key)
        elif not torch.equal(base.read(counterpart), tuned.read(key)):
            changed_keys.append(key)
    if not updates:
        raise ValueError(
            f"{tuned.name} and {base.name} have no linear layer with the same name and shape. Check that they are the "
            "same model."
        )
    notes = []
    if whole:
        notes.append(
            f"Saved in full, as a task head or because the base model does not have it: {_abbreviate(list(whole))}."
        )
    if changed_keys:
        notes.append(f"Also changed, but not linear layers or convolutions, so left out: {_abbreviate(changed_keys)}.")
    return Updates(tuned.name, "full fine-tuning", updates, FineTuned(base, tuned, whole, linear), tuple(notes))


def _abbreviate(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _has_matrix(checkpoint: Checkpoint, module: str, dimensions: int) -> bool:
    """Whether a module is linear or a convolution: in the model, or if that is unknown, by its name."""
    if checkpoint.layers:
        return isinstance(checkpoint.layers.get(module), _WITH_MATRIX)
    return dimensions in (2, 4) and not _EMBEDDING.search(module)


def _difference(base: Checkpoint, counterpart: str, tuned: Checkpoint, module: str) -> Update:
    is_transposed = isinstance(tuned.layers.get(module), Conv1D)
    m, *inputs = tuned.shape(f"{module}.weight")
    n = math.prod(inputs)

    def as_matrix(weight: Tensor) -> Tensor:
        return weight.T if is_transposed else weight.flatten(1)

    def compute() -> Tensor:
        # Subtract in float64: the difference of two close float16 numbers may not be representable.
        return as_matrix(tuned.read(f"{module}.weight").double() - base.read(counterpart).double())

    return Update(
        module=module,
        shape=(n, m) if is_transposed else (m, n),
        compute=compute,
        is_product=False,
        r=None,
        limit=min(m, n),
        layout=Layout(tuple(inputs[1:])),
        weight=lambda: as_matrix(base.read(counterpart)),
    )
