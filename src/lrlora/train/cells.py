"""Rows of a data set: validation rules, errors that name the offending rows, and batched encoding."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
from datasets import Dataset

SHOWN_ROWS = 5


def require_rows(are_right: Iterable[bool], rule: str, values: Any = None) -> None:
    """Raise ValueError with row numbers and the first value, unless the rule holds for all rows."""
    wrong = [row for row, is_right in enumerate(are_right) if not is_right]
    if wrong:
        rows = ", ".join(str(row) for row in wrong[:SHOWN_ROWS]) + (", …" if len(wrong) > SHOWN_ROWS else "")
        found = f" Row {wrong[0]} is {values[wrong[0]]!r:.200}." if values is not None else ""
        count = f"{len(wrong)} row{'s' * (len(wrong) > 1)}"
        raise ValueError(f"{rule}; violated in {count} (counted from 0: {rows}).{found}")


def require_text(data: Dataset, role: str, where: str) -> None:
    """Raise ValueError unless all values of a column are text."""
    require_rows(
        (isinstance(value, str) and bool(value.strip()) for value in data[role]),
        f"{role} must be nonempty text in {where} (--skip-empty skips empty examples)",
        data[role],
    )


def is_known(value: Any) -> bool:
    """Whether a value is neither None nor NaN."""
    return value is not None and not (isinstance(value, float) and math.isnan(value))


def is_filled(value: Any) -> bool:
    """Whether a value is known and not blank or an empty list."""
    return is_known(value) and value != [] and not (isinstance(value, str) and not value.strip())


def is_finite(value: Any) -> bool:
    """Whether a value is a finite number in float32, the training dtype."""
    try:
        return not isinstance(value, bool) and abs(float(value)) <= float(np.finfo(np.float32).max)
    except (TypeError, ValueError, OverflowError):
        return False


def is_conversation(value: Any) -> bool:
    """Whether a value is a list of messages, each with a sender (role, from) and content."""
    return isinstance(value, list) and len(value) > 0 and all(isinstance(m, dict) and _is_message(m) for m in value)


def _is_message(message: dict[str, Any]) -> bool:
    says = message.get("content") is not None or message.get("value") is not None or bool(message.get("tool_calls"))
    return says and isinstance(message.get("role") or message.get("from"), str)


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
