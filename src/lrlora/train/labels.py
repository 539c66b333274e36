"""Classes of a data set, and labels as class indices."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from datasets import ClassLabel, Dataset

from .cells import SHOWN_ROWS, is_known, require_rows


def known_labels(data: Dataset, where: str) -> list[Any]:
    """Labels, each a single class.

    Raises:
        ValueError: one is missing or not a class.

    """
    values = data["label"][:]
    # On the hub, -1 marks a withheld label.
    unknown = -1 if isinstance(data.features["label"], ClassLabel) else None
    require_rows(
        (is_known(value) and value != unknown for value in values),
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
        f"Warning: the classes {', '.join(map(repr, group))} differ only in case or spaces."
        for group in groups.values()
        if len(group) > 1
    ]


def with_class_ids(data: Dataset, labels: list[str], where: str) -> Dataset:
    """Replace labels by their indices in `labels`.

    Raises:
        ValueError: a label is missing or not in `labels`.

    """
    values = known_labels(data, where)
    feature = data.features["label"]
    names = [feature.int2str(value) if isinstance(feature, ClassLabel) else class_name(value) for value in values]
    unseen = sorted(set(names) - set(labels))
    if unseen:
        raise ValueError(
            f"Labels in {where} are not in the training data: {', '.join(unseen[:SHOWN_ROWS])}. "
            f"Known: {', '.join(labels)}."
        )
    index = {name: i for i, name in enumerate(labels)}
    return data.remove_columns("label").add_column("label", [index[name] for name in names])
