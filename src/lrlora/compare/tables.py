"""The tables of a comparison, as pandas frames: tidy results, one row per cell, the tuning, and the learned ranks."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from statistics import fmean, stdev
from typing import Any

import numpy as np
import pandas as pd

from ..rank import layer_index
from .jobs import TUNING_SEED, Comparison, Record
from .methods import find_method
from .statistics import gap, holm, modules_differ, paired_difference, share_between_modules
from .suites import Task


def tidy(records: Mapping[str, Record]) -> pd.DataFrame:
    """Every finished job in one row, with its metrics in columns."""
    rows = []
    for record in records.values():
        row = {name: value for name, value in record.items() if name not in ("validation", "test", "ranks")}
        for split in ("validation", "test"):
            row |= {f"{split}_{name}": value for name, value in (record.get(split) or {}).items()}
        rows.append(row)
    return pd.DataFrame(rows)


def final_runs(records: Mapping[str, Record]) -> dict[tuple[str, str], list[Record]]:
    """(task, method) → its runs on test data, by seed; without cells that have none, or of which a run has failed."""
    cells: dict[tuple[str, str], list[Record]] = {}
    for record in records.values():
        if record["seed"] != TUNING_SEED:
            cells.setdefault((record["task"], record["method"]), []).append(record)
    return {
        cell: sorted(runs, key=lambda run: run["seed"])
        for cell, runs in cells.items()
        if not any(run.get("failure") for run in runs)
    }


def score(run: Record, task: Task) -> float:
    """The task's metric on test data, times 100."""
    return 100 * run["test"][task.metric]


def loss(run: Record, task: Task) -> float:
    """The criterion of learning rates on test data, times 100: finer than a share of right answers."""
    return 100 * run["test"][task.criterion]


def results(comparison: Comparison, records: Mapping[str, Record]) -> pd.DataFrame:
    """One row per task and method: mean and standard deviation over seeds, and the difference to the reference.

    p is of the paired t-test over seeds, and corrected for all comparisons of the table (Holm). Time and memory are
    relative to the reference, of the medians.
    """
    cells, tasks, reference = final_runs(records), comparison.definition.tasks, comparison.reference
    rows: list[dict[str, Any]] = []
    for (name, method), runs in cells.items():
        values = [score(run, tasks[name]) for run in runs]
        base = cells.get((name, reference), [])
        rows.append(
            {
                "task": name,
                "method": find_method(method).name,
                "rate": runs[0]["learning_rate"],
                "seeds": len(runs),
                "metric": tasks[name].metric,
                "mean": fmean(values),
                "std": stdev(values) if len(values) > 1 else math.nan,
                **_difference(runs, base if method != reference else [], tasks[name], score),
                "loss": fmean(loss(run, tasks[name]) for run in runs),
                "parameters": runs[0]["trainable"],
                "time": _ratio(runs, base, "seconds"),
                "memory": _ratio(runs, base, "peak_mib"),
                "stable rank": _mean_rank(runs, "stable_rank"),
                "energy-99 rank": _mean_rank(runs, "energy99_rank"),
            }
        )
    return _corrected(pd.DataFrame(rows))


def variants(comparison: Comparison, records: Mapping[str, Record]) -> pd.DataFrame:
    """What is LR-LoRA but for its φ (fixed, one for all, …) against LR-LoRA: paired differences of metric and loss."""
    cells, tasks = final_runs(records), comparison.definition.tasks
    rows = []
    for (name, method), runs in cells.items():
        base = cells.get((name, "lr-lora"))
        if base is None or method == "lr-lora" or find_method(method).train != "lr-lora":
            continue
        for measure in (score, loss):
            differences = _difference(runs, base, tasks[name], measure)
            kind = tasks[name].metric if measure is score else "loss"
            rows.append({"task": name, "method": find_method(method).name, "of": kind, **differences})
    return _corrected(pd.DataFrame(rows))


def _difference(
    runs: Sequence[Record], others: Sequence[Record], task: Task, measure: Callable[[Record, Task], float]
) -> dict[str, float]:
    """The columns of a difference, paired by seed; NaN with less than two pairs."""
    values, base = ({run["seed"]: measure(run, task) for run in cell} for cell in (runs, others))
    seeds = [seed for seed in values if seed in base]
    found = paired_difference([values[seed] for seed in seeds], [base[seed] for seed in seeds])
    columns = ("difference", "standard error", "from", "to", "p")
    if found is None:
        return dict.fromkeys(columns, math.nan)
    return dict(zip(columns, (found.value, found.standard_error, found.low, found.high, found.p), strict=True))


