"""The output folder of a training run: its files, its record, and its checkpoints.

A checkpoint is whole only if the process that wrote it was not killed on the way.
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
RECORD_FILE = "run_record.json"  # the same in a checkpoint, under a name that makes no run of it
METRICS_FILE = "metrics.json"
REPORT_FILE = "ranks.json"
LOSS_FILE = "loss_over_size.json"
LOG_FILE = "log_history.json"
HISTORY_FILE = "rank_history.jsonl"
PICTURE_FILE = "ranks.png"
STATE_FILE = "trainer_state.json"
# How a run reads prompts and chats: as turns of a chat, as plain prompts, or as texts without any.
CHAT, PLAIN, TEXT = "chat", "plain", "text"
ANSWERS = "answers"
RUN_EXPECTED = "It is what `lrlora train` wrote about the run: train it anew if you have no copy."
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
    """What `train` recorded of a run.

    Attributes:
        config: its configuration, field by field (`lrlora.train.settings.TrainConfig`).
        labels: names of the classes; empty unless the task has some.
        max_length: tokens at which examples were cut; None of images.
        versions: of lrlora and what it stands on.
        examples_per_step: of all processes; None in runs of lrlora before it was recorded.
        rendering: how prompts and chats were read: "chat", "plain" or "text"; None of other tasks, and before it was
            recorded.
        loss_on: "answers" where the loss of a chat is taken of the answers alone; None of all else, and before it was
            recorded.
        chat_template: that they were written with.
        base_model: its name on the hub; None where the model was a folder, and before it was recorded.
        run_id: a random one; None before it was recorded.
        fingerprints: hashes of what the run is made from, by what to call it; None before they were recorded.

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
    """Losses measured at smaller sizes, and the size that was chosen.

    Attributes:
        loss: mean loss of the adapter on validation data.
        rise: share of it by which the loss at the chosen size may be larger; None where the size was given.
        sizes: parameters of the LoRAs that were measured, the largest first.
        losses: theirs, in the same order.
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
    """The losses of a run at smaller sizes; None where they were not measured.

    Raises:
        ValueError: the file is damaged.

    """
    path = folder / LOSS_FILE
    if not path.exists():
        return None
    with readable(path, "Remove it, to go on without the losses over sizes."):
        record = LossRecord(**parse_json(path))
        require_type(record, LossRecord, "loss over size")
        return record


_LATER = ("examples_per_step", "rendering", "loss_on", "chat_template", "base_model", "run_id", "fingerprints")


def read_record(folder: Path, name: str = RUN_FILE) -> RunRecord:
    """What `train` recorded of the run in its output folder, or in a checkpoint of it, where it has another name.

    Raises:
        FileNotFoundError: the folder holds no run.
        ValueError: the record is damaged.

    """
    path = folder / name
    require_regular(folder)
    if not path.is_file():
        raise FileNotFoundError(
            f"{folder} holds no run of `lrlora train`: there is no {RUN_FILE} in it. Give the folder that was its "
            "--output."
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
    """Which checkpoint a run ends with: "best checkpoint", or "last step" where nothing was asked of the others."""
    training = config.get("training", {})
    is_best = training.get("load_best_model_at_end", training.get("eval_strategy") != "no")
    return "best checkpoint" if is_best else "last step"


def shown_metrics(metrics: dict[str, float]) -> dict[str, float]:
    """The metrics to show: not the epoch, and the loss once, where the log loss is the same to four digits."""
    left_out = {"epoch", "examples"}
    if f"{metrics.get('loss', 0):.4g}" == f"{metrics.get('log_loss', 1):.4g}":
        left_out.add("log_loss")
    return {name: value for name, value in metrics.items() if name not in left_out}


def last_whole_checkpoint(output: Path) -> Path | None:
    """The newest checkpoint in a folder that was written to its end.

    There the Trainer puts its own state, and then the run its record, unless it is from before there were any.
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
    """The checkpoints that a run needs to go on from one: it, and the best one before it.

    Raises:
        ValueError: the state of the Trainer in it is damaged.

    """
    best = read_json(checkpoint / STATE_FILE, State, ANOTHER_CHECKPOINT).get("best_model_checkpoint")
    return [checkpoint, Path(best or checkpoint)]


def require_readable(checkpoint: Path) -> None:
    """Raise a ValueError if a file of a checkpoint, or of the best one before it, is damaged."""
    for folder in resumed_from(checkpoint):
        require_regular(folder, "**/*")
        for file in sorted(folder.rglob("*")):
            with readable(file, ANOTHER_CHECKPOINT):
                _require_checksums(file)


def _content(file: Path) -> dict[str, Any]:
    """What is in a JSON file; nothing if it is damaged, or there is none."""
    try:
        content = parse_json(file)
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _require_checksums(file: Path) -> None:
    if file.suffix in (".pt", ".pth", ".bin"):
        # These are archives with checksums, which torch does not look at.
        with ZipFile(file) as archive:
            if wrong := archive.testzip():
                raise ValueError(f"{wrong} in it differs from its checksum")
    elif file.suffix == ".safetensors":
        with safe_open(file, "pt"):
            pass  # it reads the header, and compares the size
