"""Full checkpoints in safetensors files, read one tensor at a time, and the difference between two."""

from __future__ import annotations

import functools
import math
import os
import re
from collections.abc import Callable
from dataclasses import replace
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

from ..files import is_hub_name, read_json, readable
from ..naming import PEFT_PREFIX, natural_order
from .card import MODELS
from .update import Layout, Update, Updates, common_dtype

_EXPECTED = "Expected a model as written by save_pretrained: model.safetensors, or shards with their index."
_HEADS = {"SEQ_CLS": ("classifier", "score"), "TOKEN_CLS": ("classifier", "score"), "QUESTION_ANS": ("qa_outputs",)}
_KOHYA = re.compile(r"lora_(unet|te\d?|transformer)_")
_EMBEDDING = re.compile(r"(^|\.)(embed\w*|wte|wpe|shared|\w*embeddings?)(\.|$)", re.IGNORECASE)


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
            file_of = {key: file for file, keys in self._files().items() for key in keys}
        self._place_of = {self._renamed(key): (file, key) for key, file in file_of.items()}

    def _files(self) -> dict[str, list[str]]:
        path = Path(self.name)
        if path.is_file():
            return {self.name: _keys(self.name)}
        is_name = is_hub_name(self.name) and not self.name.endswith(".safetensors")
        if not path.is_dir() and not is_name:
            raise ValueError(f"There is no model at {self.name}. {_EXPECTED}")
        index = self._find(SAFE_WEIGHTS_INDEX_NAME)
        if index is not None:
            shards = sorted(set(read_json(Path(index), dict[str, Any], _EXPECTED)["weight_map"].values()))
            return {file: _keys(file) for file in (self._find(shard) or self._missing(shard) for shard in shards)}
        file = self._find(SAFE_WEIGHTS_NAME)
        if file is None:
            self._missing(SAFE_WEIGHTS_NAME)
        return {file: _keys(file)}

    def _find(self, file: str) -> str | None:
        """Path of one of the model's files, or None."""
        return cached_file(self.name, file, _raise_exceptions_for_missing_entries=False)

    def _missing(self, file: str) -> NoReturn:
        raise ValueError(f"{self.name} contains no full model: {file} is missing. {_EXPECTED}")

    def _renamed(self, key: str) -> str:
        """Name of a stored tensor in the model, which newer transformers versions may have renamed."""
        for renaming in self._renamings:
            key, _ = renaming.rename_source_key(key)
        return key

    @functools.cached_property
    def _renamings(self) -> list[Any]:
        if not isinstance(self.on_meta, PreTrainedModel):
            return []
        return [each for each in get_model_conversion_mapping(self.on_meta) if isinstance(each, WeightRenaming)]

    @functools.cached_property
    def on_meta(self) -> nn.Module | None:
        """Model on the meta device; None without a configuration, or if the model class is unknown."""
        try:
            config = AutoConfig.from_pretrained(self.name, trust_remote_code=False)
            with torch.device("meta"):
                return getattr(transformers, config.architectures[0])._from_config(config)
        except Exception:  # model code can raise anything on an unexpected configuration
            return None

    @property
    def task_type(self) -> str | None:
        """PEFT task type; None if the configuration does not determine it."""
        architecture = type(self.on_meta).__name__
        if getattr(getattr(self.on_meta, "config", None), "is_encoder_decoder", False):
            return "SEQ_2_SEQ_LM" if architecture.endswith("ForConditionalGeneration") else None
        known = (task for task, name in MODELS.items() if architecture.endswith(name.removeprefix("AutoModel")))
        return next(known, None)

    def __contains__(self, key: str) -> bool:
        return key in self._place_of

    @property
    def names(self) -> list[str]:
        """Names of all tensors in the model."""
        return list(self._place_of)

    def shape(self, key: str) -> tuple[int, ...]:
        """Shape of a tensor, without reading it."""
        path, stored = self._place_of[key]
        with safe_open(path, framework="pt") as file:
            return tuple(file.get_slice(stored).get_shape())

    def read(self, key: str) -> Tensor:
        """Memory-map a tensor from its file."""
        path, stored = self._place_of[key]
        with readable(path, _EXPECTED), safe_open(path, framework="pt") as file:
            return file.get_tensor(stored)

    def first_row(self, key: str) -> Tensor:
        """First row of a tensor, (1, ...), without reading the others."""
        path, stored = self._place_of[key]
        with safe_open(path, framework="pt") as file:
            return file.get_slice(stored)[:1]

    def weight_of(self, module: str) -> str | None:
        """Name of a module's weight; None if missing or ambiguous.

        Models with and without a head name their modules differently: a prefix may be missing or extra. Names in
        kohya's format use underscores instead of dots.
        """
        if "." not in module and (kohya := _KOHYA.match(module)):
            ending = module.removeprefix(kohya[0])
            found = [key for key in self._place_of if key.removesuffix(".weight").replace(".", "_").endswith(ending)]
            return found[0] if len(found) == 1 else None
        return self.name_of(f"{module}.weight")

    def name_of(self, key: str) -> str | None:
        """Name of another model's tensor `key` in this one, whose head may differ; None if ambiguous."""
        while True:
            if key in self:
                return key
            found = [name for name in self._place_of if name.endswith(f".{key}")]
            if found:
                return found[0] if len(found) == 1 else None
            first, _, key = key.partition(".")
            # A number is a layer index: the rest of the name occurs in every layer.
            if first.isdigit() or "." not in key:
                return None


