"""Loading and validation of user data, before training starts."""

from __future__ import annotations

import csv
import errno
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from datasets import ClassLabel, Dataset, DatasetDict, load_dataset, load_dataset_builder, load_from_disk

from ..checks import require_known
from ..sources import is_hub_name
from .embedded import EMBEDDED, EMBEDDED_DATA, check_spelling, split_by_group
from .row_checks import (
    alike,
    contradictions,
    doubtful,
    is_filled,
    is_known,
    is_number,
    lacking_classes,
    require_rows,
    shown,
)
from .settings import FROM_TRAIN, TrainConfig
from .tasks import TASKS, Task

_FEW_EXAMPLES = 16
_SHOWN_CLASSES = 8
# Strings such as "None" are valid texts and labels; only empty cells are missing. The first column is no index.
_CSV = {"keep_default_na": False, "na_values": [""], "index_col": False}

# File suffix → builder in datasets.
BUILDERS = {".csv": "csv", ".tsv": "csv", ".json": "json", ".jsonl": "json", ".parquet": "parquet"}


@dataclass(frozen=True)
class TaskData:
    """Validated examples with columns named by role.

    Attributes:
        splits: `train` and `validation`; classes as integers.
        labels: class names, in the order of the integers; empty for tasks without classes.
        notes: messages for the user.

    """

    splits: DatasetDict
    labels: list[str]
    notes: list[str]


def dataset_name(data: str) -> str | None:
    """Hub name of data, if it has an owner; None for local and embedded data."""
    name = data.partition(":")[0]
    return name if "/" in name and is_hub_name(name) and not Path(name).exists() else None


def require_data_path(name: str) -> None:
    """Check a data name without using the hub.

    Raises:
        FileNotFoundError: it can only be a path, which does not exist, or it is nearly an embedded name.
        ValueError: the embedded data is unknown.

    """
    path = Path(name)
    if name.startswith(EMBEDDED):
        require_known("embedded data", name.removeprefix(EMBEDDED), EMBEDDED_DATA)
    elif not path.exists():
        is_path = path.suffix in BUILDERS or not is_hub_name(name.partition(":")[0])
        missing = f"There is no file or folder {name} to read data from."
        check_spelling(name, missing, EMBEDDED_DATA, is_path=is_path)


