"""A user's data: loaded from wherever it is, checked before anything long starts, and encoded for a task."""

from __future__ import annotations

import errno
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import pandas as pd
from datasets import ClassLabel, Dataset, DatasetDict, load_dataset, load_from_disk
from transformers import PreTrainedTokenizerBase

from ..checks import require_known
from .choices import encode_continuations
from .commonsense import COMMONSENSE, load_commonsense
from .config import CHOICE_LM, FROM_TRAIN, OPTIONAL_ROLES, ROLES, TrainConfig
from .embedded import EMBEDDED_DATA
from .tasks import split_by_group

PREFIX = "embedded:"
COMMONSENSE_PREFIX = "commonsense"
_BUILDERS = {".csv": "csv", ".tsv": "csv", ".json": "json", ".jsonl": "json", ".parquet": "parquet"}
SHOWN_ROWS = 5


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
    if name.startswith(PREFIX):
        require_known("embedded data", name.removeprefix(PREFIX), EMBEDDED_DATA)
        return EMBEDDED_DATA[name.removeprefix(PREFIX)].load()
    path = Path(name)
    try:
        if path.is_file():
            builder = _BUILDERS.get(path.suffix)
            if builder is None:
                raise ValueError(f"it ends in none of {', '.join(_BUILDERS)}")
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
    if path.suffix in _BUILDERS or path.is_absolute() or name.startswith("."):
        raise FileNotFoundError(f"There is no file or folder {name} to read data from.")
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
    splits = DatasetDict(load_splits(config.data))
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
        {
            name: select_roles(splits[name], config.task, config.columns)
            for name in ("train", "validation")
            if name in splits
        }
    )
    for name, part in splits.items():
        check_examples(part, config.task, name)
    labels: list[str] = []
    if config.task == "classify":
        labels = _class_names(splits["train"])
        splits = DatasetDict({name: with_class_ids(part, labels, name) for name, part in splits.items()})
    if "validation" not in splits:
        splits["train"], splits["validation"] = _split(splits["train"], config.validation_share)
    limits = {"train": config.train_examples, "validation": config.validation_examples}
    return TaskData(DatasetDict({name: sampled(part, limits[name]) for name, part in splits.items()}), labels)


def sampled(data: Dataset, limit: int | None) -> Dataset:
    """So many of the examples at most, drawn at random, always the same ones."""
    return data if limit is None or limit >= len(data) else data.shuffle(seed=0).select(range(limit))


def select_roles(data: Dataset, task: str, columns: dict[str, str], *, with_label: bool = True) -> Dataset:
    """The columns that a task reads, named by their roles.

    Raises:
        ValueError: a column is missing; the message names those there are.

    """
    there = data.column_names
    wanted = {role: columns.get(role, role) for role in ROLES[task]}
    optional = {role: columns.get(role, role) for role in OPTIONAL_ROLES}
    for role, name in columns.items():
        if name not in there and (with_label or role != "label"):
            raise ValueError(f"columns: {role} is to be read from {name!r}, and the data has {', '.join(there)}.")
    if task == "causal-lm":
        alternatives = [("messages",), ("prompt", "completion"), ("text",)]
        alternatives.sort(key=lambda roles: not set(roles) & set(columns))  # what the user names comes first
        roles = next((roles for roles in alternatives if all(wanted[role] in there for role in roles)), None)
        if roles is None:
            raise ValueError(
                "The task causal-lm reads the columns messages, or prompt and completion, or text, and the data has "
                f"{', '.join(there)}. Name them: --column prompt=NAME"
            )
        wanted = {role: wanted[role] for role in roles}
    elif not with_label:
        del wanted["label"]
    for role, name in wanted.items():
        if name not in there:
            raise ValueError(
                f"The task {task} reads the column {role!r}, and the data has {', '.join(there)}. Name it: "
                f"--column {role}=NAME"
            )
    wanted |= {role: name for role, name in optional.items() if name in there}
    return data.select_columns(list(dict.fromkeys(wanted.values()))).rename_columns(
        {name: role for role, name in wanted.items() if name != role}
    )


