"""Report on capacity tasks: losses, LoRA-equivalent ranks, and learned rank by demand."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, LogLocator, NullFormatter

from lrlora.checks import in_markdown
from lrlora.files import write_whole

from .figures import save_figure, with_legend
from .jobs import Comparison, Record, read_records
from .statistics import equivalent_rank
from .tables import failure_line, final_runs, markdown, ratio, same_hardware

LORA = "LoRA"  # label of the curve that the others are compared with


def family(label: str) -> str:
    """Label without rank and terms, the variables of a curve."""
    return ", ".join(part for part in label.split(", ") if part.partition("=")[0] not in ("r", "num_terms"))


def served_rank(runs: Sequence[Record]) -> int | None:
    """Rank of the equivalent plain LoRA, of fitted ranks the largest, which some servers reserve for every module."""
    run = runs[0]
    if run["learns_ranks"]:
        return max(row["r"] for run in runs for row in run["ranks"])
    if run["terms"]:
        return round(run["r"] * run["terms"])
    return run["r"] if run["train"] == "lora" else None


def by_seed(runs: Sequence[Record]) -> dict[int, float]:
    """Seed → test loss."""
    return {run["seed"]: run["test"]["loss"] for run in runs}


def losses(records: Mapping[str, Record], task: str) -> pd.DataFrame:
    """One row per method on a task: size, tuned setting, loss, and LoRA's r at equal loss."""
    cells = [runs for (other, _), runs in final_runs(records).items() if other == task]
    lora = {runs[0]["r"]: runs for runs in cells if runs[0]["is_plain_lora"]}
    curve = {r: by_seed(runs) for r, runs in lora.items()}
    rows: list[dict[str, Any]] = []
    for runs in cells:
        values, r = list(by_seed(runs).values()), runs[0]["r"]
        base = lora.get(r, []) if r else []
        equal = equivalent_rank(curve, by_seed(runs)) if len(curve) > 1 and runs not in lora.values() else None
        rows.append(
            {
                "method": family(runs[0]["label"]),
                "r": r,
                "rank when served": served_rank(runs),
                "parameters": runs[0]["trainable"],
                "rate": runs[0]["learning_rate"],
                "scale": runs[0].get("scale", 1.0),
                "seeds": len(runs),
                "loss (nats)": fmean(values),
                "std": stdev(values) if len(values) > 1 else math.nan,
                "LoRA's r for this loss": equal,
                "seconds": _mean(run["seconds"] for run in runs),
                "step": ratio(runs, base, "seconds") if same_hardware(runs, base) else math.nan,
                "terms": _mean(run["terms"] for run in runs),
                "stable rank": _mean(row["stable_rank"] for run in runs for row in run["ranks"] or ()),
            }
        )
        if all("base" in run["test"] for run in runs):
            rows[-1]["loss on English"] = fmean(run["test"]["base"] for run in runs)
        if "recalled" in runs[0]["test"]:  # phone-book task
            rows[-1]["recalled"] = f"{100 * fmean(run['test']['recalled'] for run in runs):.1f} %"
    order = list(dict.fromkeys(row["method"] for row in rows))
    order.sort(key=lambda name: name != LORA)
    rows.sort(key=lambda row: (order.index(row["method"]), row["parameters"]))
    return pd.DataFrame(rows)


def curves_figure(tables: Mapping[str, pd.DataFrame]) -> Figure:
    """Loss by trainable parameters and by processor time per step; takes task → `losses`."""
    figure = Figure(figsize=(4.5 * len(tables) + 2, 6.5), layout="constrained")
    grid = figure.subplots(2, len(tables), squeeze=False)
    names = list(dict.fromkeys(name for frame in tables.values() for name in frame["method"]))
    for (task, frame), (upper, lower) in zip(tables.items(), grid.T, strict=True):
        for name, runs in frame.groupby("method", sort=False):
            index = names.index(name)
            style = {"color": f"C{index % 10}", "marker": "osD^v"[index // 10], "capsize": 2, "label": str(name)}
            ordered = runs.sort_values("parameters")
            upper.errorbar(ordered["parameters"], ordered["loss (nats)"], ordered["std"], **style)
            lower.errorbar(ordered["seconds"], ordered["loss (nats)"], ordered["std"], linestyle="", **style)
        upper.set(xscale="log", xlabel="trainable parameters", title=task)
        upper.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        upper.xaxis.set_major_formatter(EngFormatter(sep=""))
        upper.xaxis.set_minor_formatter(NullFormatter())
        lower.set(xlabel="processor time of a training step, s")
        lower.set_xlim(0, 1.1 * frame["seconds"].max())
    for row in grid:
        row[0].set_ylabel("loss, nats")
    return with_legend(figure)


def _mean(values: Iterable[float | None]) -> float:
    known = [value for value in values if value is not None]
    return fmean(known) if known else math.nan


def write_capacity_report(comparison: Comparison, output: Path) -> Path:
    """Write `report.md` and figures from all finished jobs of a folder, of any call.

    Raises:
        ValueError: no job has finished.

    """
    records, tasks = read_records(output), comparison.definition.capacity_tasks
    if not records:
        raise ValueError(f"No job in {output} is finished, so there is nothing to report.")
    records = comparison.of_all(records).select(records)
    frames = {task: losses(records, task) for task in tasks}
    tables = {task: frame for task, frame in frames.items() if len(frame)}
    parts = [f"# {in_markdown(comparison.suite)}\n"]
    if tables:
        parts.append("\n![Loss against parameters and time](curves.png)\n")
        # Two ranks of LoRA are not a curve.
        curves = {task: frame for task, frame in tables.items() if (frame["method"] == LORA).sum() > 2}
        save_figure(curves_figure(curves or tables), output / "curves.png")
    for task, frame in tables.items():
        parts += [f"\n## {in_markdown(task)}\n", markdown(frame.drop(columns="seconds"))]
    if failures := [record for record in records.values() if record.get("failure")]:
        parts.append("\n## What failed\n\nA method on a task has no row where a final run failed.\n")
        parts += map(failure_line, failures)
    path = output / "report.md"
    write_whole(path, "\n".join(parts) + "\n")
    return path
