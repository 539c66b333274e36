"""Size against accuracy: factors closed by the rank penalty, beside LoRA at several ranks and AdaLoRA.

    OMP_NUM_THREADS=1 python benchmarks/gates.py     # about an hour of one core; start it once per core
    python benchmarks/gates.py --report              # only render docs/settings.md from the stored results

Movie reviews, MiniLM, 200 steps of 16 at one learning rate, that which suits LoRA (docs/phi.md); AdaLoRA, which learns
nothing at it, at the best of four. Finished runs are not repeated.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import replace
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

DOCS = Path(__file__).parents[1] / "docs"
sys.path.insert(0, str(DOCS))

from matplotlib.figure import Figure  # noqa: E402
from sections import table, with_section  # noqa: E402

from lrlora.compare import Comparison, run_comparison  # noqa: E402
from lrlora.compare.jobs import TUNING_SEED, read_records  # noqa: E402
from lrlora.compare.methods import find_method  # noqa: E402

PAGE, STORED, WORK = DOCS / "settings.md", DOCS / "gates.jsonl", Path("lrlora-gates")
PICTURE = DOCS / "gates.png"
TASK, METRIC = "movie-reviews", "accuracy"
PENALTIES = (0.2, 0.5, 1.0)
COMPARISON = Comparison(
    "offline-nlu",
    (
        *("lora+r=1", "lora+r=2", "lora+r=4", "lora", "lora+r=16", "lr-lora"),
        *(f"lr-lora+rank_penalty={penalty}" for penalty in PENALTIES),
    ),
    seeds=2,
    rank=8,
    tasks=(TASK,),
    rates=(2e-3,),
)


# Its factors start from an orthogonal triple and not from LoRA's A: it wants a far higher rate.
ADALORA = replace(COMPARISON, methods=("adalora",), rates=(2e-3, 8e-3, 16e-3, 32e-3))


def store() -> None:
    """Keep what the table needs of the finished runs; the tuning seed is one more, its test data unread."""
    kept = []
    records = read_records(WORK)
    for record in [*COMPARISON.select(records).values(), *ADALORA.select(records).values()]:
        if record["seed"] == TUNING_SEED or record.get("failure"):
            continue
        active = [row["active_factors"] for row in record.pop("ranks") or []]
        kept.append(record | {"active": fmean(active) if active else None})
    STORED.write_text("".join(json.dumps(record) + "\n" for record in kept), encoding="utf-8")


def read_runs() -> dict[str, list[dict[str, Any]]]:
    """The stored runs by method, those with two seeds."""
    runs: dict[str, list[dict[str, Any]]] = {}
    for line in STORED.read_text(encoding="utf-8").splitlines():
        record = json.loads(line)
        runs.setdefault(record["method"], []).append(record)
    methods = (*COMPARISON.methods, *ADALORA.methods)
    return {method: runs[method] for method in methods if len(runs.get(method, [])) >= 2}


def draw() -> None:
    """Accuracy against parameters, a line for LoRA at several ranks and one for the gates."""
    runs = read_runs()
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for name, colour, methods in (
        ("LoRA, r = 1 to 16", "#0072B2", [m for m in runs if m.split("+")[0] == "lora"]),
        ("LR-LoRA, r = 8, gates closed by λ = 0 to 1", "#D55E00", [m for m in runs if m.split("+")[0] == "lr-lora"]),
        ("AdaLoRA, 12 to 8", "#009E73", list(ADALORA.methods)),
    ):
        points = sorted(
            (fmean(run["trainable"] for run in runs[m]), [100 * run["test"][METRIC] for run in runs[m]])
            for m in methods
        )
        sizes, means = [size for size, _ in points], [fmean(scores) for _, scores in points]
        axes.errorbar(sizes, means, [stdev(s) for _, s in points], color=colour, marker="o", capsize=3, label=name)
    axes.set_xscale("log")
    axes.set_xlabel("trainable parameters, with the head's")
    axes.set_ylabel("test accuracy, %: mean ± std of two seeds")
    axes.legend()
    figure.savefig(PICTURE, dpi=110)


def render() -> str:
    """The table."""
    rows = []
    for method, mine in read_runs().items():
        scores = [100 * run["test"][METRIC] for run in mine]
        active = fmean(run["active"] for run in mine) if mine[0]["active"] is not None else None
        rows.append(
            [
                find_method(method).name,
                f"{fmean(run['trainable'] for run in mine):,.0f}",
                "" if active is None else f"{active:.1f}",
                f"{fmean(scores):.1f} ± {stdev(scores):.1f}",
                f"{fmean(run['validation']['loss'] for run in mine):.3f}",
            ]
        )
    header = ["", "parameters", "factors in a module", "test accuracy, %", "validation loss"]
    return table(header, rows)


def updated(page: str) -> str:
    """The page with the table of the stored results."""
    return with_section(page, "gates", render())


def main() -> None:
    """Measure, store, report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--report", action="store_true", help="only render docs/settings.md from the stored results")
    if not parser.parse_args().report:
        for comparison in (COMPARISON, ADALORA):
            run_comparison(comparison, WORK)
        store()
    draw()
    PAGE.write_text(updated(PAGE.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
