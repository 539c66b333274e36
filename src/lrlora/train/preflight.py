"""Checks of a run before data and model are read: its settings, output folder, adapter to start from, and paths."""

from __future__ import annotations

from pathlib import Path

from ..files import require_no_input
from ..ranks.report import read_history
from ..run_folder import HISTORY_FILE, METRICS_FILE, RUN_FILE, RunRecord
from .data import require_data_path
from .hub import repository
from .models import require_model_folder
from .settings import FROM_TRAIN, TrainConfig, read_run, require_settings
from .sharding import check_sharding


def require_startable(config: TrainConfig, *, resume: bool = False, overwrite: bool = False) -> RunRecord | None:
    """Run all checks that need neither data nor model, and create the repository on the hub, if the run pushes to it.

    Returns:
        Record of the run to resume, if any.

    Raises:
        FileExistsError: the output folder is in use, or its run is finished.
        FileNotFoundError: the run to resume, model folder, or data file is missing.
        ValueError: a setting is unknown or not supported, both resume and overwrite are given, or the method cannot
            resume.

    """
    output = Path(config.output)
    if resume and overwrite:
        raise ValueError(
            f"--resume continues the run in {output}, but --overwrite would delete it. Pass only one of them."
        )
    # A process killed at startup leaves only a temporary file; the lock may exist, too.
    is_used = output.exists() and any(path.suffix not in (".partial", ".lock") for path in output.iterdir())
    resumed = None
    if resume:
        _, resumed = read_run(output)
        if config.method == "adalora":
            raise ValueError(
                "AdaLoRA runs cannot be resumed, because PEFT does not save the state of the rank allocation. Start "
                "a new run."
            )
        if (output / METRICS_FILE).exists():
            raise FileExistsError(
                f"The run in {output} is finished, so there is nothing to resume. To train it further, start a new "
                f"run: lrlora train --start-from {output} --output NEW, with changed settings such as --steps or "
                "--data."
            )
        read_history(output / HISTORY_FILE)  # continued when resuming
    elif is_used and not (overwrite and (output / RUN_FILE).exists()):
        is_run, is_finished = (output / RUN_FILE).exists(), (output / METRICS_FILE).exists()
        hint = "replace it with --overwrite" if is_run else "remove it yourself"
        hint += ", or continue it with --resume" * (is_run and not is_finished)
        raise FileExistsError(f"The folder {output} exists and is not empty. Choose another --output, or {hint}.")
    if overwrite:
        inputs = ("model", "data", "validation", "start_from", "chat_template")
        require_no_input(output, **{name: getattr(config, name) for name in inputs})
    require_model_folder(config.model)
    if config.start_from is not None:
        _check_start_from(config)
    for data in (config.data, config.validation):
        if data not in (None, FROM_TRAIN):
            require_data_path(str(data))
    for place, given in (("training", config.training), ("adapter", config.adapter)):
        require_settings(given, place, config.task, config.method)
    check_sharding(config.method, config.adapter, config.training)
    repository(config.output, config.training)
    return resumed


def _check_start_from(config: TrainConfig) -> None:
    """Raise ValueError unless the run to start from is finished, with the same model, task, method and adapter."""
    start, _ = read_run(Path(str(config.start_from)))
    if not (Path(start.output) / METRICS_FILE).exists():
        raise ValueError(f"The run in {start.output} is not finished. Resume it with lrlora train --resume.")
    for name in ("model", "task", "method", "adapter_fields"):
        theirs, mine = getattr(start, name), getattr(config, name)
        if theirs != mine:
            name = name.removesuffix("_fields")
            raise ValueError(f"{name} must be the same as in {start.output}, {theirs!r}, got {mine!r}.")
