"""One job of a comparison, in a process of its own: python -m lrlora.compare.worker SUITE REQUEST RESULT."""

from __future__ import annotations

import json
import math
import os
import platform
import resource
import sys
import tempfile
import threading
from pathlib import Path
from typing import Any

import torch
import transformers

from ..rank import RankReport
from ..training.inference import evaluate
from ..training.train import Interrupted, rank_report_of, train
from .capacity import CapacityTask, train_capacity
from .jobs import FAILED, TUNING_SEED, train_config
from .methods import find_method
from .suites import Suite


def run_job(suite: Suite, request: dict[str, Any]) -> dict[str, Any]:
    """Train, validate, and, unless the job only tunes, test.

    Args:
        suite: of the comparison.
        request: the fields of `Job`, and `rank`.

    Returns:
        The request with what came out: `seconds` of a training step (on a CPU, processor time) on what
        `hardware`, `peak_mib` of the
        process, `trainable` parameters (less those of closed factors), `validation` and `test` metrics (None for a
        tuning run), the `criterion` of the rate, and the learned `ranks` of methods that have them.

    Raises:
        ValueError: the job cannot work, or training diverged.

    """
    method, task = find_method(request["method"]), suite.tasks[request["task"]]
    if isinstance(task, CapacityTask):
        options = method.adapter(request["rank"], request["scale"])
        found = train_capacity(task, method, options, learning_rate=request["learning_rate"], seed=request["seed"])
        measured = {"hardware": _hardware(), "peak_mib": _peak_mib(), "ranks": _ranks(found.pop("ranks"))}
        return {**request, **found, **measured}
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "run"
        config = train_config(
            suite, request["task"], method, request["learning_rate"], request["seed"], request["rank"], folder
        )
        result = train(config)
        criterion = result.metrics[task.criterion]
        _check_finite(criterion, "validation loss")
        record = {
            **request,
            "seconds": result.seconds_per_step,
            "hardware": _hardware(),
            "peak_mib": _peak_mib(),
            "trainable": sum(p.numel() for p in result.model.parameters() if p.requires_grad),
            "validation": result.metrics,
            "criterion": criterion,
            "ranks": _ranks(rank_report_of(folder)) if method.has_ranks else None,
            "test": None,
        }
        if request["seed"] != TUNING_SEED:
            record["test"] = evaluate(folder, task.data, split=task.test, limit=task.test_examples)
            _check_finite(record["test"][task.criterion], "test loss")
        return record


def _check_finite(value: float, name: str) -> None:
    if not math.isfinite(value):
        raise ValueError(f"Training has diverged: the {name} is not finite.")


def _hardware() -> str:
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return f"{platform.machine()}, {torch.backends.cpu.get_cpu_capability()}"


def _peak_mib() -> float:
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**20
    scale = 2**20 if sys.platform == "darwin" else 2**10  # bytes there, kilobytes elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / scale


def _ranks(report: RankReport | None) -> list[dict[str, Any]] | None:
    if report is None:
        return None
    names = ("module", "type", "kind", "r", "active_factors", "stable_rank", "energy90_rank", "energy99_rank")
    return [{name: getattr(row, name) for name in names} for row in report.rows]


def _end_with_parent() -> None:
    sys.stdin.read()
    os._exit(1)


def main() -> None:
    """Read the request, write the result. What can never work ends with the status `FAILED` and says why."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    transformers.logging.set_verbosity_error()
    suite, request, path = Suite.from_dict(json.loads(sys.argv[1])), json.loads(sys.argv[2]), Path(sys.argv[3])
    try:
        result = run_job(suite, request)
    except ValueError as error:
        print(f"{' '.join(str(error).split())}", flush=True)
        raise SystemExit(FAILED) from None
    except (Interrupted, KeyboardInterrupt):
        print("Interrupted.", flush=True)
        raise SystemExit(130) from None
    path.write_text(json.dumps(result), encoding="utf-8")


if __name__ == "__main__":
    main()
