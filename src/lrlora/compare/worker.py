"""One job of a comparison, in a process of its own: python -m lrlora.compare.worker SUITE REQUEST RESULT."""

from __future__ import annotations

import json
import resource
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import transformers

from ..rank import RankReport
from ..training.config import FROM_TRAIN, TrainConfig
from ..training.inference import evaluate
from ..training.train import rank_report_of, train
from .jobs import TUNING_SEED
from .methods import find_method
from .suites import Suite


def run_job(suite: Suite, request: dict[str, Any]) -> dict[str, Any]:
    """Train, validate, and, unless the job only tunes, test.

    Args:
        suite: of the comparison.
        request: the fields of `Job`, and `rank`.

    Returns:
        The request with what came out: `seconds` of training, `peak_mib` of the process, `trainable` parameters,
        `validation` and `test` metrics (None for a tuning run), and the learned `ranks` of methods that have them.

    """
    method = find_method(request["method"])
    task = suite.tasks[request["task"]]
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "run"
        config = TrainConfig(
            model=suite.model,
            data=task.data,
            task=task.kind,
            method=method.train,
            output=str(folder),
            columns=task.columns,
            validation=FROM_TRAIN,
            train_examples=task.train_examples,
            validation_examples=task.validation_examples,
            max_length=task.max_length,
            head_learning_rate=task.head_learning_rate,
            rank_every=task.steps,
            seed=request["seed"],
            adapter=method.adapter(request["rank"]),
            training={
                "max_steps": task.steps,
                "per_device_train_batch_size": task.batch_size,
                "learning_rate": request["learning_rate"],
                "eval_strategy": "no",
                "save_strategy": "no",
                "load_best_model_at_end": False,
            },
        )
        result = train(config)
        seconds = next(entry["train_runtime"] for entry in reversed(result.log_history) if "train_runtime" in entry)
        test = None
        if request["seed"] != TUNING_SEED:
            test = evaluate(folder, task.data, split=task.test, limit=task.test_examples)
        return {
            **request,
            "seconds": seconds,
            "peak_mib": _peak_mib(),
            "trainable": sum(p.numel() for p in result.model.parameters() if p.requires_grad),
            "validation": result.metrics,
            "test": test,
            "ranks": _ranks(rank_report_of(folder)),
        }


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


def main() -> None:
    """Read the request, write the result; what goes wrong is the last line that is printed."""
    transformers.logging.set_verbosity_error()
    suite, request, path = Suite.from_dict(json.loads(sys.argv[1])), json.loads(sys.argv[2]), Path(sys.argv[3])
    try:
        result = run_job(suite, request)
    except (ValueError, OSError, RuntimeError, ImportError) as error:
        print(f"{type(error).__name__}: {' '.join(str(error).split())}", flush=True)
        raise SystemExit(1) from None
    path.write_text(json.dumps(result), encoding="utf-8")


if __name__ == "__main__":
    main()
