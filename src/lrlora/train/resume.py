"""Resuming a run: the same settings and data, from its last complete checkpoint."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

from datasets import Dataset
from transformers import Trainer

from ..run_folder import RunRecord, last_whole_checkpoint
from .progress import Announce
from .sharding import require_same_sharding


def data_sums(splits: Mapping[str, Dataset]) -> dict[str, str]:
    """SHA-256 of the examples of each split; images as stored."""
    return {name: _sum_of(data) for name, data in splits.items()}


def _sum_of(data: Dataset) -> str:
    found = hashlib.sha256()
    for table in data.with_format("arrow").iter(batch_size=1000):
        found.update(json.dumps(table.to_pylist(), default=str).encode())
    return found.hexdigest()


def require_same_run(output: Path, began: RunRecord, now: RunRecord) -> None:
    """Raise ValueError, with the names of what changed, unless a run has the settings and data that it began with."""
    before, mine = (json.loads(json.dumps(record.config | {"output": None})) for record in (began, now))
    changed = [
        f"the setting {name} ({before[name]!r} before, {mine[name]!r} now)"
        for name in mine
        if before.get(name) != mine[name]
    ]
    changed += [
        f"the {words} data"
        for name, words in (("train", "training"), ("validation", "validation"))
        if began.data_sums.get(name) != now.data_sums[name]
    ]
    if changed:
        raise ValueError(
            f"The run in {output} cannot be resumed, because its inputs changed: {'; '.join(changed)}. "
            "Restore them, or start a new run with another --output."
        )


def last_checkpoint(output: Path, trainer: Trainer, announce: Announce) -> Path | None:
    """Checkpoint to resume from; None: from the start.

    Raises:
        ValueError: it was written under another sharding.

    """
    last = last_whole_checkpoint(output)
    if last is not None:
        require_same_sharding(last, trainer)
        if trainer.args.save_only_model:
            announce(
                "Warning: checkpoints have no state of the optimizer (save_only_model), so the results will differ "
                "from those of an uninterrupted run."
            )
    return last