def load_splits(name: str, config: TrainConfig, *, as_written: bool = False) -> DatasetDict:
    """Load all splits of `name`; a single file becomes `train`.

    Args:
        name: see `TrainConfig.data`.
        config: run that says how CSV files are read. Texts and labels of classes are read as text: 007 is not 7.
        as_written: read all cells of CSV files as text.

    Raises:
        FileNotFoundError: no such file or folder.
        ValueError: the embedded data is unknown, or the file cannot be read.

    """
    if name.startswith(EMBEDDED):
        require_data_path(name)
        return EMBEDDED_DATA[name.removeprefix(EMBEDDED)].load()
    path = Path(name)
    if path.is_file() and path.suffix not in BUILDERS:
        raise ValueError(f"The data {name} cannot be read: its suffix must be one of {', '.join(BUILDERS)}.")
    try:
        if (path / "dataset_dict.json").exists() or (path / "state.json").exists():
            saved = load_from_disk(str(path))
            return saved if isinstance(saved, DatasetDict) else DatasetDict(train=saved)
        if path.exists():
            return _load_files(path, config, as_written)
    except (FileNotFoundError, MemoryError):
        raise
    except Exception as error:
        cause = error.__cause__ or error
        if getattr(cause, "errno", None) == errno.ENOSPC or isinstance(cause, MemoryError):
            raise cause from None  # not caused by the data
        said = (str(cause).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
        if isinstance(cause, StopIteration):
            said = "it is empty"
        if isinstance(cause, UnicodeError):
            said += ". It is not UTF-8; pass its encoding, such as --encoding latin-1 or --encoding cp1252"
        raise ValueError(f"The data {name} cannot be read: {said}.") from None
    require_data_path(name)
    repository, _, configuration = name.partition(":")
    try:
        return load_dataset(repository, configuration or None)
    except Exception as error:
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise FileNotFoundError(
            f"{name} is not a local file or folder, and could not be loaded from the hub: {reason[0]}"
        ) from None


def _load_files(path: Path, config: TrainConfig, as_written: bool) -> DatasetDict:
    """A file as `train`, or a folder of files, CSV files as the run reads them."""
    if path.is_file():
        source: dict[str, Any] = {"path": BUILDERS[path.suffix], "data_files": {"train": str(path)}}
    else:
        source = {"path": str(path)}
    builder = load_dataset_builder(**source)
    if builder.name == "csv":
        found: Any = builder.config
        delimiter = config.delimiter or ("\t" if path.is_file() and path.suffix == ".tsv" else found.sep)
        files = [Path(file) for file in chain(*found.data_files.values())]
        encoding = config.encoding or "utf-8-sig"
        headers = [_header(file, delimiter, encoding) for file in files]
        texts = [config.columns.get(role, role) for role in TASKS[config.task].text_roles]
        texts += chain(*headers) if as_written else ()
        converters = dict.fromkeys(texts, _as_text)
        source |= _CSV | {"sep": delimiter, "encoding": config.encoding, "converters": converters}
    return load_dataset(**source)


def _as_text(cell: str) -> str | None:
    """Text of a cell; None if empty. Not a lambda: `datasets` caches a table under the names of its converters."""
    return cell or None


def _header(path: Path, delimiter: str, encoding: str) -> list[str]:
    """Names of the columns.

    Raises:
        ValueError: pandas would silently misread the header.

    """
    csv.field_size_limit(2**31 - 1)  # pandas has no limit
    with path.open(encoding=encoding, newline="") as file:
        rows = csv.reader(file, delimiter=delimiter)
        header = next(rows, [])
        is_empty = not any(rows)
    if is_empty:
        has = f"has a header ({', '.join(header)}) but no rows" if header else "is empty"
        raise ValueError(f"{path.name} {has}")
    if len(header) == 1 and (other := next((c for c in ";\t|," if c != delimiter and c in header[0]), None)):
        raise ValueError(
            f"with the delimiter {delimiter!r}, {path.name} has a single column, {header[0]!r}. Pass the delimiter: "
            f"--delimiter {other!r}"
        )
    if twice := sorted({name for name in header if header.count(name) > 1}):
        raise ValueError(f"several columns of {path.name} are named {', '.join(twice)}. Give each a unique name")
    return header


def only_split(splits: DatasetDict, preferred: tuple[str, ...], who: str, remedy: str) -> str:
    """Name of the first existing `preferred` split, or of the only split.

    Raises:
        ValueError: there are several splits, none of them preferred.

    """
    for name in preferred:
        if name in splits:
            return name
    if len(splits) > 1:
        raise ValueError(f"{who} the splits {', '.join(splits)}, but not {' or '.join(preferred)}. Use {remedy}.")
    return next(iter(splits))


def load_task_data(config: TrainConfig, task: Task) -> TaskData:
    """Load and validate the examples of a run, with a validation split.

    Raises:
        FileNotFoundError: data is missing.
        ValueError: data is empty, lacks a column, or is invalid for the task; the message says where.

    """
    splits = DatasetDict(load_splits(config.data, config))
    if "train" not in splits:
        raise ValueError(f"{config.data} has no split `train`. Available splits: {', '.join(splits)}.")
    if config.validation == FROM_TRAIN:
        splits.pop("validation", None)
    elif config.validation is not None:
        other = load_splits(config.validation, config)
        splits["validation"] = other[only_split(other, ("validation",), f"{config.validation} has", "a separate file")]
    splits = DatasetDict(
        {name: select_roles(splits[name], task, config.columns) for name in ("train", "validation") if name in splits}
    )
    sources = {"train": config.data, "validation": config.validation or config.data}
    where = {name: _name_of(sources[name], name) for name in splits}
    notes = []
    for name, part in splits.items():
        splits[name], note, _ = _checked(part, task, where[name], config.skip_empty)
        notes += note
    notes += _number_notes(splits["train"], task, config.columns)
    if labels := task.class_names(splits["train"]):
        splits = DatasetDict({name: task.with_class_ids(part, labels, where[name]) for name, part in splits.items()})
        if len(labels) == (count := len(splits["train"])):
            notes.append(
                f"Warning: all {count:,} training examples have different labels. Check that the label column is "
                "correct."
            )
        counts = {labels[number]: count for number, count in Counter(splits["train"]["label"]).most_common()}
        listed = [f"{label} {count:,}" for label, count in [*counts.items()][:_SHOWN_CLASSES]]
        listed += ["…"] if len(labels) > _SHOWN_CLASSES else []
        notes = [f"Classes: {', '.join(listed)} ({len(labels)}).", *notes, *alike(labels), *doubtful(counts)]
    if "validation" not in splits:
        splits["train"], splits["validation"] = split_by_groups(
            splits["train"], config.validation_share, "Provide more, or pass --validation."
        )
    limits = {"train": config.train_examples, "validation": config.validation_examples}
    splits = DatasetDict({name: sampled(part, limits[name]) for name, part in splits.items()})
    parts = splits["train"], splits["validation"]
    if labels:
        notes += lacking_classes(labels, splits)
    if columns := [name for name in ("text", "text_pair") if all(name in part.column_names for part in parts)]:
        training, validation = (list(zip(*(part[name] for name in columns), strict=True)) for part in parts)
        if known := sum(map(set(training).__contains__, validation)):
            notes.append(
                f"Warning: {known:,} of {len(splits['validation']):,} validation texts are training texts, too. "
                "Remove repeated rows, or pass other validation data."
            )
        if labels and (count := contradictions(training, splits["train"]["label"])):
            notes.append(
                f"Warning: {count:,} training text{'s have' if count > 1 else ' has'} several labels, which sets a "
                "limit to every score. Keep one label of each."
            )
    if (count := len(splits["train"])) < _FEW_EXAMPLES:
        notes.append(f"Warning: there are only {count} training examples.")
    return TaskData(splits, labels, notes)


def _number_notes(data: Dataset, task: Task, columns: Mapping[str, str]) -> Iterator[str]:
    """Warnings of columns of texts that hold numbers alone, which answers may be."""
    for role in task.text_roles:
        if role in data.column_names and role not in task.answers and all(map(is_number, data[role])):
            yield (
                f"Warning: all {len(data):,} training cells of the column {columns.get(role, role)!r} are numbers, "
                f"read as text. If another column holds the {role}, pass --column {role}=NAME."
            )


def load_examples(
    config: TrainConfig,
    task: Task,
    data: str | Dataset,
    split: str | None,
    labels: list[str],
    *,
    with_label: bool,
    as_written: bool = False,
) -> tuple[Dataset, list[str], Dataset]:
    """The checked examples of a split, read as those of a run, notes on them, and their rows with all columns.

    Args:
        config: the run.
        task: of its task.
        data: as `TrainConfig.data`, or a data set.
        split: None: `test`, else `validation`, else the only one.
        labels: names of the classes.
        with_label: whether the examples must have labels.
        as_written: see `load_splits`.

    Raises:
        FileNotFoundError: data is missing.
        ValueError: the data has no such split, or cannot be used.

    """
    name = data if isinstance(data, str) else "data"
    splits = load_splits(data, config, as_written=as_written) if isinstance(data, str) else DatasetDict(test=data)
    chosen = split or only_split(splits, ("test", "validation"), f"{name} has", "--split")
    require_known(f"split of {name}", chosen, splits)
    examples = select_roles(splits[chosen], task, config.columns, with_label=with_label)
    where = _name_of(name, chosen)
    examples, notes, rows = _checked(examples, task, where, config.skip_empty, with_label=with_label)
    if labels and with_label:
        remedy = "" if len(splits) == 1 else " (--split selects another)"
        examples = task.with_class_ids(examples, labels, where + remedy)
    return examples, notes, splits[chosen].select(rows)


def _name_of(data: str, split: str) -> str:
    """Name of a part of the data in messages."""
    return Path(data).name if Path(data).is_file() else f"the split {split}"


def sampled(data: Dataset, limit: int | None) -> Dataset:
    """At most `limit` examples (fixed-seed sample)."""
    return data if limit is None or limit >= len(data) else data.shuffle(seed=0).select(range(limit))


def select_roles(data: Dataset, task: Task, columns: dict[str, str], *, with_label: bool = True) -> Dataset:
    """Select the task's columns and rename them by role.

    Raises:
        ValueError: a column is missing; the message lists the available ones.

    """
    there = data.column_names
    listed = ", ".join(name if name == name.strip() else repr(name) for name in there)  # with spaces that are not seen
    for role, name in columns.items():
        if name not in there and (with_label or role not in task.answers):
            several = " Repeat --column for each role." if "," in name else ""
            raise ValueError(
                f"columns maps {role} to {name!r}, which is not in the data. Available columns: {listed}.{several}"
            )
    wanted = task.columns(columns, there, with_label=with_label)
    if missing := [role for role, name in wanted.items() if name not in there]:
        columns_are = f"column{'s' * (len(missing) > 1)} {' and '.join(missing)}"
        raise ValueError(
            f"The task {task.name} needs the {columns_are}, but the data has {listed}. Map "
            f"{'them' if len(missing) > 1 else 'it'}: {' '.join(f'--column {role}=NAME' for role in missing)}"
        )
    optional = {role: columns.get(role, role) for role in task.optional_roles}
    wanted |= {role: name for role, name in optional.items() if name in there}
    if twice := sorted({name for name in wanted.values() if list(wanted.values()).count(name) > 1}):
        roles = " and ".join(role for role, name in wanted.items() if name == twice[0])
        raise ValueError(f"The column {twice[0]!r} is mapped to {roles}. Map each role to a column of its own.")
    selected = data.select_columns(list(dict.fromkeys(wanted.values())))
    return task.as_read(selected.rename_columns({name: role for role, name in wanted.items() if name != role}))


def _checked(
    data: Dataset, task: Task, where: str, skip_empty: bool, *, with_label: bool = True
) -> tuple[Dataset, list[str], Sequence[int]]:
    """Examples that the task can use, without those with an empty required cell if `skip_empty`, notes, and their rows.

    Raises:
        ValueError: there are none, or one is invalid; the message names problem and rows.

    """
    notes: list[str] = []
    rows: Sequence[int] = range(len(data))
    if skip_empty:
        optional = {*task.optional_roles, *(() if with_label else task.answers)}
        asked = [name for name in data.column_names if name not in optional]
        secret = {name: -1 for name in asked if isinstance(data.features[name], ClassLabel)}
        columns = [[is_filled(value) and value != secret.get(name) for value in data[name]] for name in asked]
        rows = [row for row, filled in enumerate(zip(*columns, strict=True)) if all(filled)]
        if left := sorted({*range(len(data))} - {*rows}):
            skipped = f"Skipped {len(left):,} of {len(data):,} examples in {where}"
            notes = [f"{skipped} with empty values (from 0: {shown(left)})."]
            data = data.select(rows)
    if len(data) == 0:
        raise ValueError(f"There are no examples in {where}.")
    task.check(data, where, with_label=with_label)
    return data, notes, rows


def choose_max_length(counts: list[int], limit: int) -> int:
    """99th percentile of the lengths, rounded up to a multiple of 8, within the model's limit."""
    return min(limit, 8 * math.ceil(np.quantile(counts, 0.99) / 8))


def split_by_groups(data: Dataset, share: float, remedy: str) -> tuple[Dataset, Dataset]:
    """Deterministic split without shared groups; the second part has this share.

    Raises:
        ValueError: a group is missing, or there are too few; with the remedy.

    """
    groups = data["group"] if "group" in data.column_names else range(len(data))
    require_rows(map(is_known, groups), "group must not be missing in the data")
    frame = pd.DataFrame({"group": list(map(str, groups)), "row": range(len(data))})
    try:
        first, second = split_by_group(frame, share)
    except ValueError:
        raise ValueError(
            f"{len(data)} examples in {frame['group'].nunique()} groups are too few to hold out {share:.0%} for "
            f"validation. {remedy}"
        ) from None
    return data.select(first["row"]), data.select(second["row"])
