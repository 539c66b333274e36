"""Cells of a data set: validation rules, errors that name the offending rows, classes, and batched encoding."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from datasets import ClassLabel, Dataset, Features, Value

_SHOWN = 5


def shown(values: Sequence[Any]) -> str:
    """First values, such as row numbers."""
    return ", ".join(map(str, values[:_SHOWN])) + (", …" if len(values) > _SHOWN else "")


def require_rows(are_right: Iterable[bool], rule: str, values: Any = None) -> None:
    """Raise ValueError with row numbers and the first value, unless the rule holds for all rows."""
    wrong = [row for row, is_right in enumerate(are_right) if not is_right]
    if wrong:
        found = f" Row {wrong[0]} is {values[wrong[0]]!r:.200}." if values is not None else ""
        count = f"{len(wrong)} row{'s' * (len(wrong) > 1)}"
        raise ValueError(f"{rule}; violated in {count} (counted from 0: {shown(wrong)}).{found}")


def require_text(data: Dataset, role: str, where: str) -> None:
    """Raise ValueError unless all values of a column are text."""
    values = data[role][:]
    rule = f"{role} must be text in {where} (--column {role}=NAME names another column)"
    require_rows((isinstance(value, str) or not is_filled(value) for value in values), rule, values)
    rule = f"{role} must not be empty in {where} (--skip-empty skips such examples)"
    require_rows(map(is_filled, values), rule, values)


def is_known(value: Any) -> bool:
    """Whether a value is neither None nor NaN."""
    return value is not None and not (isinstance(value, float) and math.isnan(value))


def is_filled(value: Any) -> bool:
    """Whether a value is known and not blank or an empty list."""
    return is_known(value) and value != [] and not (isinstance(value, str) and not value.strip())


def numbers_as_text(data: Dataset, role: str) -> Dataset:
    """The data with a column of numbers as text, as it is in a CSV file; columns of other types stay as they are."""
    feature = data.features[role]
    if not (isinstance(feature, Value) and feature.dtype.startswith(("int", "uint", "float"))):
        return data

    def write(batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
        return {role: [str(number(value)) if is_known(value) else None for value in batch[role]]}

    number = np.dtype(feature.dtype).type  # in which 0.1 is "0.1", also where it has 32 bits
    features = Features({**data.features, role: Value("string")})
    return data.map(write, batched=True, features=features, desc="Reading numbers as text")


def is_number(value: Any) -> bool:
    """Whether a value is a number, or the text of one."""
    try:
        float(value)
    except (TypeError, ValueError):
        return False
    return True


def is_finite(value: Any) -> bool:
    """Whether a value is a finite number in float32, the training dtype."""
    try:
        return not isinstance(value, bool) and abs(float(value)) <= float(np.finfo(np.float32).max)
    except (TypeError, ValueError, OverflowError):
        return False


def is_conversation(value: Any) -> bool:
    """Whether a value is a list of messages, each with a role, and content or calls of tools."""
    return isinstance(value, list) and len(value) > 0 and all(isinstance(m, dict) and _is_message(m) for m in value)


def _is_message(message: dict[str, Any]) -> bool:
    says = message.get("content") is not None or bool(message.get("tool_calls"))
    return says and isinstance(message.get("role"), str)


def counted(data: Dataset, count: Callable[[dict[str, list[Any]]], list[int]]) -> list[int]:
    """Apply `count` to batches, with one number per example; `datasets` caches them for data on disk."""
    return list(
        data.map(
            lambda batch: {"count": count(batch)},
            batched=True,
            remove_columns=data.column_names,
            desc="Counting tokens",
        )["count"]
    )


def mapped(data: Dataset, encode: Callable[..., dict[str, list[Any]]]) -> Dataset:
    """Encode examples in batches and drop their source columns; renames `label` to `labels`."""
    drop = [name for name in data.column_names if name != "label"]
    encoded = data.map(encode, batched=True, remove_columns=drop, desc="Tokenizing")
    return encoded.rename_column("label", "labels") if "label" in encoded.column_names else encoded


def known_labels(data: Dataset, where: str) -> list[Any]:
    """Labels, each a single class.

    Raises:
        ValueError: one is missing or not a class.

    """
    values = data["label"][:]
    # On the hub, -1 marks a withheld label.
    unknown = -1 if isinstance(data.features["label"], ClassLabel) else None
    require_rows(
        (is_filled(value) and value != unknown for value in values),
        f"label must not be missing in {where} (--skip-empty skips such examples)",
    )
    require_rows(
        (isinstance(value, (str, int, float)) for value in values),
        f"label must be a single class in {where}",
        values,
    )
    return values


def class_name(value: Any) -> str:
    """Name of a label's class.

    An integer column with an empty cell is read as floats and must keep its class names.
    """
    return str(int(value) if isinstance(value, float) and value.is_integer() else value)


def class_names(distinct: Sequence[Any]) -> list[str]:
    """Names of the classes of distinct labels, sorted; integers that a CSV file has as 1.0 are 1, as in other files."""
    names = [class_name(value) for value in distinct]
    return in_order(map(_without_zero, names)) if all(map(_WITH_ZERO.fullmatch, names)) else names


_WITH_ZERO = re.compile(r"-?\d+\.0")


def _without_zero(name: str) -> str:
    return name.removesuffix(".0") if _WITH_ZERO.fullmatch(name) else name


def in_order(values: Iterable[Any]) -> list[Any]:
    """Distinct labels, sorted; numbers, also those in text, by value."""

    def key(value: Any) -> tuple[str, float, str]:
        is_number = not isinstance(value, str) or re.fullmatch(r"-?\d{1,15}", value) is not None
        return ("" if is_number else "text", float(value) if is_number else 0.0, str(value))

    return sorted(set(values), key=key)


def is_fraction(value: Any) -> bool:
    """Whether a label is a number, or the text of one, but not an integer."""
    try:
        return not float(value).is_integer()
    except (ValueError, OverflowError):
        return False


def alike(labels: list[str]) -> list[str]:
    """Warnings of classes that differ only in case or spaces."""
    groups: dict[str, list[str]] = {}
    for label in labels:
        groups.setdefault(" ".join(label.split()).casefold(), []).append(label)
    return [
        f"Warning: the classes {', '.join(map(repr, group))} differ only in case or spaces. If they mean the same, "
        "write them alike in the data."
        for group in groups.values()
        if len(group) > 1
    ]


_MISSING = ("", "-", "?", "n/a", "na", "nan", "none", "null", "unknown")  # as tables spell a missing value


def doubtful(counts: Mapping[str, int]) -> list[str]:
    """Warnings of classes with one example, and of names that look like a missing value.

    Args:
        counts: class → number of training examples.

    """
    single = [label for label, count in counts.items() if count == 1]
    is_each = len(single) == sum(counts.values())  # told elsewhere
    missing = [label for label in counts if label.strip().casefold() in _MISSING]
    told = []
    if single and not is_each:
        told.append(
            f"Warning: classes with one training example, too few to learn: {len(single)} of {len(counts)} "
            f"({shown(single)}). Merge them, or leave them out."
        )
    told += [
        f"Warning: the class {label!r} looks like a missing value, but is learned as a class. If it is missing, empty "
        "its cells and pass --skip-empty."
        for label in missing
    ]
    return told


def lacking_classes(labels: list[str], parts: Mapping[str, Dataset]) -> list[str]:
    """Warnings of classes that a part of the data lacks, as a division by group may leave it."""
    present = {name: {*part["label"]} for name, part in parts.items()}
    lacking = {name: [label for i, label in enumerate(labels) if i not in known] for name, known in present.items()}
    return [
        f"Warning: classes without an example in {name}: {len(left)} of {len(labels)} ({shown(left)})."
        for name, left in lacking.items()
        if left
    ]


def contradictions(texts: Sequence[Any], labels: Sequence[int]) -> int:
    """Number of distinct texts with more than one label."""
    label_counts = Counter(text for text, _ in {*zip(texts, labels, strict=True)})
    return sum(count > 1 for count in label_counts.values())


def with_class_ids(data: Dataset, labels: list[str], where: str) -> Dataset:
    """Replace labels by their indices in `labels`.

    Raises:
        ValueError: a label is missing or not in `labels`.

    """
    values = known_labels(data, where)
    feature = data.features["label"]
    names = [feature.int2str(value) if isinstance(feature, ClassLabel) else class_name(value) for value in values]
    names = [name if name in labels else _without_zero(name) for name in names]
    unseen = sorted(set(names) - set(labels))
    if unseen:
        raise ValueError(
            f"Labels in {where} are not in the training data: {shown(unseen)}. Known: {', '.join(labels)}."
        )
    index = {name: i for i, name in enumerate(labels)}
    return data.remove_columns("label").add_column("label", [index[name] for name in names])
