"""Runs a job of a comparison."""

from __future__ import annotations

import gc
import math
import platform
import resource
import shutil
import sys
import time
from dataclasses import replace
from datetime import datetime, timezone
from pathlib import Path
from statistics import fmean
from typing import Any

import torch

from lrlora.checks import require_known
from lrlora.ranks import RankReport
from lrlora.run_folder import RUN_FILE, read_record
from lrlora.train.inference import evaluate
from lrlora.train.progress import DivergedError
from lrlora.train.run import TrainResult, rank_report_of, train
from lrlora.train.settings import TrainConfig

from .capacity import CapacityTask, train_capacity
from .inputs import located
from .jobs import TUNING_SEED, train_config
from .methods import find_method
from .suite import Suite, Task


def run_job(suite: Suite, request: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Train, validate, and, unless the job only tunes, test.

    Args:
        suite: suite of the comparison.
        request: the fields of `Job`, and `rank`; others are passed on.
        folder: folder of the run; an interrupted run in it is resumed.

    Returns:
        The request with the results: `seconds` of a training step (on a CPU, processor time) on what `hardware`,
            `peak_mib` of the process, `trainable` parameters, sizes and versions, `validation` and `test` metrics (None
            for a tuning run), the `criterion` of the rate, and the learned `ranks` of methods that have them.

    Raises:
        DivergedError: a metric is not finite.
        ValueError: the job cannot work.

    """
    method, task = find_method(request["method"]), suite.tasks[request["task"]]
    if isinstance(task, CapacityTask):
        measured = train_capacity(
            task,
            method,
            request["rank"],
            request["scale"],
            learning_rate=request["learning_rate"],
            seed=request["seed"],
        )
        if request["seed"] == TUNING_SEED:
            measured["test"] = None
        measured |= {"hardware": _hardware(), "peak_mib": _peak_mib(), "ranks": ranks_of(measured["ranks"])}
        return {**request, **measured}
    config = train_config(
        suite, request["task"], method, request["learning_rate"], request["seed"], request["rank"], folder
    )
    config = replace(config, model=located(config.model), data=located(config.data))
    result = _trained(config)
    record = {
        **request,
        "seconds": result.seconds_per_step,
        "hardware": _hardware(),
        "peak_mib": _peak_mib(),
        "trainable": sum(p.numel() for p in result.model.parameters() if p.requires_grad),
        "versions": read_record(folder).versions,
        "finished": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "validation": result.metrics,
        "criterion": result.metrics[task.criterion],
        "ranks": ranks_of(rank_report_of(folder)) if method.has_ranks else None,
        "test": None,
        "examples": result.examples,
    }
    del result  # the test reloads the model, and one GPU may not fit two
    gc.collect()
    torch.cuda.empty_cache()
    if request["seed"] != TUNING_SEED:
        record["test"] = scores = _scores(folder, task)
        record["examples"] |= {"test": scores.pop("examples")}
        require_known(f"metric of {suite.model} on {request['task']}", task.metric, record["test"])
        if wrong := [name for name, value in record["test"].items() if not math.isfinite(value)]:
            raise DivergedError(f"Training has diverged: {' and '.join(wrong)} of the test is not finite.")
    return record


def _trained(config: TrainConfig) -> TrainResult:
    """Train; resume an interrupted run if possible."""
    folder = Path(config.output)
    if (folder / RUN_FILE).exists():
        try:
            return train(config, resume=True)
        except (ValueError, OSError) as error:
            print(f"Restarting the run: {error}")
    if folder.exists():
        shutil.rmtree(folder)
    return train(config)


def _scores(folder: Path, task: Task) -> dict[str, float]:
    """Metrics of a run on its test data and the number of examples; of several sets their means, and each one's own."""
    by_set = {
        data: evaluate(folder, located(data), split=split, limit=task.test_examples) for data, split in task.tests
    }
    if len(by_set) == 1:
        return next(iter(by_set.values()))
    names = next(iter(by_set.values()))
    means = {metric: fmean(metrics[metric] for metrics in by_set.values()) for metric in names}
    means["examples"] = sum(metrics.pop("examples") for metrics in by_set.values())
    return means | {
        f"{metric} of {name}": value for name, metrics in by_set.items() for metric, value in metrics.items()
    }


def _hardware() -> str:
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return f"{platform.machine()}, {torch.backends.cpu.get_cpu_capability()}"


def _peak_mib() -> float:
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**20
    scale = 2**20 if sys.platform == "darwin" else 2**10  # bytes there, kilobytes elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / scale


def ranks_of(report: RankReport | None) -> list[dict[str, Any]] | None:
    """Ranks of each module, as they are stored."""
    if report is None:
        return None
    names = ("module", "type", "kind", "r", "stable_rank", "effective_rank", "energy90_rank", "energy99_rank")
    return [{name: getattr(row, name) for name in names} for row in report.rows]


def record_of(suite: dict[str, Any], request: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Result of a job, or why it can never have one; see `run_job`."""
    started = time.monotonic()
    try:
        record = run_job(Suite.from_dict(suite), request, folder)
    except ValueError as error:
        record = {**request, "failure": " ".join(str(error).split()), "diverged": isinstance(error, DivergedError)}
    return record | {"wall": time.monotonic() - started}
