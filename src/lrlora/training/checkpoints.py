"""What the Trainer writes on the way: which checkpoint is whole, as one is not whose process was killed writing it."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any, TypedDict
from zipfile import ZipFile

from safetensors import safe_open

from ..files import read_json, readable

STATE_FILE = "trainer_state.json"
ANOTHER_CHECKPOINT = "Remove this checkpoint to resume from the one before it."


class LogEntry(TypedDict, total=False):
    """One of the Trainer's log history, with whatever was logged beside."""

    step: int


class _Callbacks(TypedDict):
    TrainerControl: dict[str, Any]


class State(TypedDict, total=False):
    """What is read of the Trainer's state, and what it goes on with."""

    global_step: int
    epoch: float
    log_history: list[LogEntry]
    best_metric: float | None
    best_global_step: int | None
    best_model_checkpoint: str | None
    stateful_callbacks: _Callbacks


def last_whole_checkpoint(output: Path) -> Path | None:
    """The newest checkpoint in a folder that was written to its end, where the Trainer puts its own state."""
    matches = (re.fullmatch(r"checkpoint-(\d+)", path.name) for path in output.iterdir())
    for step, name in sorted(((int(match[1]), match[0]) for match in matches if match), reverse=True):
        if _state(output / name).get("global_step") == step:
            return output / name
    return None


def require_readable(checkpoint: Path) -> None:
    """Raise a ValueError if a file of a checkpoint, or of the best one before it, is damaged."""
    best = read_json(checkpoint / STATE_FILE, State, ANOTHER_CHECKPOINT).get("best_model_checkpoint")
    for folder in (checkpoint, Path(best or checkpoint)):
        for file in sorted(folder.rglob("*")):
            with readable(file, ANOTHER_CHECKPOINT):
                _require_checksums(file)


def _state(checkpoint: Path) -> dict[str, Any]:
    try:
        state = json.loads((checkpoint / STATE_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return state if isinstance(state, dict) else {}


def _require_checksums(file: Path) -> None:
    if file.suffix in (".pt", ".pth", ".bin"):
        # These are archives with checksums, which torch does not look at.
        with ZipFile(file) as archive:
            if wrong := archive.testzip():
                raise ValueError(f"{wrong} in it differs from its checksum")
    elif file.suffix == ".safetensors":
        with safe_open(file, "pt"):
            pass  # it reads the header, and compares the size