def check_examples(data: Dataset, task: str, split: str, *, with_label: bool = True) -> None:
    """Raise a ValueError that says what is wrong, and in which rows, unless the task can use every example."""
    if len(data) == 0:
        raise ValueError(f"The split {split} of the data is empty.")
    if task == "multiple-choice":
        _require_text(data, "question", split)
        choices = data["choices"]
        _require_rows(
            (
                isinstance(c, list) and len(c) > 1 and all(isinstance(choice, str) and choice.strip() for choice in c)
                for c in choices
            ),
            f"choices must be lists of two texts or more, none empty, in the split {split}",
        )
        if len({len(c) for c in choices}) > 1:
            raise ValueError(f"All examples of the split {split} must have as many choices as the others.")
        if with_label:
            _require_rows(
                (
                    isinstance(label, int) and 0 <= label < len(c)
                    for label, c in zip(data["label"], choices, strict=True)
                ),
                f"label must be the index of one of the choices, from 0, in the split {split}",
            )
    elif task == "causal-lm":
        for role in set(data.column_names) - set(OPTIONAL_ROLES):
            if isinstance(data[0][role], str) or role == "text":
                _require_text(data, role, split)
            else:
                _require_rows(
                    map(_is_conversation, data[role]), f"{role} must be lists of messages in the split {split}"
                )
    else:
        for role in ("text", "text_pair"):
            if role in data.column_names:
                _require_text(data, role, split)
        if task == "regress" and with_label:
            _require_rows(
                map(_is_finite, data["label"]), f"label must be a finite number in the split {split}", data["label"]
            )


def _class_names(train: Dataset) -> list[str]:
    values, feature = _known_labels(train, "train"), train.features["label"]
    distinct = sorted(set(values), key=lambda value: (str(type(value)), value))
    if len(distinct) < 2:
        raise ValueError(f"All examples of the split train have the label {distinct[0]!r}: there is nothing to learn.")
    if isinstance(feature, ClassLabel):
        return list(feature.names)
    if any(isinstance(value, float) and not value.is_integer() for value in distinct):
        raise ValueError(
            f"The labels are numbers with fractions ({distinct[0]}, {distinct[1]}, …). To predict numbers, use the "
            "task regress."
        )
    return [str(value) for value in distinct]


def with_class_ids(data: Dataset, labels: list[str], split: str) -> Dataset:
    """The data with labels as indices into `labels`.

    Raises:
        ValueError: a label is missing, or not one of `labels`.

    """
    values = _known_labels(data, split)
    feature = data.features["label"]
    names = [feature.int2str(value) if isinstance(feature, ClassLabel) else str(value) for value in values]
    unseen = sorted(set(names) - set(labels))
    if unseen:
        raise ValueError(
            f"The split {split} has labels that training does not have: {', '.join(unseen[:SHOWN_ROWS])}. Known: "
            f"{', '.join(labels)}."
        )
    index = {name: i for i, name in enumerate(labels)}
    return data.remove_columns("label").add_column("label", [index[name] for name in names])


def _known_labels(data: Dataset, split: str) -> list[Any]:
    values = data["label"][:]
    # In data sets of the hub, -1 stands for a label that is kept secret.
    unknown = -1 if isinstance(data.features["label"], ClassLabel) else None
    _require_rows(
        (_is_known(value) and value != unknown for value in values),
        f"label must not be missing in the split {split} (--split names another)",
    )
    _require_rows(
        (isinstance(value, (str, int, float)) for value in values),
        f"label must be one class in the split {split}",
        values,
    )
    return values


def _split(train: Dataset, share: float) -> tuple[Dataset, Dataset]:
    """Training and validation, always the same, without a common group."""
    groups = train["group"] if "group" in train.column_names else range(len(train))
    _require_rows(map(_is_known, groups), "group must not be missing in the split train")
    frame = pd.DataFrame({"group": list(map(str, groups)), "row": range(len(train))})
    try:
        first, second = split_by_group(frame, share)
    except ValueError:
        raise ValueError(
            f"{len(train)} examples in {frame['group'].nunique()} groups are too few to keep {share:.0%} of them for "
            "validation. Give more, or --validation."
        ) from None
    return train.select(first["row"]), train.select(second["row"])


def _is_known(value: Any) -> bool:
    return value is not None and not (isinstance(value, float) and math.isnan(value))


def _is_finite(value: Any) -> bool:
    """Also in float32, which a model is trained in; one that is not makes a whole column of a table text."""
    try:
        return not isinstance(value, bool) and abs(float(value)) <= float(np.finfo(np.float32).max)
    except (TypeError, ValueError, OverflowError):
        return False


def _is_conversation(value: Any) -> bool:
    return (
        isinstance(value, list)
        and len(value) > 0
        and all(isinstance(m, dict) and isinstance(m.get("role"), str) and _says_something(m) for m in value)
    )


