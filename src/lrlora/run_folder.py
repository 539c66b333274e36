"""Output folder of a training run: its files, record, and checkpoints.

A checkpoint is complete only if its writer was not killed.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypedDict
from zipfile import ZipFile

from safetensors import safe_open

from .checks import require_type
from .files import parse_json, read_json, readable, require_regular

RUN_FILE = "run.json"
RECORD_FILE = "run_record.json"  # same in a checkpoint; the other name prevents mistaking it for a run
METRICS_FILE = "metrics.json"
REPORT_FILE = "ranks.json"
LOSS_FILE = "loss_over_size.json"
LOG_FILE = "log_history.json"
HISTORY_FILE = "rank_history.jsonl"
PICTURE_FILE = "ranks.png"
STATE_FILE = "trainer_state.json"
# Rendering of prompts and chats: chat turns, plain prompts, or texts without prompts.
CHAT, PLAIN, TEXT = "chat", "plain", "text"
ANSWERS = "answers"
RUN_EXPECTED = "`lrlora train` wrote this file. Restore it from a copy, or train again."
ANOTHER_CHECKPOINT = "Remove this checkpoint to resume from the previous one."


class LogEntry(TypedDict, total=False):
    """Entry of the Trainer's log history, with any logged values."""

    step: int


class _Callbacks(TypedDict):
    TrainerControl: dict[str, Any]


class State(TypedDict, total=False):
    """Parts of the Trainer's state that are read or needed to resume."""

    global_step: int
    epoch: float
    train_batch_size: int | None
    num_input_tokens_seen: int
    total_flos: float
    log_history: list[LogEntry]
    best_metric: float | None
    best_global_step: int | None
    best_model_checkpoint: str | None
    stateful_callbacks: _Callbacks


@dataclass(frozen=True)
class RunRecord:
    """Record of a run, written by `train`.

    Attributes:
        config: its configuration (`lrlora.train.settings.TrainConfig`).
        labels: class names; empty for tasks without classes.
        max_length: truncation length in tokens; None for images.
        versions: of lrlora and its dependencies.
        examples_per_step: total of all processes; None in older runs.
        rendering: rendering of prompts and chats: "chat", "plain" or "text"; None for other tasks and in older runs.
        loss_on: "answers" if the loss covers only the answers of chats; else, and in older runs, None.
        chat_template: template of the chats.
        base_model: its hub name; None for a local folder and in older runs.
        run_id: random id; None in older runs.
        fingerprints: hashes of the run's inputs, by display name; None in older runs.

    """

    config: dict[str, Any]
    labels: list[str]
    max_length: int | None
    versions: dict[str, str]
    examples_per_step: int | None = None
    rendering: str | None = None
    loss_on: str | None = None
    chat_template: str | None = None
    base_model: str | None = None
    run_id: str | None = None
    fingerprints: dict[str, str] | None = None


@dataclass(frozen=True)
class LossRecord:
    """Measured losses at smaller sizes, and the chosen size.

    Attributes:
        loss: mean validation loss of the adapter.
        rise: maximum relative rise of the loss at the chosen size; None if the size was given.
        sizes: parameters of the measured LoRAs, largest first.
        losses: their losses, in the same order.
        chosen: parameters of the chosen one.
        ranks: module → its rank there.

    """

    loss: float
    rise: float | None
    sizes: list[int]
    losses: list[float]
    chosen: int
    ranks: dict[str, int]


def read_losses(folder: Path) -> LossRecord | None:
    """Losses of a run at smaller sizes; None if not measured.

    Raises:
        ValueError: the file is damaged.

    """
    path = folder / LOSS_FILE
    if not path.exists():
        return None
    with readable(path, "Remove it to continue without the losses over sizes."):
        record = LossRecord(**parse_json(path))
        require_type(record, LossRecord, "loss over size")
        return record


_LATER = ("examples_per_step", "rendering", "loss_on", "chat_template", "base_model", "run_id", "fingerprints")


def read_record(folder: Path, name: str = RUN_FILE) -> RunRecord:
    """Read the record of a run from its output folder or, under another name, a checkpoint.

    Raises:
        FileNotFoundError: the folder holds no run.
        ValueError: the record is damaged.

    """
    path = folder / name
    require_regular(folder)
    if not path.is_file():
        raise FileNotFoundError(
            f"{folder} contains no run of `lrlora train`: it has no {RUN_FILE}. Pass the --output folder of a run."
        )
    with readable(path, RUN_EXPECTED):
        content = parse_json(path)
        later = {field: content.get(field) for field in _LATER}
        versions = content.get("versions", {})
        record = RunRecord(content["config"], content["labels"], content["max_length"], versions, **later)
        require_type(record, RunRecord, "run")
        require_type(record.config.get("training", {}), dict[str, Any], "run.config['training']")
        return record


def which_checkpoint(config: dict[str, Any]) -> str:
    """Final checkpoint of a run: "best checkpoint", or "last step" without evaluations."""
    training = config.get("training", {})
    is_best = training.get("load_best_model_at_end", training.get("eval_strategy") != "no")
    return "best checkpoint" if is_best else "last step"


def shown_metrics(metrics: dict[str, float]) -> dict[str, float]:
    """Metrics to show: without the epoch, and without the log loss if it equals the loss to four digits."""
    left_out = {"epoch", "examples"}
    if f"{metrics.get('loss', 0):.4g}" == f"{metrics.get('log_loss', 1):.4g}":
        left_out.add("log_loss")
    return {name: value for name, value in metrics.items() if name not in left_out}


def last_whole_checkpoint(output: Path) -> Path | None:
    """Newest complete checkpoint in a folder.

    The Trainer writes its state last, then the run adds its record (except in older runs).
    """
    has_records = _content(output / RUN_FILE).get("run_id") is not None
    matches = (re.fullmatch(r"checkpoint-(\d+)", path.name) for path in output.iterdir())
    for step, name in sorted(((int(match[1]), match[0]) for match in matches if match), reverse=True):
        folder = output / name
        is_recorded = not has_records or (folder / RECORD_FILE).is_file()
        if is_recorded and _content(folder / STATE_FILE).get("global_step") == step:
            return folder
    return None


def resumed_from(checkpoint: Path) -> list[Path]:
    """Checkpoints needed to resume from one: itself, and the best one before it.

    Raises:
        ValueError: its Trainer state is damaged.

    """
    best = read_json(checkpoint / STATE_FILE, State, ANOTHER_CHECKPOINT).get("best_model_checkpoint")
    return [checkpoint, Path(best or checkpoint)]


def require_readable(checkpoint: Path) -> None:
    """Raise ValueError if a file of a checkpoint, or of the best one before it, is damaged."""
    for folder in resumed_from(checkpoint):
        require_regular(folder, "**/*")
        for file in sorted(folder.rglob("*")):
            with readable(file, ANOTHER_CHECKPOINT):
                _require_checksums(file)


def _content(file: Path) -> dict[str, Any]:
    """Content of a JSON file; empty if damaged or missing."""
    try:
        content = parse_json(file)
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _require_checksums(file: Path) -> None:
    if file.suffix in (".pt", ".pth", ".bin"):
        # These are archives with checksums, which torch does not verify.
        with ZipFile(file) as archive:
            if wrong := archive.testzip():
                raise ValueError(f"{wrong} does not match its checksum")
    elif file.suffix == ".safetensors":
        with safe_open(file, "pt"):
            pass  # opening reads the header and checks the size
