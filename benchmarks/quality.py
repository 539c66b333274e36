"""Time of each method to reach the final loss of LoRA of rank 8, on two tasks where rank is the bottleneck.

    lrlora compare benchmarks/quality.yaml --methods METHODS --seeds 1 --rank 8 --output FOLDER   # tunes the rates
    python benchmarks/quality.py FOLDER      # an hour on one core; resumes; --task NAME does one task alone
    python benchmarks/quality.py --report    # docs/speed.md from the stored results

METHODS are the comma-separated keys of `METHODS` below. Each method is trained with schedules of 1/8, 1/4, … 4 times
the steps, at the best rate for the usual number, until the longer one of two neighbors reaches the target loss. Steps
in between are interpolated logarithmically. Times are processor times.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

DOCS = Path(__file__).parents[1] / "docs"
sys.path.insert(0, str(DOCS))

from sections import table, with_section  # noqa: E402

from lrlora_lab.jobs import TUNING_SEED, best_trial, read_records  # noqa: E402
from lrlora_lab.methods import find_method  # noqa: E402
from lrlora_lab.suite import load_suite  # noqa: E402

PAGE, RESULTS = DOCS / "speed.md", DOCS / "speed"
SUITE = Path(__file__).with_suffix(".yaml")
TASKS = {"german": "German", "labels": "labels"}
METHODS = {
    "lora+r=8": "LoRA, r = 8",
    "lora+r=1": "LoRA, r = 1",
    "lora+r=32": "LoRA, r = 32",
    "expansion+r=8+num_terms=4": "expansion, r = 8, Q = 4",
    "lr-lora+r=8+lora_alpha=128": "LR-LoRA, r = 8",
    "dora+r=8": "DoRA, r = 8",
    "hira+r=8": "HiRA, r = 8",
    "randlora+r=8": "RandLoRA, r = 8",
    "full": "full fine-tuning of the same layers",
}
REFERENCE = "lora+r=8"
RANK = 8
FACTORS = (1 / 8, 1 / 4, 1 / 2, 1.0, 2.0, 4.0)  # multiples of the usual number of steps
USUAL = FACTORS.index(1.0)


def train_once(task_name: str, key: str, steps: int, learning_rate: float, scale: float) -> dict[str, Any]:
    """One training run."""
    from lrlora_lab.capacity import train_capacity

    task, method = load_suite(str(SUITE)).tasks[task_name], find_method(key)
    options = method.adapter(RANK, scale)
    found = train_capacity(replace(task, steps=steps), method, options, learning_rate=learning_rate, seed=1)
    seconds = steps * found["seconds"]
    return {"steps": steps, "loss": found["test"]["loss"], "seconds": seconds, "trainable": found["trainable"]}


def measure(folder: Path, task_name: str, results: Path) -> None:
    """Shortest training of every method that reaches the loss; results are saved as they come."""
    records = read_records(folder)
    usual = load_suite(str(SUITE)).tasks[task_name].steps
    tuned = {}
    for key in METHODS:
        trials = [r for r in records.values() if (r["task"], r["method"], r["seed"]) == (task_name, key, TUNING_SEED)]
        best = best_trial(trials)
        if best is None:
            raise ValueError(f"{folder} has no finished trial of {key} on {task_name}: run lrlora compare first.")
        tuned[key] = (best["learning_rate"], best.get("scale", 1.0))
    kept: dict[str, dict[str, Any]] = json.loads(results.read_text()) if results.exists() else {}

    def run(key: str, index: int) -> dict[str, Any]:
        steps = round(FACTORS[index] * usual)
        name = f"{task_name} {key} {steps}"
        if name not in kept:
            print(name, flush=True)
            kept[name] = {"task": task_name, "method": key, **train_once(task_name, key, steps, *tuned[key])}
            results.write_text(json.dumps(kept, indent=1) + "\n")
        return kept[name]

    target = run(REFERENCE, USUAL)["loss"]
    for key in METHODS:
        low, high = (-1, USUAL) if run(key, USUAL)["loss"] <= target else (USUAL, len(FACTORS))
        while high - low > 1:
            middle = (low + high) // 2
            if run(key, middle)["loss"] <= target:
                high = middle
            else:
                low = middle


def _interpolated(trained: list[dict[str, Any]], target: float) -> float:
    """Number of steps at which a method's loss is `target`, between the two adjacent runs."""
    longer = min((r for r in trained if r["loss"] <= target), key=lambda r: r["steps"])
    before = max((r for r in trained if r["steps"] < longer["steps"]), key=lambda r: r["steps"], default=longer)
    if before is longer:
        return longer["steps"]
    share = (before["loss"] - target) / (before["loss"] - longer["loss"])
    return before["steps"] * (longer["steps"] / before["steps"]) ** share


def render(records: dict[str, dict[str, Any]]) -> str:
    """The table."""
    rows = []
    for key, label in METHODS.items():
        row = [label]
        for task in TASKS:
            trained = [r for r in records.values() if (r["task"], r["method"]) == (task, key)]
            (usual,) = (r for r in trained if r["steps"] == load_suite(str(SUITE)).tasks[task].steps)
            (reference,) = (
                r for r in records.values() if (r["task"], r["method"], r["steps"]) == (task, REFERENCE, usual["steps"])
            )
            enough = [r for r in trained if r["loss"] <= reference["loss"]]
            loss = f"{usual['loss']:.3f}"
            if not enough:
                most = max(trained, key=lambda r: r["steps"])
                row += [f"> {most['steps']:,}", f"> {most['seconds'] / reference['seconds']:.1f}", loss]
                continue
            steps = _interpolated(trained, reference["loss"])
            seconds = steps * usual["seconds"] / usual["steps"]
            bound = "≤ " if steps == min(r["steps"] for r in trained) else ""
            row += [f"{bound}{steps:,.0f}", f"{bound}{seconds / reference['seconds']:.2f}", loss]
        rows.append(row)
    columns = ("steps", "time", "loss after LoRA's steps")
    heads = [f"{title}: {what}" for title in TASKS.values() for what in columns]
    return table(["", *heads], rows)


def updated(page: str) -> str:
    """Page with the table of the stored results."""
    stored = (json.loads((RESULTS / f"quality-{task}.json").read_text(encoding="utf-8")) for task in TASKS)
    return with_section(page, "quality", render({name: record for part in stored for name, record in part.items()}))


def main() -> None:
    """Measure, store, report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="?", help="of the comparison that has tuned the rates")
    parser.add_argument("--task", choices=TASKS, help="measure this task alone, and leave the page as it is")
    parser.add_argument("--report", action="store_true", help="only render docs/speed.md from the stored results")
    arguments = parser.parse_args()
    if not arguments.report:
        if arguments.folder is None:
            parser.error("name the output folder of lrlora compare")
        tasks = [arguments.task] if arguments.task else list(TASKS)
        for task in tasks:
            measure(arguments.folder, task, RESULTS / f"quality-{task}.json")
        if arguments.task:
            return
    PAGE.write_text(updated(PAGE.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
