"""Writes the repositories: parquet files in the hub's layout, cards that say where, and models."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from urllib.parse import quote

import pyarrow.parquet as parquet
import yaml
from datasets import ClassLabel, Dataset, DatasetDict, Features, List

from .data import DATA, PLAIN, SCRIPTS
from .models import save_models

_CONVERTED = quote("refs/convert/parquet", safe="")  # the hub makes this branch of every set


def build(root: Path) -> None:
    """Write all repositories; takes seconds."""
    for repository, configurations in DATA.items():
        folder = root / "datasets" / repository
        for name, splits in configurations.items():
            for split, data in splits.items():
                _write(data, folder / _CONVERTED / name / split / "0000.parquet")
                if repository not in SCRIPTS:
                    _write(data, folder / "main" / _folder(name) / f"{split}-00000-of-00001.parquet")
        (folder / "main").mkdir(exist_ok=True)
        (folder / "main" / "README.md").write_text(_card(repository, configurations))
        if repository in SCRIPTS:
            script = folder / "main" / f"{repository.partition('/')[2]}.py"
            script.write_text('raise SystemExit("a script of the hub must not run")\n')
    save_models(root / "models")


def _write(data: Dataset, file: Path) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(data.with_format("arrow")[:], file)


def _folder(configuration: str) -> str:
    return "data" if configuration == "default" else configuration


def _card(repository: str, configurations: dict[str, DatasetDict]) -> str:
    """The set's README.md, whose head tells `datasets` of its configurations."""
    if repository in PLAIN:
        return f"# {repository}\n"
    head: dict[str, Any] = {"dataset_info": [_info(name, splits) for name, splits in configurations.items()]}
    if repository not in SCRIPTS:
        head["configs"] = [_files(repository, name, splits) for name, splits in configurations.items()]
    return f"---\n{yaml.safe_dump(head, sort_keys=False)}---\n# {repository}\n"


def _info(configuration: str, splits: DatasetDict) -> dict[str, Any]:
    features = next(iter(splits.values())).features
    sizes = [
        {"name": split, "num_bytes": data.data.nbytes, "num_examples": len(data)} for split, data in splits.items()
    ]
    size = sum(split["num_bytes"] for split in sizes)
    return {
        "config_name": configuration,
        "features": _features(features),
        "splits": sizes,
        "download_size": size,
        "dataset_size": size,
    }


def _features(features: Features | dict[str, Any]) -> list[dict[str, Any]]:
    """In the form of the cards that are on the hub, which every version of `datasets` reads."""
    written = []
    for name, feature in features.items():
        kind: dict[str, Any]
        if isinstance(feature, ClassLabel):
            kind = {
                "dtype": {"class_label": {"names": {str(index): label for index, label in enumerate(feature.names)}}}
            }
        elif isinstance(feature, List):
            kind = {"sequence": feature.feature.dtype}
        elif isinstance(feature, dict):
            kind = {"sequence": _features({part: each.feature for part, each in feature.items()})}
        else:
            kind = {"dtype": feature.dtype}
        written.append({"name": name, **kind})
    return written


def _files(repository: str, configuration: str, splits: DatasetDict) -> dict[str, Any]:
    files = [{"split": split, "path": f"{_folder(configuration)}/{split}-*"} for split in splits]
    return {"config_name": configuration, "data_files": files}
