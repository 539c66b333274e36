"""A user's data: loaded from wherever it is, and checked before anything long starts."""

from __future__ import annotations

import errno
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from datasets import Dataset, DatasetDict, load_dataset, load_from_disk

from ..checks import require_known
from .commonsense import COMMONSENSE, load_commonsense
from .config import FROM_TRAIN, TrainConfig
from .embedded import EMBEDDED_DATA
from .kinds import KINDS, Kind, with_class_ids
from .names import ANSWER_ROLES, BUILDERS, EMBEDDED, require_data_path
from .rows import is_known, require_rows
from .tasks import split_by_group

COMMONSENSE_PREFIX = "commonsense"


@dataclass(frozen=True)
class TaskData:
    """Checked examples under the names of their roles.

    Attributes:
        splits: `train` and `validation`; classes as integers.
        labels: names of the classes, in the order of the integers; empty unless the task is "classify".

    """

    splits: DatasetDict
    labels: list[str]


def load_splits(name: str) -> DatasetDict:
    """The splits that `name` has; a single file is `train`.

    Raises:
        FileNotFoundError: there is no such file or folder.
        ValueError: the embedded data is unknown, or the file cannot be read.

    """
    if name.startswith(EMBEDDED):
        require_known("embedded data", name.removeprefix(EMBEDDED), EMBEDDED_DATA)
        return EMBEDDED_DATA[name.removeprefix(EMBEDDED)].load()
    path = Path(name)
    try:
        if path.is_file():
            builder = BUILDERS.get(path.suffix)
            if builder is None:
                raise ValueError(f"it ends in none of {', '.join(BUILDERS)}")
            # Words such as "None" are texts and labels like others; only nothing is missing.
            options: dict[str, Any] = {"keep_default_na": False, "na_values": [""]} if builder == "csv" else {}
            options |= {"sep": "\t"} if path.suffix == ".tsv" else {}
            return load_dataset(builder, data_files={"train": str(path)}, **options)
        if (path / "dataset_dict.json").exists() or (path / "state.json").exists():
            loaded = load_from_disk(str(path))
            return loaded if isinstance(loaded, DatasetDict) else DatasetDict(train=loaded)
        if path.is_dir():
            return load_dataset(str(path))
    except (FileNotFoundError, MemoryError):
        raise
    except Exception as error:
        cause = error.__cause__ or error
        if getattr(cause, "errno", None) == errno.ENOSPC or isinstance(cause, MemoryError):
            raise cause from None  # no fault of the data
        reason = str(cause).strip().splitlines() or [type(error).__name__]
        raise ValueError(f"The data {name} cannot be read: {reason[0]}") from None
    require_data_path(name)
    repository, _, configuration = name.partition(":")
    if repository == COMMONSENSE_PREFIX:
        require_known("commonsense set", configuration, COMMONSENSE)
    try:
        if repository == COMMONSENSE_PREFIX:
            return load_commonsense(configuration)
        return load_dataset(repository, configuration or None)
    except Exception as error:
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise FileNotFoundError(
            f"{name} is no file or folder here, and could not be had from the hub: {reason[0]}"
        ) from None


def only_split(splits: DatasetDict, preferred: tuple[str, ...], who: str, remedy: str) -> str:
    """The name of the first of the `preferred` splits, or of the only one there is.

    Raises:
        ValueError: there are several, and none is preferred.

    """
    for name in preferred:
        if name in splits:
            return name
    if len(splits) > 1:
        raise ValueError(f"{who} the splits {', '.join(splits)}, none of them {' or '.join(preferred)}: use {remedy}.")
    return next(iter(splits))


def load_task_data(config: TrainConfig) -> TaskData:
    """The examples of a run, checked, with a validation split.

    Raises:
        FileNotFoundError: data is missing.
        ValueError: data is empty, lacks a column, or holds what the task cannot be trained on; the message says where.

    """
    kind, splits = KINDS[config.task], DatasetDict(load_splits(config.data))
    if "train" not in splits:
        raise ValueError(f"{config.data} has no split `train`; it has {', '.join(splits)}.")
    if config.validation == FROM_TRAIN:
        splits.pop("validation", None)
    elif config.validation is not None:
        other = load_splits(config.validation)
        splits["validation"] = other[
            only_split(other, ("validation",), f"{config.validation} has", "a file of its own")
        ]
    splits = DatasetDict(
        {name: select_roles(splits[name], kind, config.columns) for name in ("train", "validation") if name in splits}
    )
    for name, part in splits.items():
        check_examples(part, kind, name)
    labels = kind.class_names(splits["train"])
    if labels:
        splits = DatasetDict({name: with_class_ids(part, labels, name) for name, part in splits.items()})
    if "validation" not in splits:
        splits["train"], splits["validation"] = _split(splits["train"], config.validation_share)
    limits = {"train": config.train_examples, "validation": config.validation_examples}
    return TaskData(DatasetDict({name: sampled(part, limits[name]) for name, part in splits.items()}), labels)


def sampled(data: Dataset, limit: int | None) -> Dataset:
    """So many of the examples at most, drawn at random, always the same ones."""
    return data if limit is None or limit >= len(data) else data.shuffle(seed=0).select(range(limit))


def select_roles(data: Dataset, kind: Kind, columns: dict[str, str], *, with_label: bool = True) -> Dataset:
    """The columns that a task reads, named by their roles.

    Raises:
        ValueError: a column is missing; the message names those there are.

    """
    there = data.column_names
    for role, name in columns.items():
        if name not in there and (with_label or role not in ANSWER_ROLES):
            raise ValueError(f"columns: {role} is to be read from {name!r}, and the data has {', '.join(there)}.")
    wanted = kind.columns(columns, there, with_label=with_label)
    for role, name in wanted.items():
        if name not in there:
            raise ValueError(
                f"The task {kind.name} reads the column {role!r}, and the data has {', '.join(there)}. Name it: "
                f"--column {role}=NAME"
            )
    optional = {role: columns.get(role, role) for role in kind.optional_roles}
    wanted |= {role: name for role, name in optional.items() if name in there}
    return data.select_columns(list(dict.fromkeys(wanted.values()))).rename_columns(
        {name: role for role, name in wanted.items() if name != role}
    )


def check_examples(data: Dataset, kind: Kind, split: str, *, with_label: bool = True) -> None:
    """Raise a ValueError that says what is wrong, and in which rows, unless the task can use every example."""
    if len(data) == 0:
        raise ValueError(f"The split {split} of the data is empty.")
    kind.check(data, split, with_label=with_label)


def choose_max_length(counts: list[int], limit: int) -> int:
    """What holds 99 % of the examples, rounded up to a multiple of 8, within the model's limit."""
    return min(limit, 8 * math.ceil(np.quantile(counts, 0.99) / 8))


def _split(train: Dataset, share: float) -> tuple[Dataset, Dataset]:
    """Training and validation, always the same, without a common group."""
    groups = train["group"] if "group" in train.column_names else range(len(train))
    require_rows(map(is_known, groups), "group must not be missing in the split train")
    frame = pd.DataFrame({"group": list(map(str, groups)), "row": range(len(train))})
    try:
        first, second = split_by_group(frame, share)
    except ValueError:
        raise ValueError(
            f"{len(train)} examples in {frame['group'].nunique()} groups are too few to keep {share:.0%} of them for "
            "validation. Give more, or --validation."
        ) from None
    return train.select(first["row"]), train.select(second["row"])