def _corrected(frame: pd.DataFrame) -> pd.DataFrame:
    if len(frame):
        known = frame["p"].notna()
        frame.loc[known, "p"] = holm(frame.loc[known, "p"].tolist())
    return frame


def _ratio(runs: Sequence[Record], others: Sequence[Record], name: str) -> float:
    if not others:
        return math.nan
    return float(np.median([run[name] for run in runs]) / np.median([run[name] for run in others]))


def _mean_rank(runs: Sequence[Record], measure: str) -> float:
    values = [row[measure] for run in runs for row in run["ranks"] or []]
    return fmean(values) if values else math.nan


def wins(frame: pd.DataFrame) -> pd.DataFrame:
    """By method: of the tasks it was run on, on how many it has the best mean of all, and one above the reference's."""
    # Equal ones may differ in their last bits.
    means, differences = frame["mean"].round(6), frame["difference"].round(6)
    best = means == means.groupby(frame["task"]).transform("max")
    marked = frame.assign(best=best, above=differences > 0)
    table = marked.groupby("method", sort=False).agg(
        **{
            "tasks": ("task", "size"),
            "best on": ("best", "sum"),
            "above reference on": ("above", "sum"),
            "mean difference": ("difference", "mean"),
        }
    )
    order = table["mean difference"].fillna(0).sort_values(ascending=False, kind="stable").index
    return table.loc[order].reset_index()


def tuning(records: Mapping[str, Record]) -> pd.DataFrame:
    """The validation criterion by learning rate, on the tuning seed: how much a method hangs on its rate."""
    rows = [
        {
            "task": record["task"],
            "method": find_method(record["method"]).name,
            "rate": record["learning_rate"],
            "loss": record.get("criterion", math.nan),
        }
        for record in records.values()
        if record["seed"] == TUNING_SEED
    ]
    if not rows:
        return pd.DataFrame()
    table = pd.DataFrame(rows).pivot_table(index=["task", "method"], columns="rate", values="loss", sort=False)
    return table.sort_index(axis=1).reset_index()


def learned_ranks(records: Mapping[str, Record]) -> pd.DataFrame:
    """Do stable ranks differ between modules, and between attention and MLP, in the logarithm? By task and method."""
    rows = []
    for (task, method), runs in final_runs(records).items():
        if len(runs) < 2 or any(not run["ranks"] for run in runs):
            continue
        stable = np.array([[row["stable_rank"] for row in run["ranks"]] for run in runs])
        kinds = np.array([row["kind"] for row in runs[0]["ranks"]])
        if (stable <= 0).any() or np.ptp(stable) < 1e-6 or min((kinds == k).sum() for k in ("attention", "mlp")) < 2:
            continue
        by_seed = np.log(stable)
        attention, mlp = (by_seed.mean(0)[kinds == kind] for kind in ("attention", "mlp"))
        share, difference = share_between_modules(by_seed), gap(attention, mlp)
        rows.append(
            {
                "task": task,
                "method": find_method(method).name,
                "seeds": len(runs),
                "modules differ: p": modules_differ(by_seed),
                "std over modules, log": by_seed.mean(0).std(ddof=1),
                "share of variance": share.value,
                "share from": share.low,
                "share to": share.high,
                "attention − MLP, log": difference.value,
                "from": difference.low,
                "to": difference.high,
                "Cohen's d": difference.d,
            }
        )
    return pd.DataFrame(rows)


def ranks_by_layer(
    comparison: Comparison, records: Mapping[str, Record]
) -> dict[tuple[str, str], dict[tuple[str, int | None], float]]:
    """(task, method) → (type of module, layer) → its stable rank, mean over seeds; of LR-LoRA and the reference."""
    return {
        (task, method): {
            (rows[0]["type"], layer_index(rows[0]["module"])): fmean(row["stable_rank"] for row in rows)
            for rows in zip(*(run["ranks"] for run in runs), strict=True)
        }
        for (task, method), runs in final_runs(records).items()
        if method in ("lr-lora", comparison.reference) and all(run["ranks"] for run in runs)
    }
