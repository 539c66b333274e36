"""What training left on disk: runs of `lrlora train`, of the demo, of anyone's Trainer, or a bare adapter."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from transformers.trainer_utils import get_last_checkpoint

from ..rank import RankReport, rank_report
from ..report.card import card_section
from ..report.figure import save_rank_figure
from ..report.page import Run
from ..tuner.skeleton import load_on_skeleton
from .callback import HISTORY_FILE, read_history
from .config import LOG_FILE, METRICS_FILE, REPORT_FILE, RUN_FILE

_ADAPTER_CONFIG = "adapter_config.json"
_DEMO_METHODS = ("lr-lora", "lora")
_TRAINER_STATE = "trainer_state.json"
PICTURE_FILE = "ranks.png"


def load_runs(sources: Iterable[str | os.PathLike[str]]) -> list[Run]:
    """Runs: of each folder the one in it, or the two of a demo's; or of an adapter in a folder or on the hub.

    Ranks are read where they were stored, else measured on the adapter, for which its base model is not needed. A
    Trainer's output folder without an adapter counts as its last checkpoint.

    Raises:
        ValueError: there is neither run nor adapter, or it is an adapter of another method than LR-LoRA and LoRA; or
            something is given twice.

    """
    names: dict[str, str] = {}
    for given in sources:
        source = os.fspath(given)
        folder = Path(source)
        methods = [method for method in _DEMO_METHODS if (folder / method / _ADAPTER_CONFIG).exists()]
        if not methods or (folder / _ADAPTER_CONFIG).exists():
            found = {source: folder.resolve().name if folder.is_dir() else source}
        else:
            found = {str(folder / method): f"{folder.resolve().name}: {method}" for method in methods}
        if twice := names.keys() & found.keys():
            raise ValueError(f"{', '.join(sorted(twice))} is given twice. Give every run once.")
        names |= found
    is_clear = len(set(names.values())) == len(names)
    return [_load(source, name if is_clear else source) for source, name in names.items()]


def complete_card(folder: Path) -> None:
    """Add what was trained, and with what result, to the model card of a finished run, with a picture of its ranks."""
    (run,) = load_runs([folder])
    save_rank_figure(run.report, folder / PICTURE_FILE, title=f"Learned ranks, {run.name}")
    card = folder / "README.md"
    text = card.read_text(encoding="utf-8").rstrip()
    partial = card.with_name(f"{card.name}.partial")
    partial.write_text(f"{text}\n\n{card_section(run, PICTURE_FILE)}", encoding="utf-8")
    partial.replace(card)


def _load(source: str, name: str) -> Run:
    folder = Path(source)
    checkpoint = get_last_checkpoint(source) if folder.is_dir() else None
    is_saved = (folder / _ADAPTER_CONFIG).exists()
    adapter = source if is_saved or checkpoint is None else checkpoint
    if (folder / REPORT_FILE).exists():
        report = RankReport.from_json(folder / REPORT_FILE)
    else:
        report = rank_report(load_on_skeleton(adapter), progressbar=True)
    state = _read(Path(checkpoint or folder) / _TRAINER_STATE)
    log = _read(folder / LOG_FILE) or state.get("log_history", [])
    adapter_config, run = _read(Path(adapter) / _ADAPTER_CONFIG), _read(folder / RUN_FILE)
    result = Run(name, report, history=read_history(folder / HISTORY_FILE), log=log)
    config = run.get("config", {})
    result.facts = {"method": _METHODS.get(adapter_config.get("peft_type", ""), "")} | {
        label: str(value).replace(str(Path.home()), "~")
        for label, value in (
            ("base model", config.get("model") or adapter_config.get("base_model_name_or_path")),
            ("data", config.get("data")),
            ("task", config.get("task") or adapter_config.get("task_type")),
            ("rank of BA", adapter_config.get("r")),
            ("adapted modules", len(report.rows)),
            ("steps", max((entry["step"] for entry in log if "step" in entry), default=None)),
        )
        if value is not None
    }
    result.facts |= {
        f"{label.removeprefix('eval_')}, held out": f"{value:.4g}"
        for label, value in _read(folder / METRICS_FILE).items()
        if label != "epoch"
    }
    settings = {"adapter": adapter_config, "training": run.get("config"), "versions": run.get("versions")}
    result.settings = {label: content for label, content in settings.items() if content}
    return result


_METHODS = {"LRLORA": "LR-LoRA", "LORA": "LoRA"}


def _read(path: Path) -> Any:
    """The content of a JSON file; nothing if there is none."""
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