def _keys(file: str) -> list[str]:
    with safe_open(file, framework="pt") as opened:
        return list(opened.keys())


def with_weight(update: Update, base: Checkpoint) -> Update:
    """Add the base weight to an update, and with it the kernel size of a convolution.

    Raises:
        ValueError: the weight has another shape.

    """
    key = base.weight_of(update.module)
    if key is None:
        return update  # a task head, which a base model lacks
    shape = base.shape(key)
    if math.prod(shape) != math.prod(update.shape) or shape[0] not in update.shape:
        raise ValueError(
            f"The base model {base.name} does not fit the adapter: {update.module} has shape {shape} in the base "
            f"model, but {update.shape} in the adapter."
        )

    def weight() -> Tensor:
        matrix = base.read(key).flatten(1)
        return matrix if matrix.shape == update.shape else matrix.T

    layout = Layout(shape[2:]) if len(shape) > 2 else update.layout
    return replace(update, weight=weight, layout=layout)


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
        return common_dtype(map(self.tuned.first_row, self.linear))

    def other_weights(self, *, with_magnitudes: bool) -> dict[str, Tensor]:
        keys = [key for keys in self.whole.values() for key in keys]
        return {f"{PEFT_PREFIX}{key}": self.tuned.read(key) for key in keys}


def updates_between(base: Checkpoint, tuned: Checkpoint) -> Updates:
    """Changes made by full fine-tuning: ΔW = W − W0 of every linear layer and convolution, computed lazily.

    Task heads, and modules that the base lacks or has in another shape, are kept in full. Other changes (embeddings,
    norms, biases) are omitted with a note.

    Raises:
        ValueError: no weight of the two has the same name and shape.

    """
    is_linear = _linear_modules(tuned)
    heads = _HEADS.get(tuned.task_type or "", ())
    updates, linear, others = [], [], []
    whole: dict[str, list[str]] = {}
    for key in sorted(tuned.names, key=natural_order):
        module, _, name = key.rpartition(".")
        top = key.partition(".")[0]
        counterpart = base.name_of(key)
        if top in heads:
            whole.setdefault(top, []).append(key)
        elif counterpart is None or base.shape(counterpart) != tuned.shape(key):
            whole.setdefault(module, []).append(key)
        elif name == "weight" and (kind := is_linear(module, tuned.shape(key))):
            updates.append(_difference(base, counterpart, tuned, key, is_conv1d=kind == "Conv1D"))
            linear.append(key)
        elif not torch.equal(base.read(counterpart), tuned.read(key)):
            others.append(key)
    if not updates:
        raise ValueError(
            f"{tuned.name} and {base.name} have no linear layer with the same name and shape. Check that they are the "
            "same model."
        )
    notes = []
    if whole:
        notes.append(f"Saved in full, as a task head or because the base model does not have it: {_some(list(whole))}.")
    if others:
        notes.append(f"Also changed, but not linear layers or convolutions, so left out: {_some(others)}.")
    return Updates(tuned.name, "full fine-tuning", updates, FineTuned(base, tuned, whole, linear), tuple(notes))


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _difference(base: Checkpoint, counterpart: str, tuned: Checkpoint, key: str, *, is_conv1d: bool) -> Update:
    m, *inputs = tuned.shape(key)
    n = math.prod(inputs)

    def as_matrix(weight: Tensor) -> Tensor:
        return weight.T if is_conv1d else weight.flatten(1)

    def form() -> Tensor:
        # Subtract in float64: the difference of two close float16 numbers may not be representable.
        return as_matrix(tuned.read(key).double() - base.read(counterpart).double())

    return Update(
        module=key.removesuffix(".weight"),
        shape=(n, m) if is_conv1d else (m, n),
        form=form,
        is_product=False,
        r=None,
        limit=min(m, n),
        layout=Layout(tuple(inputs[1:])),
        weight=lambda: as_matrix(base.read(counterpart)),
    )


def _linear_modules(checkpoint: Checkpoint) -> Callable[[str, tuple[int, ...]], str]:
    """Function that returns a module's class, "" unless linear or convolution: from the model, else by name."""
    model = checkpoint.on_meta
    if model is None:
        return lambda module, shape: "Linear" if len(shape) in (2, 4) and not _EMBEDDING.search(module) else ""
    kinds = (nn.Linear, Conv1D, nn.Conv1d, nn.Conv2d, nn.Conv3d)
    known = {path: type(module).__name__ for path, module in model.named_modules() if isinstance(module, kinds)}
    return lambda module, shape: known.get(module, "")
