"""Training runs as data: from `lrlora train`, the demo, any Trainer, or a bare adapter."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..adapters import read_updates
from ..adapters.peft_folder import SavedAdapter
from ..adapters.read import method_name
from ..by_class import ByClass, read_by_class
from ..files import read_json
from ..learned.cut import CUT_AT, FEWEST_STEPS, WIDE_RANK, Size
from ..ranks import RankReport, rank_report
from ..ranks.report import read_history
from ..run_folder import (
    CHAT,
    HISTORY_FILE,
    LOG_FILE,
    METRICS_FILE,
    PLAIN,
    REPORT_FILE,
    RUN_FILE,
    STATE_FILE,
    LogEntry,
    RunRecord,
    State,
    guess_in,
    last_whole_checkpoint,
    read_record,
    shown_metrics,
    which_checkpoint,
)
from ..shrunk import Shrunk, read_shrunk
from ..straightened import read_straightened

_ADAPTER_CONFIG = "adapter_config.json"


@dataclass
class Run:
    """Data of a run for the page; empty fields are omitted.

    Attributes:
        name: short, unique name.
        shrunk: record of the smallest LoRA.
        by_class: scores by class on validation data.
        arguments: command arguments that read the run again; empty if unknown.
        report: ranks at the end.
        facts: key facts, such as base model, data and metrics.
        settings: configurations by name.
        history: (step, ranks) over training.
        log: the Trainer's log history.

    """

    name: str
    report: RankReport
    facts: dict[str, str] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    history: list[tuple[int, RankReport]] = field(default_factory=list)
    log: list[dict[str, float]] = field(default_factory=list)
    arguments: Sequence[str] = ()
    shrunk: Shrunk | None = None
    by_class: ByClass | None = None


def load_runs(sources: Iterable[str | os.PathLike[str]], *, base: str | os.PathLike[str] | None = None) -> list[Run]:
    """Load runs: of each folder, its own run or those in its subfolders; or any source of `read_updates`.

    Ranks are read if stored, else measured. A Trainer's output folder without an adapter stands for its last
    checkpoint.

    Args:
        sources: folders of runs and adapters, hub names of adapters, and single-file LoRAs;
            duplicates are read once.
        base: base model, against whose weights they are measured.

    Raises:
        ValueError: a source has no run or adapter, or is refused by `read_updates`.

    """
    names: dict[str, str] = {}
    for location in sources:
        source = os.fspath(location)
        path = Path(source).resolve()
        if folders := _adapters_below(Path(source)):
            names |= {str(run): f"{path.name}: {run.name}" for run in folders}
        else:
            names[source] = path.stem if path.is_file() else path.name if path.is_dir() else source
    is_clear = len(set(names.values())) == len(names)
    return [load_run(source, name if is_clear else source, base=base) for source, name in names.items()]


def load_run(
    source: str,
    name: str,
    metrics: dict[str, float] | None = None,
    *,
    base: str | os.PathLike[str] | None = None,
) -> Run:
    """Load one run: from a folder, or any source of `read_updates`.

    Args:
        source: folder, file, or hub name.
        name: name of the run.
        metrics: metrics of the run, if not yet saved.
        base: base model.

    """
    folder = Path(source)
    checkpoint = last_whole_checkpoint(folder) if folder.is_dir() else None
    adapter = None if folder.is_file() else SavedAdapter.read(_adapter_of(folder, checkpoint))
    # Prefer stored ranks: measuring a large model takes long.
    stored = folder / REPORT_FILE
    updates = None if stored.exists() else read_updates(adapter or source, base=base)
    report = RankReport.from_json(stored) if updates is None else rank_report(updates, progressbar=True)
    result = Run(name, report)
    if adapter is not None:
        _add_training(result, folder, adapter, checkpoint, metrics)
    elif updates is not None:
        result.facts = {"method": updates.method, "adapted modules": str(len(updates))}
        if base is not None:
            result.facts["base model"] = os.fspath(base)
    if updates is not None and updates.notes:
        result.facts["note"] = " ".join(updates.notes)
    result.facts = {label: _without_home(fact) for label, fact in result.facts.items()}
    location = source if adapter is None else adapter.name
    result.arguments = (location,) if base is None else (location, "--base", os.fspath(base))
    return result


def _add_training(
    result: Run, folder: Path, adapter: SavedAdapter, checkpoint: Path | None, metrics: dict[str, float] | None
) -> None:
    """Add the training data in a run's folder and its last checkpoint."""
    state = _read((checkpoint or folder) / STATE_FILE, State)
    log = _read(folder / LOG_FILE, list[LogEntry]) or state.get("log_history", [])
    adapter_config = json.loads(json.dumps(adapter.config.to_dict(), default=_plain))
    record = read_record(folder) if (folder / RUN_FILE).exists() else None
    result.history, result.log = read_history(folder / HISTORY_FILE), log
    result.shrunk, result.by_class = read_shrunk(folder), read_by_class(folder)
    config = record.config | {"output": str(folder)} if record else {}
    steps = max((entry["step"] for entry in log if "step" in entry), default=None)
    result.facts = {"method": method_name(adapter.config)} | {
        label: str(value)
        for label, value in (
            ("base model", config.get("model") or adapter_config.get("base_model_name_or_path")),
            ("data", config.get("data")),
            ("task", config.get("task") or adapter_config.get("task_type")),
            ("prompts", PROMPTS.get(record.rendering or "") if record else None),
            ("ranks", _how_learned(config, result, steps)),
            ("worth of φ", read_straightened(folder)),
            ("rank of BA", _ranks(result.report) or adapter_config.get("r")),
            ("adapted modules", len(result.report.rows)),
            ("learning rate", _rate(record) if record else None),
            ("steps", steps),
        )
        if value is not None
    }
    metrics = metrics or _read(folder / METRICS_FILE, dict[str, float | bool])
    measured = shown_metrics(metrics)
    if measured:
        # The metrics of `lrlora train` selected the checkpoint; those of a test set did not.
        where = f"validation, {which_checkpoint(record.config)}" if record else "test"
        guess = guess_in(metrics)
        result.facts[where] = ", ".join(
            f"{name} {value:.4g}" + (f" (guessing {guess[name]:.4g})" if name in guess else "")
            for name, value in measured.items()
        )
    settings = {"adapter": adapter_config, "training": config, "versions": record.versions if record else None}
    result.settings = {label: content for label, content in settings.items() if content}


