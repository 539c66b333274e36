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
from lrlora.tuner import LrLoraConfig

from .figures import save_figure, with_legend
from .jobs import Comparison, Record, read_records
from .methods import METHODS, find_method
from .statistics import equivalent_rank
from .tables import failure_line, final_runs, markdown, ratio, same_hardware

LORA = METHODS["lora"].name
Cells = Mapping[tuple[str, str], Sequence[Record]]


def family(method: str) -> str:
    """Name of a method without rank and terms, the variables of a curve."""
    name, *options = method.split("+")
    kept = [option for option in options if option.partition("=")[0] not in ("r", "num_terms")]
    return find_method("+".join([name, *kept])).name


def rank_of(method: str, rank: int) -> int | None:
    """Rank r of BA in a comparison at `rank`, of learned ranks that of their size; None for full fine-tuning."""
    known = find_method(method)
    return known.options.get("r", rank) if known.learns_ranks else known.adapter(rank).get("r")


def served_rank(method: str, rank: int) -> int | None:
    """Rank of the equivalent plain LoRA; None if not known in advance."""
    known, r = find_method(method), rank_of(method, rank)
    if known.learns_ranks:
        return None
    options = known.adapter(rank)
    if options.get("form") == "expansion":
        return r * options.get("num_terms", LrLoraConfig.num_terms) if r else None
    return r if known.train == "lora" else None


def _terms(method: str) -> int | None:
    """Q of a uniform expansion."""
    options = find_method(method).options
    return options.get("num_terms", LrLoraConfig.num_terms) if options.get("form") == "expansion" else None


def _largest(runs: Sequence[Record]) -> int | None:
    """Largest learned rank of plain LoRAs, which some servers reserve for every module."""
    if not find_method(runs[0]["method"]).learns_ranks:
        return None
    return max(row["r"] for run in runs for row in run["ranks"])


def by_seed(runs: Sequence[Record]) -> dict[int, float]:
    """Seed → test loss."""
    return {run["seed"]: run["test"]["loss"] for run in runs}


def _plain_lora(cells: Cells, task: str, rank: int) -> dict[int, Sequence[Record]]:
    """Runs of plain LoRA by r."""
    found = {}
    for (other, method), runs in cells.items():
        known, r = find_method(method), rank_of(method, rank)
        if other == task and known.train == "lora" and not known.learns_ranks and set(known.options) <= {"r"} and r:
            found[r] = runs
    return found


def losses(records: Mapping[str, Record], task: str, rank: int) -> pd.DataFrame:
    """One row per method: size, tuned setting, loss, and LoRA's r at equal loss.

    Args:
        records: of a comparison.
        task: one of its tasks.
        rank: the comparison's rank, for method names without one.

    """
    cells = final_runs(records)
    lora = _plain_lora(cells, task, rank)
    curve = {r: by_seed(runs) for r, runs in lora.items()}
    rows: list[dict[str, Any]] = []
    for (other, method), runs in cells.items():
        if other != task:
            continue
        values, r = list(by_seed(runs).values()), rank_of(method, rank)
        base = lora.get(r, []) if r else []
        equal = equivalent_rank(curve, by_seed(runs)) if len(curve) > 1 and runs not in lora.values() else None
        rows.append(
            {
                "method": family(method),
                "r": r,
                "rank when served": served_rank(method, rank) or _largest(runs),
                "parameters": runs[0]["trainable"],
                "rate": runs[0]["learning_rate"],
                "scale": runs[0].get("scale", 1.0),
                "seeds": len(runs),
                "loss (nats)": fmean(values),
                "std": stdev(values) if len(values) > 1 else math.nan,
                "LoRA's r for this loss": equal,
                "seconds": _mean(run["seconds"] for run in runs),
                "step": ratio(runs, base, "seconds") if same_hardware(runs, base) else math.nan,
                "terms": _mean(run.get("terms", _terms(method)) for run in runs),
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
    frames = {task: losses(records, task, comparison.r) for task in tasks}
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
