"""The rows of a data set: rules for them, errors that say which break one, and their encoding in batches."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
from datasets import Dataset

SHOWN_ROWS = 5


def require_rows(are_right: Iterable[bool], rule: str, values: Any = None) -> None:
    """Raise a ValueError that names rows, and the value of the first, unless the rule holds in all of them."""
    wrong = [row for row, is_right in enumerate(are_right) if not is_right]
    if wrong:
        rows = ", ".join(str(row) for row in wrong[:SHOWN_ROWS]) + (", …" if len(wrong) > SHOWN_ROWS else "")
        found = f" Row {wrong[0]} holds {values[wrong[0]]!r}." if values is not None else ""
        count = f"{len(wrong)} row{'s' * (len(wrong) > 1)}"
        raise ValueError(f"{rule}, and is not so in {count} (counted from 0: {rows}).{found}")


def require_text(data: Dataset, role: str, split: str) -> None:
    """Raise a ValueError unless a column is text everywhere."""
    require_rows(
        (isinstance(value, str) and bool(value.strip()) for value in data[role]),
        f"{role} must be text, and not empty, in the split {split} (--skip-empty leaves out what is empty)",
        data[role],
    )


def is_known(value: Any) -> bool:
    """Whether a value is there, and not NaN."""
    return value is not None and not (isinstance(value, float) and math.isnan(value))


def is_filled(value: Any) -> bool:
    """Whether a value is there, and no blank text or empty list."""
    return is_known(value) and value != [] and not (isinstance(value, str) and not value.strip())


def is_finite(value: Any) -> bool:
    """Whether a value is a finite number, also in float32, which a model is trained in."""
    try:
        return not isinstance(value, bool) and abs(float(value)) <= float(np.finfo(np.float32).max)
    except (TypeError, ValueError, OverflowError):
        return False


def is_conversation(value: Any) -> bool:
    """Whether a value is a list of messages, each with who says it (role, from) and something to say."""
    return isinstance(value, list) and len(value) > 0 and all(isinstance(m, dict) and _is_message(m) for m in value)


def _is_message(message: dict[str, Any]) -> bool:
    says = message.get("content") is not None or message.get("value") is not None or bool(message.get("tool_calls"))
    return says and isinstance(message.get("role") or message.get("from"), str)


def counted(data: Dataset, count: Callable[[dict[str, list[Any]]], list[int]]) -> list[int]:
    """A number for each example, from `count` of a batch; `datasets` keeps them for data that it has on disk."""
    return list(
        data.map(
            lambda batch: {"count": count(batch)},
            batched=True,
            remove_columns=data.column_names,
            desc="Counting tokens",
        )["count"]
    )


def mapped(data: Dataset, encode: Callable[..., dict[str, list[Any]]]) -> Dataset:
    """The examples encoded batch by batch, without what they were encoded from; `label` becomes `labels`."""
    drop = [name for name in data.column_names if name != "label"]
    encoded = data.map(encode, batched=True, remove_columns=drop, desc="Tokenizing")
    return encoded.rename_column("label", "labels") if "label" in encoded.column_names else encoded