def _rate(record: RunRecord) -> str | None:
    """Peak learning rate that was found or given; None for the default."""
    if record.found_rate is not None:
        return f"{record.found_rate:g}, found"
    given = record.config.get("learning_rate")
    return None if given is None else f"{given:g}"


def _how_learned(config: dict[str, Any], run: Run, steps: int | None) -> str | None:
    """How the ranks of a run were learned; None if they were not."""
    size, cut_at = config.get("size"), config.get("cut_at")
    if (size is None and cut_at is None) or config.get("method") != "lora":
        return None
    wide = config.get("rank") or (WIDE_RANK if size is None else Size.parse(size).wide_rank)
    keep = None if run.shrunk is None or run.shrunk.step is None else run.shrunk.keep
    is_short = steps is not None and steps < FEWEST_STEPS  # it has one rank, that of its size
    if (size is None and keep is None) or (
        size is not None and (is_short or {row.r for row in run.report.rows} == {wide})
    ):
        return None
    parameters = sum((row.r or 0) * (row.m + row.n) for row in run.report.rows)
    goal = size or f"{keep:.4g} of the gain then"
    return (
        f"fitted: LoRA r = {wide}, cut after {cut_at or CUT_AT:.0%} of the steps to {parameters:,} parameters ({goal})"
    )


# Rendering of a run's prompts → description.
PROMPTS = {CHAT: "chats, rendered with the tokenizer's template", PLAIN: "plain text, without a template"}


def _adapter_of(folder: Path, checkpoint: Path | None) -> str:
    """Location of a run's adapter: its folder, else its last checkpoint."""
    return str(folder if checkpoint is None or (folder / _ADAPTER_CONFIG).exists() else checkpoint)


def _adapters_below(folder: Path) -> list[Path]:
    """Subfolders with adapters of a folder that has none and is not a Trainer's."""
    if not folder.is_dir() or (folder / _ADAPTER_CONFIG).exists() or last_whole_checkpoint(folder) is not None:
        return []
    return sorted(path.parent for path in folder.glob(f"*/{_ADAPTER_CONFIG}"))


def _without_home(value: str) -> str:
    home = f"{Path.home()}/"
    return f"~/{value.removeprefix(home)}" if len(home) > 2 and value.startswith(home) else value


def _plain(value: Any) -> Any:
    return sorted(value) if isinstance(value, (set, frozenset)) else str(value)


def _ranks(report: RankReport) -> str | None:
    """Trained rank of the modules, from the smallest to the largest; None if the method has none."""
    ranks = sorted({row.r for row in report.rows if row.r is not None})
    return f"{ranks[0]} to {ranks[-1]}" if len(ranks) > 1 else None


def _read(path: Path, kind: Any) -> Any:
    """Content of a JSON file; empty if missing."""
    return read_json(path, kind, "Remove it to show the run without it.") if path.exists() else {}
