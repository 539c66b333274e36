"""Runs in the format of PEFT's method comparison, one JSON file each, for submission there.

PEFT's own (its folder method_comparison) samples the reserved memory at each step: the mean and the 99th percentile
here are its peak. Runs without a GPU have no memory value, and PEFT's tables cannot include them.
"""

from __future__ import annotations

import platform
from pathlib import Path
from typing import Any

from lrlora.files import write_json

from .jobs import Comparison, Record
from .tables import final_runs

FOLDER = "peft"
_NOT_USED = {"bitsandbytes": None}  # PEFT's tables require its version


def write_peft_results(comparison: Comparison, records: dict[str, Record], output: Path) -> None:
    """Write METHOD--TASK-SEED.json for each final run; skips older runs without sizes."""
    for runs in final_runs(records).values():
        for run in runs:
            if "train_tokens" in run:
                (output / FOLDER).mkdir(exist_ok=True)
                name = f"{run['method']}--{run['task']}-seed{run['seed']}.json".replace("/", "-")
                write_json(output / FOLDER / name, _result(comparison, run))


def _result(comparison: Comparison, run: Record) -> dict[str, Any]:
    definition = comparison.definition
    task = definition.training_tasks[run["task"]]
    memory, reserved = (round(run[name] * 2**20) if run["on_gpu"] else None for name in ("peak_mib", "reserved_mib"))
    metrics = {
        "step": task.steps,
        **{f"valid {name}": value for name, value in run["validation"].items()},
        **{f"test {name}": value for name, value in run["test"].items()},
        "train loss": run["train_loss"],
        "train samples": task.steps * task.batch_size,
        "train total tokens": run["train_tokens"],
    }
    return {
        "run_info": {
            "created_at": run["finished"],
            "total_time": run["wall"],
            "experiment_name": f"{run['method']}/{run['task']}-seed{run['seed']}",
            "peft_branch": None,
            "train_config": {
                "model_id": definition.model,
                "dtype": run["dtype"],
                "max_seq_length": task.max_length,
                "batch_size": task.batch_size,
                "max_steps": task.steps,
                "seed": run["seed"],
                "optimizer_type": "AdamW",
                "optimizer_kwargs": {
                    "lr": run["learning_rate"],
                    "weight_decay": definition.training.get("weight_decay", 0.0),
                },
                "lr_scheduler": definition.training.get("lr_scheduler_type", "linear"),
                "use_amp": bool(definition.training.get("bf16")),
            },
            "peft_config": run["peft_config"],
            "error_msg": "",
        },
        "train_info": {
            "accelerator_memory_reserved_avg": reserved,
            "accelerator_memory_max": memory,
            "accelerator_memory_reserved_99th": reserved,
            "train_time": run["seconds"] * task.steps,
            "file_size": run["file_size"],
            "num_trainable_params": run["trainable"],
            "num_total_params": run["parameters"],
            "status": "success",
            "metrics": [metrics],
        },
        "meta_info": {
            "model_info": {"sha": run["revision"], "created_at": None},
            "dataset_info": {task.data: {"sha": None, "created_at": None}},
            "package_info": {f"{name}-version": version for name, version in {**_NOT_USED, **run["versions"]}.items()},
            "system_info": {
                "system": platform.system(),
                "machine": platform.machine(),
                "gpu": run["hardware"] if run["on_gpu"] else None,
            },
            "pytorch_info": None,
        },
    }
