"""Short marks of what a run was made from, which tell whether it is still the same."""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .files import read_json

_START, _PIECES, _PIECE = 2**20, 2048, 4096
_OF_THE_FILE = ("_name_or_path", "transformers_version")  # who wrote a configuration, and where: no part of the model


def digest(content: Any) -> str:
    """A hash of plain values, whatever order the keys are in."""
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()


def of_model(source: str) -> dict[str, str]:
    """Hashes of a model's weights and configuration, by what to call them; none of what is not on this machine.

    Of every file of weights the size is looked at, the first MiB, with safetensors' header, and 2,048 pieces of 4 KiB
    at equal distances: all of it up to 9 MiB, and of 15 GB as little as of one. Another model, or the same one trained
    further or merged with something, is noticed; a few numbers that were changed between two pieces, which are 2.4 MB
    apart in a file of 5 GB, are not.
    """
    folder = Path(source) if Path(source).is_dir() else _in_cache(source)
    if folder is None:
        return {}
    found = {}
    if files := _weights(folder):
        found["the weights of the base model"] = digest([_sample(file) for file in files])
    if (folder / "config.json").is_file():
        content = read_json(folder / "config.json", dict[str, Any], "Fetch the model anew.")
        kept = {name: value for name, value in content.items() if name not in _OF_THE_FILE}
        found["the configuration of the base model"] = digest(kept)
    return found


def of_adapter(folder: Path) -> str:
    """A hash of a saved adapter, of whose weights as much is looked at as of a model's."""
    return digest([_sample(file) for file in sorted(folder.glob("adapter_*")) if file.is_file()])


def warn_of_another_model(source: str, known: Mapping[str, str] | None) -> None:
    """Warn if a base model is not the one that a run was trained on, whose hashes are known."""
    if changed := differing(known or {}, of_model(source)):
        warnings.warn(
            f"The base model {source} is not the one that was trained on: {' and '.join(changed)} differ. The adapter "
            "was made for the other.",
            stacklevel=3,
        )


def differing(then: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """The names under which both have something, and not the same."""
    return [name for name in then if name in now and then[name] != now[name]]


def _in_cache(name: str) -> Path | None:
    from huggingface_hub import snapshot_download  # only here: it takes long to import

    try:
        return Path(snapshot_download(name, local_files_only=True))
    except (OSError, ValueError):
        return None


def _weights(folder: Path) -> list[Path]:
    """The files that transformers loads."""
    for name in ("model.safetensors", "pytorch_model.bin"):
        index = folder / f"{name}.index.json"
        if (folder / name).is_file():
            return [folder / name]
        if index.is_file():
            shards = read_json(index, dict[str, Any], "Fetch the model anew.").get("weight_map", {})
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
