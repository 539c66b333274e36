"""Saved adapters: read and validated without running, or even having, the base model.

PEFT skips weights that do not fit a model and hardly reports it.
"""

from __future__ import annotations

import functools
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from peft import PeftConfig, PeftModel, PeftType, get_peft_model_state_dict
from peft.mapping import PEFT_TYPE_TO_PREFIX_MAPPING
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME, load_peft_weights
from torch import Tensor

from ..checks import require_float32, require_type
from ..files import parse_json, read_json, readable, write_json
from ..run_folder import RUN_FILE, RunRecord, read_record
from ..sources import ADAPTER_EXPECTED, require_adapter
from ..tuner import LrLoraConfig as _  # noqa: F401 (registers the method)
from .update import common_dtype

MODEL_CONFIG = "config.json"  # saved with an adapter: the configuration of its model, with the class names
_WEIGHTS = (SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME)
# Configuration fields used here whose types PEFT does not check.
_FIELDS = {
    "base_model_name_or_path": str | None,
    "task_type": str | None,
    "r": int | None,
    "lora_alpha": float | None,
    "alpha": float | None,
    "use_rslora": bool,
    "use_dora": bool,
    "rank_pattern": dict[str, float | list[Any]] | None,  # AdaLoRA's contains lists
    "alpha_pattern": dict[str, float] | None,
    "target_parameters": list[str] | None,
}


@dataclass(frozen=True)
class SavedAdapter:
    """An adapter in a folder or on the hub: its configuration, and its weights, loaded lazily and once.

    Args:
        name: folder or hub name.
        config: configuration read by PEFT.
        base: base model to use instead of the one named by the configuration.

    """

    name: str
    config: Any
    base: str | None = None

    @property
    def base_model(self) -> str | None:
        return self.base or self.config.base_model_name_or_path

    def on_base(self, base: str | os.PathLike[str] | None) -> SavedAdapter:
        """The same adapter with another base model; unchanged for None."""
        return self if base is None else replace(self, base=os.fspath(base))

    @contextmanager
    def as_peft_reads_it(self) -> Iterator[str]:
        """Name for PEFT's `from_pretrained`: a copy that names the other base model, if there is one."""
        if self.base is None:
            yield self.name
            return
        folder = Path(self.name) if Path(self.name).is_dir() else Path(snapshot_download(self.name))
        with tempfile.TemporaryDirectory() as scratch:
            shutil.copytree(folder, scratch, ignore=_subfolders, dirs_exist_ok=True)
            config = read_json(folder / CONFIG_NAME, dict[str, Any], ADAPTER_EXPECTED)
            write_json(Path(scratch) / CONFIG_NAME, config | {"base_model_name_or_path": self.base})
            yield scratch

    @functools.cached_property
    def record(self) -> RunRecord | None:
        """Record of the run that wrote the adapter, or None."""
        folder = Path(self.name)
        return read_record(folder) if (folder / RUN_FILE).is_file() else None

    @property
    def class_names(self) -> list[str]:
        """Class names of a classifier, in output order; empty if unnamed."""
        path = Path(self.name) / MODEL_CONFIG
        if self.record is not None:
            return self.record.labels
        if not path.is_file():
            return []
        with readable(path, "Remove it to continue without the class names."):
            names = parse_json(path).get("id2label", {})
            return [str(names[key]) for key in sorted(names, key=int)]

    @property
    def stored_dtype(self) -> torch.dtype:
        """Dtype of the factors."""
        return common_dtype(self.method_weights.values())

    @property
    def parameters(self) -> int:
        """Parameters without heads and biases; a shared φ counts once, though the file repeats it per module."""
        weights = self.method_weights
        if getattr(self.config, "sharing", "module") != "module":
            weights = {re.sub(r"^.*\.lrlora_phi\.", "", key): tensor for key, tensor in weights.items()}
        return sum(tensor.numel() for tensor in weights.values())

    def other_weights(self, *, with_magnitudes: bool) -> dict[str, Tensor]:
        replaced = {key for key in self.method_weights if not (with_magnitudes and ".lora_magnitude_vector" in key)}
        return {key: value for key, value in self.weights.items() if key not in replaced}

    @classmethod
    def read(cls, adapter: AdapterSource) -> SavedAdapter:
        """Read an adapter from a folder or the hub; a `SavedAdapter` is returned unchanged.

        Raises:
            ValueError: it is missing, or its configuration is damaged.

        """
        if isinstance(adapter, SavedAdapter):
            return adapter
        name = os.fspath(adapter)
        require_adapter(name)
        with readable(name, ADAPTER_EXPECTED):
            config = PeftConfig.from_pretrained(name)
            _require_sound(vars(config))
            if config.peft_type is None:
                raise ValueError("it names no method")
            return cls(name, config)

    @functools.cached_property
    def weights(self) -> dict[str, Tensor]:
        """Tensors by file key, on the CPU."""
        folder = Path(self.name)
        if folder.is_dir() and not any((folder / name).is_file() for name in _WEIGHTS):
            raise ValueError(f"{self.name} contains no weights: {_WEIGHTS[0]} is missing. {ADAPTER_EXPECTED}")
        with readable(self.name, ADAPTER_EXPECTED):
            return load_peft_weights(self.name, device="cpu")

    @property
    def method_weights(self) -> dict[str, Tensor]:
        """Weights of the method, without trained heads, embeddings and biases."""
        prefix = PEFT_TYPE_TO_PREFIX_MAPPING[self.config.peft_type].removesuffix("lambda_")  # vera_lambda_, and vera_A
        return {key: weight for key, weight in self.weights.items() if f".{prefix}" in key}


def _require_sound(config: Mapping[str, Any]) -> None:
    """Raise ValueError unless a (possibly untrusted) configuration has the expected types and values."""
    where = "in its adapter_config.json"
    for field, kind in _FIELDS.items():
        if field in config:
            require_type(config[field], kind, f"{field} {where}")
    require_float32(config, where)


def _subfolders(folder: str, names: list[str]) -> list[str]:
    return [name for name in names if Path(folder, name).is_dir()]


AdapterSource = str | os.PathLike[str] | SavedAdapter


def require_all_weights(model: PeftModel, saved: SavedAdapter) -> None:
    """Raise ValueError unless a saved adapter's weights exactly match the model created for it.

    Otherwise, missing weights would stay at their initial values, and unexpected ones be ignored.
    """
    config: Any = model.peft_config["default"]
    if config.peft_type == PeftType.ADALORA:
        return  # PEFT stores the remaining ranks only
    expected = set(get_peft_model_state_dict(model, save_embedding_layers=False))
    for mismatch, keys in (
        ("lacks", expected - set(saved.weights)),
        ("does not fit its configuration, which has no", set(saved.method_weights) - expected),
    ):
        if keys:
            raise ValueError(
                f"The adapter {saved.name} {mismatch} {min(keys)} ({len(keys)} such weights). {ADAPTER_EXPECTED}"
            )