def _says_something(message: dict[str, Any]) -> bool:
    return message.get("content") is not None or bool(message.get("tool_calls"))


def _require_text(data: Dataset, role: str, split: str) -> None:
    _require_rows(
        (isinstance(value, str) and bool(value.strip()) for value in data[role]),
        f"{role} must be text, and not empty, in the split {split}",
        data[role],
    )


def _require_rows(are_right: Any, rule: str, values: Any = None) -> None:
    wrong = [row for row, is_right in enumerate(are_right) if not is_right]
    if wrong:
        rows = ", ".join(str(row) for row in wrong[:SHOWN_ROWS]) + (", …" if len(wrong) > SHOWN_ROWS else "")
        found = f" Row {wrong[0]} holds {values[wrong[0]]!r}." if values is not None else ""
        raise ValueError(f"{rule}, and is not so in {len(wrong)} rows (counted from 0: {rows}).{found}")


# Encoding.


def token_counts(data: Dataset, form: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """How long every example is, in tokens, before it is cut; of multiple choice, its longest choice."""
    if form == CHOICE_LM:
        return [max(map(len, rows)) for rows in encode_continuations(data, tokenizer)["input_ids"]]
    if form == "multiple-choice":
        return [
            max(len(ids) for ids in tokenizer([q] * len(c), c)["input_ids"])
            for q, c in zip(data["question"], data["choices"], strict=True)
        ]
    if form != "causal-lm":
        pairs = data["text_pair"][:] if "text_pair" in data.column_names else None
        return [len(ids) for ids in tokenizer(data["text"][:], pairs)["input_ids"]]
    return [_language_tokens(example, tokenizer) for example in data]


def _language_tokens(example: dict[str, Any], tokenizer: PreTrainedTokenizerBase) -> int:
    if "messages" in example or ("prompt" in example and not isinstance(example["prompt"], str)):
        chat = example["messages"] if "messages" in example else example["prompt"] + example["completion"]
        return len(tokenizer(render_chat(tokenizer, chat, example), add_special_tokens=False)["input_ids"])
    text = example["text"] if "text" in example else example["prompt"] + example["completion"]
    return len(tokenizer(text)["input_ids"]) + 1  # TRL adds the end of the sequence


def render_chat(
    tokenizer: PreTrainedTokenizerBase, chat: list[dict[str, Any]], example: dict[str, Any], **options: Any
) -> str:
    """A chat in the words of the model's own template, with the example's tools.

    Raises:
        ValueError: the tokenizer has no template, or it refuses the chat.

    """
    options |= {"tools": example.get("tools"), **(example.get("chat_template_kwargs") or {})}
    try:
        return str(tokenizer.apply_chat_template(chat, tokenize=False, **options))
    except (jinja2.TemplateError, ValueError) as error:
        raise ValueError(f"The model's chat template refuses the chat {str(chat)[:200]}: {error}") from None


def choose_max_length(counts: list[int], limit: int) -> int:
    """What holds 99 % of the examples, rounded up to a multiple of 8, within the model's limit."""
    return min(limit, 8 * math.ceil(np.quantile(counts, 0.99) / 8))


def encode(data: Dataset, form: str, tokenizer: PreTrainedTokenizerBase, max_length: int) -> Dataset:
    """Token ids, cut at `max_length`, and `labels`; for all forms of a task but causal-lm, which TRL encodes."""
    if form == CHOICE_LM:
        return encode_continuations(data, tokenizer, max_length)

    def encode_texts(batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
        return dict(tokenizer(batch["text"], batch.get("text_pair"), truncation=True, max_length=max_length))

    def encode_choices(batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
        rows = [
            tokenizer([question] * len(choices), choices, truncation=True, max_length=max_length)
            for question, choices in zip(batch["question"], batch["choices"], strict=True)
        ]
        return {name: [row[name] for row in rows] for name in rows[0]}

    encoder = encode_choices if form == "multiple-choice" else encode_texts
    drop = [name for name in data.column_names if name != "label"]
    encoded = data.map(encoder, batched=True, remove_columns=drop, desc="Tokenizing")
    if "label" not in encoded.column_names:
        return encoded
    if form == "regress":
        targets = [float(value) for value in data["label"]]
        return encoded.remove_columns("label").add_column("labels", np.asarray(targets, dtype=np.float32))
    return encoded.rename_column("label", "labels")
