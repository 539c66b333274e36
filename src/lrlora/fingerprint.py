"""Fingerprints of a run's inputs, to detect changes."""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .files import read_json

_START, _PIECES, _PIECE = 2**20, 2048, 4096
_OF_THE_FILE = ("_name_or_path", "transformers_version")  # fields set when saving, not part of the model


def digest(content: Any) -> str:
    """Hash of plain values, independent of key order."""
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()


def of_model(source: str) -> dict[str, str]:
    """Hashes of a model's weights and configuration, by display name; empty if not on this machine.

    Of each weights file, hashes the size, the first MiB (with safetensors' header) and 2,048 evenly spaced pieces of 4
    KiB: everything up to 9 MiB, and equally little of 1 and of 15 GB. Detects another model, further training and
    merges, but not a few numbers changed between two pieces, which are 2.4 MB apart in a 5 GB file.
    """
    folder = Path(source) if Path(source).is_dir() else _in_cache(source)
    if folder is None:
        return {}
    found = {}
    if files := _weights(folder):
        found["the weights of the base model"] = digest([_sample(file) for file in files])
    if (folder / "config.json").is_file():
        content = read_json(folder / "config.json", dict[str, Any], "Download the model again.")
        kept = {name: value for name, value in content.items() if name not in _OF_THE_FILE}
        found["the configuration of the base model"] = digest(kept)
    return found


def of_adapter(folder: Path) -> str:
    """Hash of a saved adapter, with its weights sampled as in `of_model`."""
    return digest([_sample(file) for file in sorted(folder.glob("adapter_*")) if file.is_file()])


def warn_of_another_model(source: str, known: Mapping[str, str] | None) -> None:
    """Warn if a base model's hashes differ from the known ones of its run."""
    if changed := differing(known or {}, of_model(source)):
        warnings.warn(
            f"The base model {source} differs from the one used in training: {' and '.join(changed)} changed. The "
            "adapter was trained for the original model.",
            stacklevel=3,
        )


def differing(then: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Names of values that are in both and differ."""
    return [name for name in then if name in now and then[name] != now[name]]


def _in_cache(name: str) -> Path | None:
    from huggingface_hub import snapshot_download  # lazy: slow to import

    try:
        return Path(snapshot_download(name, local_files_only=True))
    except (OSError, ValueError):
        return None


def _weights(folder: Path) -> list[Path]:
    """Files loaded by transformers."""
    for name in ("model.safetensors", "pytorch_model.bin"):
        index = folder / f"{name}.index.json"
        if (folder / name).is_file():
            return [folder / name]
        if index.is_file():
            shards = read_json(index, dict[str, Any], "Download the model again.").get("weight_map", {})
            files = [folder / shard for shard in sorted(set(shards.values()))]
            return files if all(file.is_file() for file in files) else []
    return []


def _sample(path: Path) -> str:
    size = path.stat().st_size
    found = hashlib.sha256(str(size).encode())
    with path.open("rb", buffering=0) as file:
        found.update(file.read(_START))
        for place in range(_START, size, max(_PIECE, (size - _START) // _PIECES)):
            file.seek(place)
            found.update(file.read(_PIECE))
    return found.hexdigest()
