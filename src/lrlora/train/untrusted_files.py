"""Checks that data names nothing elsewhere, which `datasets` would read or fetch."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from datasets import Dataset, Image
from datasets.config import REPOCARD_FILENAME, REPOYAML_FILENAME

from ..files import read_json


def require_local_card(folder: Path) -> None:
    """Raise ValueError if a folder's metadata name data elsewhere, which `datasets` would read or fetch."""
    import yaml
    from huggingface_hub import DatasetCard

    headers: list[tuple[Path, Any]] = []
    card, yaml_card = folder / REPOCARD_FILENAME, folder / REPOYAML_FILENAME
    for file in (card, yaml_card):
        if not file.is_file():
            continue
        text = file.read_text(encoding="utf-8")
        try:
            # As `datasets` reads them: another reader would find less than it does.
            headers.append((file, yaml.safe_load(text) if file == yaml_card else DatasetCard.load(file).data.to_dict()))
        except (yaml.YAMLError, TypeError, ValueError) as error:
            raise ValueError(f"{file} has a header that is not YAML: {' '.join(str(error).split())[:200]}") from None
    for file, values in headers:
        for value in _texts(values.get("configs") if isinstance(values, dict) else None):
            _require_inside(value, f"{file} names data outside of its folder, {value!r:.200}. Remove it.")


def _require_inside(path: str, message: str) -> None:
    if "://" in path or "::" in path or Path(path).is_absolute() or ".." in Path(path).parts or ":\\" in path:
        raise ValueError(message)


def require_own_files(data: Path) -> None:
    """Raise ValueError if a data set from `save_to_disk` names files outside of its folder."""
    for file in data.rglob("state.json"):
        state = read_json(file, dict[str, Any], "Save the data set again.")
        for name in _texts(state.get("_data_files")):
            _require_inside(name, f"{file} names data outside of its folder, {name!r:.200}. Save the data set again.")


def require_own_images(splits: Mapping[Any, Dataset], data: Path) -> None:
    """Raise ValueError if a cell names an image outside of the data's folder."""
    root = (data if data.is_dir() else data.parent).absolute()
    for split in splits.values():
        for name in (name for name, feature in split.features.items() if isinstance(feature, Image)):
            for cell in split.cast_column(name, Image(decode=False)).select_columns([name]):
                path = (cell[name] or {}).get("path")
                if path and cell[name]["bytes"] is None and root not in Path(os.path.abspath(path)).parents:
                    raise ValueError(f"{data} names an image outside of its folder, {path!r:.200}. Store its bytes.")


def _texts(values: Any) -> Iterator[str]:
    """All texts in nested lists and mappings."""
    if isinstance(values, str):
        yield values
    elif isinstance(values, (list, dict)):
        for value in values.values() if isinstance(values, dict) else values:
            yield from _texts(value)
