"""Fill paper.md, learning_rate.md and open studies from stored runs: python docs/update_studies.py."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from functools import cache
from pathlib import Path
from statistics import fmean
from typing import Any

from lrlora_lab import finder, kinds, results
from lrlora_lab.figures import save_figure
from lrlora_lab.jobs import read_comparison, read_records
from lrlora_lab.sections import table, with_section
from lrlora_lab.statistics import paired_difference
from lrlora_lab.tables import final_runs, fitted_ranks

ROOT = Path(__file__).parents[1]
STUDIES = ROOT / "lab" / "studies"
Losses = dict[int, float]  # test loss by seed


@cache
def _stored(study: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (STUDIES / f"{study}.jsonl").read_text(encoding="utf-8").splitlines()]


@cache
def _chosen() -> dict[str, Any]:
    """Jobs of the suite "capacity", each method at its own rate and scale."""
    folder = ROOT / "docs" / "compare" / "capacity"
    records = read_records(folder)
    return read_comparison("capacity", folder).of_all(records).select(records)


def difference(losses: Losses, others: Losses) -> str:
    """Mean paired difference with its 95 % interval."""
    seeds = sorted(losses.keys() & others.keys())
    paired = paired_difference([losses[seed] for seed in seeds], [others[seed] for seed in seeds])
    if paired is None:
        return ""
    return f"{paired.value:+.3f}" + ("" if math.isnan(paired.low) else f" ({paired.low:+.3f} to {paired.high:+.3f})")


def ranks() -> str:
    """Stable ranks of LoRA, φ and the paper's form on German."""
    methods = ("lora+r=4", "lr-lora+r=4", "paper+r=4")
    runs = {n: run for n, run in _chosen().items() if run["task"] == "german" and run["method"] in methods}
    rows = []
    for row in fitted_ranks(runs).to_dict("records"):
        gap = row["attention − MLP"]
        shares = (f"{row[name].value:.2f}" for name in ("share of layers", "share of types"))
        shown = f"{gap.value:+.2f} ({gap.low:+.2f} to {gap.high:+.2f})"
        rows.append([row["method"], f"{row['layers differ: p']:.4f}", *shares, shown])
    return table(["method", "layers differ: p", "share of layers", "share of types", "attention − MLP, ln"], rows)


# Title, task, method and its LoRA.
CLAIMS = [
    (f"{task}, r = {r}", task, f"lr-lora+r={r}", f"paper+r={r}", f"lora+r={r}")
    for task in ("labels", "picture-labels", "german")
    for r in (1, 4)
] + [
    ("phone book, SmolLM2, r = 1", "phone-book", "lr-lora+r=1", "paper+r=1+lora_alpha=0.25", "lora+r=1"),
    ("German, SmolLM2, r = 1", "smollm2-german", "lr-lora+r=1", "paper+r=1+lora_alpha=0.25", "lora+r=1"),
]


def claims() -> str:
    """LoRA's loss minus that of φ, the default at LoRA's and at its own settings, and the paper's form."""
    runs, rows = final_runs(_chosen()), []

    def at_loras_settings(task: str, method: str) -> Losses:
        cells = [run for run in _stored("unit_input") if (run["task"], run["method"]) == (task, method)]
        return {run["seed"]: run["test"] for run in cells if run["seed"] > 1}  # 1 chose c

    for title, task, ours, paper, lora in CLAIMS:
        r = title[-1]
        plain = "lora" if r == "4" else lora
        same = [at_loras_settings(f"{task}-r{r}", name) for name in (plain, plain.replace("lora", "lr-lora"))]
        tuned = [
            {run["seed"]: run["test"]["loss"] for run in runs.get((task, name), [])} for name in (lora, ours, paper)
        ]
        differences = (difference(*same), difference(*tuned[:2]), difference(tuned[0], tuned[2]))
        if any(differences):
            rows.append([title, f"{fmean(tuned[0].values()):.3f}", *differences])
    head = ["task", "LoRA's loss", "φ at LoRA's settings", "φ at its own", "the paper's form at its own"]
    return table(head, rows)


# Page → section → its table.
SECTIONS: dict[Path, dict[str, Callable[[], str]]] = {
    ROOT / "docs" / "paper.md": {"claims": claims, "ranks": ranks},
    ROOT / "docs" / "learning_rate.md": {
        "gate": lambda: finder.procedures(finder.Study(_stored("finder")), is_gate=True, are_seen_once=True),
        "kinds": lambda: kinds.kinds_table(_stored("kinds")),
    },
    ROOT / "docs" / "results.md": {
        "answers": lambda: results.results_table(_stored("results"), "smollm2", "answers", 300),
        "german": lambda: results.results_table(_stored("results"), "smollm2", "german", 300),
        "gemma": lambda: results.results_table(_stored("results"), "gemma", "german", 300),
        "german_60": lambda: results.results_table(_stored("results"), "smollm2", "german", 60),
        "german_1000": lambda: results.results_table(_stored("results"), "smollm2", "german", 1000),
    },
    STUDIES / "finder.md": {
        "grids": lambda: finder.grids(finder.Study(_stored("finder"))),
        "procedures": lambda: finder.procedures(finder.Study(_stored("finder")), is_gate=False),
        "gate": lambda: finder.procedures(finder.Study(_stored("finder")), is_gate=True),
        "once": lambda: finder.procedures(finder.Study(_stored("finder")), is_gate=True, are_seen_once=True),
    },
}


def updated(page: Path, text: str) -> str:
    """The page with its tables."""
    for name, make in SECTIONS[page].items():
        text = with_section(text, name, make())
    return text


if __name__ == "__main__":
    for page in SECTIONS:
        page.write_text(updated(page, page.read_text(encoding="utf-8")), encoding="utf-8")
    save_figure(finder.figure(finder.Study(_stored("finder"))), ROOT / "docs" / "finder.png")
    save_figure(results.lengths_figure(_stored("results"), "german"), ROOT / "docs" / "results.png")
