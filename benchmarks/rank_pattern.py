"""Do LR-LoRA's learned ranks help plain LoRA? Comparison at equal parameters with LoRA of uniform rank.

    OMP_NUM_THREADS=1 python benchmarks/rank_pattern.py r8 movie-reviews     # about 15 minutes a task on one core
    python benchmarks/rank_pattern.py --report                               # only render docs/export.md

For each task, LR-LoRA is trained once, with a separate seed; its ranks are cut to the parameters of LoRA at r = 4, and
LoRA is trained with them and with uniform r = 4, with three other seeds. All at the best rate for LoRA (docs/phi.md).
Finished runs are skipped.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from statistics import fmean
from typing import Any

DOCS = Path(__file__).parents[1] / "docs"
sys.path.insert(0, str(DOCS))

from sections import table, with_section  # noqa: E402

PAGE, STORED = DOCS / "export.md", DOCS / "export"
SUITE, RANK, RATE, SEEDS = "offline-nlu", 4, 2e-3, (1, 2, 3)
UNIFORM, PATTERN = "lora", "learned"


def learn_ranks(task: str) -> dict[str, Any]:
    """LoRA configuration fields with the ranks that LR-LoRA learns on a task."""
    from lrlora.adapters import factorize, lora_config
    from lrlora.adapters.factorize import parameters_of_rank
    from lrlora.train.run import train
    from lrlora.train.settings import TrainConfig
    from lrlora_lab.suites import SUITES

    suite = SUITES[SUITE]
    settings = suite.tasks[task]
    with tempfile.TemporaryDirectory() as scratch:
        run = train(
            TrainConfig(
                suite.model,
                settings.data,
                settings.task,
                output=f"{scratch}/run",
                max_length=settings.max_length,
                head_learning_rate=settings.head_learning_rate,
                validation_examples=settings.validation_examples,
                rank_every=settings.steps,
                adapter={"r": 2 * RANK},
                training={
                    "max_steps": settings.steps,
                    "learning_rate": RATE,
                    "eval_strategy": "no",
                    "save_strategy": "no",
                    "load_best_model_at_end": False,
                },
            )
        )
        model: Any = run.model
        factors = factorize(model, budget=parameters_of_rank(model, RANK))
        config = lora_config(factors, model.peft_config["default"])
    names = ("r", "lora_alpha", "rank_pattern", "alpha_pattern")
    return {name: getattr(config, name) for name in names} | {"target_modules": sorted(config.target_modules)}


def measure(task: str) -> None:
    """Run a task's missing jobs."""
    from lrlora_lab.methods import METHODS, Method
    from lrlora_lab.suites import SUITES
    from lrlora_lab.worker import run_job

    path = STORED / f"rank_pattern-{task}.json"
    stored: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {"runs": []}
    if "ranks" not in stored:
        stored["ranks"] = learn_ranks(task)
        path.write_text(json.dumps(stored, indent=1) + "\n")
    METHODS[PATTERN] = Method("LoRA, learned ranks", "lora", stored["ranks"])
    for seed in SEEDS:
        for method in (UNIFORM, PATTERN):
            if any(run["method"] == method and run["seed"] == seed for run in stored["runs"]):
                continue
            request = {"task": task, "method": method, "learning_rate": RATE, "seed": seed, "rank": RANK}
            result = run_job(SUITES[SUITE], request)
            del result["ranks"], result["peak_mib"]
            stored["runs"].append(result)
            path.write_text(json.dumps(stored, indent=1) + "\n")


def render() -> str:
    """The table."""
    from lrlora_lab.statistics import paired_difference
    from lrlora_lab.suites import SUITES

    rows = []
    for path in sorted(STORED.glob("rank_pattern-*.json")):
        stored, task = json.loads(path.read_text(encoding="utf-8")), path.stem.removeprefix("rank_pattern-")
        metric = SUITES[SUITE].tasks[task].metric
        scores = {
            method: {run["seed"]: 100 * run["test"][metric] for run in stored["runs"] if run["method"] == method}
            for method in (UNIFORM, PATTERN)
        }
        if any(set(by_seed) != set(SEEDS) for by_seed in scores.values()):
            continue  # not finished
        uniform, learned = ([scores[method][seed] for seed in SEEDS] for method in (UNIFORM, PATTERN))
        difference = paired_difference(learned, uniform)
        given = stored["ranks"]
        ranks = [given["rank_pattern"].get(module, given["r"]) for module in given["target_modules"]]
        rows.append(
            [
                task,
                f"{len(ranks)} modules, {min(ranks)} to {max(ranks)}",
                f"{fmean(uniform):.1f}",
                f"{fmean(learned):.1f}",
                f"{difference.value:+.1f} ± {difference.standard_error:.1f} (p = {difference.p:.2f})"
                if difference
                else "",
            ]
        )
    return table(["task", "learned ranks", f"LoRA, r = {RANK}", "LoRA, learned ranks", "difference"], rows)


def updated(page: str) -> str:
    """Page with the table of the stored results."""
    return with_section(page, "rank-pattern", render())


def main() -> None:
    """Measure, store, report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tasks", nargs="*", help=f"of the suite {SUITE}")
    parser.add_argument("--report", action="store_true", help="only render docs/export.md from the stored results")
    for task in parser.parse_args().tasks:
        measure(task)
    PAGE.write_text(updated(PAGE.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
