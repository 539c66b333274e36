"""Output folder of a training run: its files, record, and checkpoints.

A checkpoint is complete only if its writer was not killed.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypedDict

from .checks import require_type
from .files import parse_json, read_json, readable, require_folder, write_json

RUN_FILE = "run.json"
READING_FILE = "reading.json"  # of an export of a run
METRICS_FILE = "metrics.json"
REPORT_FILE = "ranks.json"
LOG_FILE = "log_history.json"
HISTORY_FILE = "rank_history.jsonl"
PICTURE_FILE = "ranks.png"
STATE_FILE = "trainer_state.json"
# Rendering of prompts and chats: chat turns, plain prompts, or texts without prompts.
CHAT, PLAIN, TEXT = "chat", "plain", "text"
ANSWERS = "answers"
CHOSE = "chose_checkpoint"  # among metrics: whether those of this data chose the checkpoint
_GUESS = "guess_"  # before the name of a metric of the best constant answer
RUN_EXPECTED = "`lrlora train` wrote this file. Restore it from a copy, or train again."
ANOTHER_CHECKPOINT = "Remove this checkpoint to resume from the previous one."


class LogEntry(TypedDict, total=False):
    """Entry of the Trainer's log history, with any logged values."""

    step: int


class State(TypedDict, total=False):
    """Parts of the Trainer's state that are read."""

    log_history: list[LogEntry]


class Reading(TypedDict, total=False):
    """How the data of a run is read: its task, and settings that are not the default."""

    task: str
    columns: dict[str, str]
    delimiter: str
    encoding: str
    skip_empty: bool


@dataclass(frozen=True)
class RunRecord:
    """Record of a run, written by `train`.

    Attributes:
        config: its configuration (`lrlora.train.settings.TrainConfig`).
        labels: class names; empty for tasks without classes.
        max_length: truncation length in tokens; None for images.
        versions: of lrlora and its dependencies.
        data_sums: SHA-256 of the examples, by split.
        examples_per_step: total of all processes.
        found_rate: learning rate that short trainings found; None where it was given.
        rendering: rendering of prompts and chats: "chat", "plain" or "text"; None for other tasks.
        loss_on: "answers" if the loss covers only the answers of chats; else None.
        chat_template: template of the chats.
        base_model: its hub name; None for a local folder.
        dataset: hub name of the data; None for other data.
        pipeline: the hub's name of the task; None for an adapter from elsewhere.
        model_class: class of transformers that loads the base model; None for an adapter from elsewhere.

    """

    config: dict[str, Any]
    labels: list[str]
    max_length: int | None
    versions: dict[str, str]
    data_sums: dict[str, str]
    examples_per_step: int | None = None
    found_rate: float | None = None
    rendering: str | None = None
    loss_on: str | None = None
    chat_template: str | None = None
    base_model: str | None = None
    dataset: str | None = None
    pipeline: str | None = None
    model_class: str | None = None


def read_record(folder: Path) -> RunRecord:
    """Read the record of a run from its output folder.

    Raises:
        FileNotFoundError: the folder holds no run.
        ValueError: the record is damaged.

    """
    path = folder / RUN_FILE
    if not path.is_file():
        raise FileNotFoundError(
            f"{folder} contains no run of `lrlora train`: it has no {RUN_FILE}. Pass the --output folder of a run."
        )
    record: RunRecord = read_json(path, RunRecord, RUN_EXPECTED)
    with readable(path, RUN_EXPECTED):
        require_type(record.config.get("training", {}), dict[str, Any], "config['training']")
    return record


def read_reading(folder: Path) -> Reading:
    """How the data of a run is read, from its folder or that of an export; empty if nothing is known.

    Raises:
        ValueError: the record is damaged.

    """
    if (folder / RUN_FILE).is_file():
        config = read_record(folder).config
        settings: Any = {name: config[name] for name in Reading.__annotations__ if config.get(name)}
    else:
        path = folder / READING_FILE
        settings = read_json(path, Reading, "Remove it to continue without it.") if path.is_file() else {}
    reading: Reading = settings
    return reading


def hand_on_reading(source: str, folder: Path) -> None:
    """Write how data is read to the folder of an export, if it is known of its source."""
    if reading := read_reading(Path(source)):
        write_json(folder / READING_FILE, reading)


def require_new_run(output: Path, *, overwrite: bool) -> None:
    """Raise FileExistsError unless a new run can be written to a folder: an empty one, or a run to overwrite."""
    require_folder(output)
    # A process killed at startup leaves only a temporary file; the lock may exist, too.
    is_used = output.exists() and any(path.suffix not in (".partial", ".lock") for path in output.iterdir())
    is_run, is_finished = (output / RUN_FILE).exists(), (output / METRICS_FILE).exists()
    if not is_used or (overwrite and is_run):
        return
    hint = "replace it with --overwrite" if is_run else "remove it yourself"
    hint += ", or continue it with --resume" * (is_run and not is_finished)
    raise FileExistsError(f"The folder {output} exists and is not empty. Choose another --output, or {hint}.")


def resume_hint(output: Path | str) -> str:
    """Command that resumes the run in a folder."""
    return f"Resume it with: lrlora train --resume {output}"


def is_chosen(config: Mapping[str, Any]) -> bool:
    """Whether the validation scores of a run chose its checkpoint, and so flatter it."""
    training = config.get("training", {})
    return bool(training.get("load_best_model_at_end", training.get("eval_strategy") != "no"))


def which_checkpoint(config: Mapping[str, Any]) -> str:
    """Final checkpoint of a run, and how it was chosen."""
    return "best checkpoint, chosen by these scores" if is_chosen(config) else "last step"


def shown_metrics(metrics: dict[str, float]) -> dict[str, float]:
    """Metrics to show: without the epoch, and without the log loss if it equals the loss to four digits."""
    left_out = {"epoch", "examples", CHOSE} | {name for name in metrics if name.startswith(_GUESS)}
    if f"{metrics.get('loss', 0):.4g}" == f"{metrics.get('log_loss', 1):.4g}":
        left_out.add("log_loss")
    return {name: value for name, value in metrics.items() if name not in left_out}


def with_guess(metrics: Mapping[str, float], guess: Mapping[str, float]) -> dict[str, float]:
    """Metrics as they are stored, beside those of the best constant answer."""
    return {**metrics, **{f"{_GUESS}{name}": value for name, value in guess.items() if name in metrics}}


def guess_in(metrics: Mapping[str, float]) -> dict[str, float]:
    """Metrics of the best constant answer in stored ones."""
    return {name.removeprefix(_GUESS): value for name, value in metrics.items() if name.startswith(_GUESS)}


def last_whole_checkpoint(output: Path) -> Path | None:
    """Newest complete checkpoint in a folder: the Trainer writes its state last."""
    matches = (re.fullmatch(r"checkpoint-(\d+)", path.name) for path in output.iterdir())
    for step, name in sorted(((int(match[1]), match[0]) for match in matches if match), reverse=True):
        if _content(output / name / STATE_FILE).get("global_step") == step:
            return output / name
    return None


def _content(file: Path) -> dict[str, Any]:
    """Content of a JSON file; empty if damaged or missing."""
    try:
        content = parse_json(file)
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}
