"""Tables of a comparison, as pandas frames: one row per cell, tuning, fitted ranks; and as Markdown."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from statistics import fmean, stdev
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from lrlora.checks import in_markdown
from lrlora.naming import layer_index

from .jobs import TUNING_SEED, Comparison, Record
from .statistics import EquivalentRank, Interval, columns_differ, gap, holm, paired_difference, share_between_columns
from .suite import Task

SIGNIFICANT = 0.05  # p after correction


def final_runs(records: Mapping[str, Record]) -> dict[tuple[str, str], list[Record]]:
    """(task, method) → its test runs, by seed; omits cells without runs or with a failed one."""
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
    """Task metric on test data, times 100."""
    return 100 * run["test"][task.metric]


def loss(run: Record, task: Task) -> float:
    """Learning-rate criterion on test data, times 100; finer than accuracy."""
    return 100 * run["test"][task.criterion]


def results(comparison: Comparison, records: Mapping[str, Record]) -> pd.DataFrame:
    """One row per task and method: mean and standard deviation over seeds, and the difference to the reference.

    p is from the paired t-test over seeds, Holm-corrected for all comparisons of the table. Time and memory are ratios
    of medians to the reference; time is NaN if the hardware differed.
    """
    cells, tasks, reference = final_runs(records), comparison.definition.training_tasks, comparison.reference
    rows: list[dict[str, Any]] = []
    for (name, method), runs in cells.items():
        values = [score(run, tasks[name]) for run in runs]
        base = cells.get((name, reference), [])
        rows.append(
            {
                "task": name,
                "method": runs[0]["label"],
                "rate": runs[0]["learning_rate"],
                "seeds": len(runs),
                "metric": tasks[name].metric,
                "mean": fmean(values),
                "std": stdev(values) if len(values) > 1 else math.nan,
                **_difference(runs, base if method != reference else [], tasks[name], score),
                "loss": fmean(loss(run, tasks[name]) for run in runs),
                "parameters": runs[0]["trainable"],
                "time": ratio(runs, base, "seconds") if same_hardware(runs, base) else math.nan,
                "memory": ratio(runs, base, "peak_mib"),
                "stable rank": _mean_rank(runs, "stable_rank"),
                "energy-99 rank": _mean_rank(runs, "energy99_rank"),
            }
        )
    return _corrected(pd.DataFrame(rows))


def variants(comparison: Comparison, records: Mapping[str, Record]) -> pd.DataFrame:
    """LR-LoRA variants of φ (fixed, shared, …) against LR-LoRA: paired differences of metric and loss."""
    cells, tasks = final_runs(records), comparison.definition.training_tasks
    rows = []
    for (name, method), runs in cells.items():
        head, plus, options = method.partition("+")
        like = "lr-lora" if head == "lr-lora" else f"lr-lora{plus}{options}"  # the same options, but for the variant's
        base = cells.get((name, like))
        if base is None or method == like or runs[0]["train"] != "lr-lora":
            continue
        for measure in (score, loss):
            differences = _difference(runs, base, tasks[name], measure)
            kind = tasks[name].metric if measure is score else "loss"
            rows.append({"task": name, "method": runs[0]["label"], "of": kind, **differences})
    return _corrected(pd.DataFrame(rows))


def _difference(
    runs: Sequence[Record], others: Sequence[Record], task: Task, measure: Callable[[Record, Task], float]
) -> dict[str, float]:
    """Columns of a difference, paired by seed; NaN without pairs."""
    values, base = ({run["seed"]: measure(run, task) for run in cell} for cell in (runs, others))
    seeds = [seed for seed in values if seed in base]
    paired = paired_difference([values[seed] for seed in seeds], [base[seed] for seed in seeds])
    columns = ("difference", "standard error", "from", "to", "p")
    if paired is None:
        return dict.fromkeys(columns, math.nan)
    return dict(zip(columns, (paired.value, paired.standard_error, paired.low, paired.high, paired.p), strict=True))


def _corrected(frame: pd.DataFrame) -> pd.DataFrame:
    if len(frame):
        tested = frame["p"].notna()
        frame.loc[tested, "p"] = holm(frame.loc[tested, "p"].tolist())
    return frame


def same_hardware(runs: Sequence[Record], others: Sequence[Record]) -> bool:
    """Whether their times are comparable."""
    return {run.get("hardware") for run in runs} == {run.get("hardware") for run in others}


def ratio(runs: Sequence[Record], others: Sequence[Record], name: str) -> float:
    """Ratio of medians; NaN without others."""
    if not others:
        return math.nan
    return float(np.median([run[name] for run in runs]) / np.median([run[name] for run in others]))


def _mean_rank(runs: Sequence[Record], measure: str) -> float:
    values = [row[measure] for run in runs for row in run["ranks"] or []]
    return fmean(values) if values else math.nan


def against_reference(comparison: Comparison, frame: pd.DataFrame) -> pd.DataFrame:
    """By method: number of tasks on which it is better or worse than the reference at p < 0.05, and those undecided.

    Of `results`, tasks count that the method and the reference have with all their seeds.
    """
    compared = frame[(frame["seeds"] == comparison.seeds) & frame["difference"].notna()]
    is_told = compared["p"] < SIGNIFICANT
    better, worse = is_told & (compared["difference"] > 0), is_told & (compared["difference"] < 0)
    marked = compared.assign(better=better, worse=worse, open=~(better | worse))
    columns = {
        "tasks": ("task", "size"),
        "better on": ("better", "sum"),
        "worse on": ("worse", "sum"),
        "undecided on": ("open", "sum"),
        "mean difference": ("difference", "mean"),
    }
    return marked.groupby("method", sort=False).agg(**columns).reset_index()


def conditions(comparison: Comparison, records: Mapping[str, Record]) -> pd.DataFrame:
    """One row per task: steps, batch size, and number of examples by split."""
    rows = []
    for name, task in comparison.definition.training_tasks.items():
        runs = [record for record in records.values() if record["task"] == name and "examples" in record]
        if name in comparison.task_names:
            counts = {split: count for run in runs for split, count in run["examples"].items()}
            rows.append({"task": name, "steps": task.steps, "batch size": task.batch_size, **counts})
    return pd.DataFrame(rows).astype(object)


def tuning(records: Mapping[str, Record]) -> pd.DataFrame:
    """Validation criterion by learning rate, on the tuning seed: the sensitivity to the rate.

    Infinite if the run failed, NaN without a run.
    """
    rows = [
        {
            "task": record["task"],
            "method": record["label"],
            "rate": record["learning_rate"],
            "loss": record.get("criterion", math.inf),
        }
        for record in records.values()
        if record["seed"] == TUNING_SEED
    ]
    if not rows:
        return pd.DataFrame()
    table = pd.DataFrame(rows).pivot_table(index=["task", "method"], columns="rate", values="loss", sort=False)
    return table.sort_index(axis=1).reset_index()


def stable_ranks(runs: Sequence[Record]) -> pd.DataFrame:
    """(seeds, modules) of modules common to all runs: a method may drop the adapter of some modules."""
    by_seed = [{row["module"]: row["stable_rank"] for row in run["ranks"] or ()} for run in runs]
    return pd.DataFrame(by_seed).dropna(axis="columns")


def fitted_ranks(records: Mapping[str, Record]) -> pd.DataFrame:
    """Test whether log stable ranks differ between modules, layers, types, and attention and MLP.

    One row per task and method. Cells with an interval are `Interval`s.
    """
    rows = []
    for (task, _), runs in final_runs(records).items():
        stable = stable_ranks(runs)
        if len(runs) < 2 or stable.empty or (stable <= 0).to_numpy().any() or np.ptp(stable.to_numpy()) < 1e-6:
            continue
        by_seed = stable.apply(np.log)
        kinds = by_seed.columns.map({row["module"]: row["kind"] for row in runs[0]["ranks"]})
        attention, mlp = (by_seed.mean()[kinds == kind].to_numpy() for kind in ("attention", "mlp"))
        if min(len(attention), len(mlp)) < 2:
            continue
        difference, d = gap(attention, mlp)
        places = [(*place, value) for place, value in by_place(by_seed.mean(), runs[0]).items()]
        grid = pd.DataFrame(places, columns=["type", "layer", "rank"]).dropna()
        grid = grid.pivot(index="type", columns="layer", values="rank").dropna()  # types that all layers have
        rows.append(
            {
                "task": task,
                "method": runs[0]["label"],
                "seeds": len(runs),
                **_shares("modules", by_seed.to_numpy()),
                **_shares("layers", grid.to_numpy()),
                **_shares("types", grid.to_numpy().T),
                "attention − MLP": difference,
                "Cohen's d": d,
            }
        )
    return pd.DataFrame(rows)


def _shares(name: str, values: NDArray[np.float64]) -> dict[str, Any]:
    """Two columns: whether the columns of `values` differ, and the share of variance between them."""
    has_both = min(values.shape) > 1
    return {
        f"{name} differ: p": columns_differ(values) if has_both else math.nan,
        f"share of {name}": share_between_columns(values) if has_both else math.nan,
    }


def by_place(ranks: pd.Series, run: Record) -> dict[tuple[str, int | None], float]:
    """(module type, layer) → mean rank of its modules (several with experts)."""
    cells: dict[tuple[str, int | None], list[float]] = {}
    for row in run["ranks"] or ():
        if row["module"] in ranks:
            cells.setdefault((row["type"], layer_index(row["module"])), []).append(ranks[row["module"]])
    return {place: fmean(several) for place, several in cells.items()}


def ranks_by_layer(
    comparison: Comparison, records: Mapping[str, Record]
) -> dict[tuple[str, str], dict[tuple[str, int | None], float]]:
    """(task, label) → (type, layer) → stable rank, mean over seeds; for LR-LoRA, its variants and the reference."""
    maps = {
        (task, runs[0]["label"]): by_place(stable_ranks(runs).mean(), runs[0])
        for (task, method), runs in final_runs(records).items()
        if method == comparison.reference or runs[0]["train"] == "lr-lora"
    }
    return {cell: places for cell, places in maps.items() if places}


# Decimal places; other columns are not rounded.
_DIGITS = {"mean difference": 1, "loss": 1, "difference": 2, "p": 3, "time": 2, "memory": 2}
_DIGITS |= {"stable rank": 2, "energy-99 rank": 1, "attention − MLP": 3, "Cohen's d": 2}
_DIGITS |= {"loss (nats)": 3, "difference (nats)": 3, "std": 3, "step": 2, "terms": 1, "ρ": 2}
_DIGITS |= {"growth": 2, "stable rank at the fewest texts": 1, "at the most": 1}
_DIGITS |= {f"{name} differ: p": 4 for name in ("modules", "layers", "types")}
_DIGITS |= {f"share of {name}": 2 for name in ("modules", "layers", "types")}


def markdown(frame: pd.DataFrame) -> str:
    """Frame as a table."""

    def show(name: object, value: object) -> str:
        digits = _DIGITS.get(str(name))
        if value is None or isinstance(value, EquivalentRank):
            return "" if value is None else str(value)
        if isinstance(value, Interval):
            values = [show(name, part) for part in (value.value, value.low, value.high)]
            return values[0] if "" in values else f"{values[0]} ({values[1]} to {values[2]})"
        if isinstance(value, float):
            if math.isnan(value):
                return ""
            if math.isinf(value):
                return "failed"
            return f"{value:g}" if digits is None else f"{value:.{digits}f}"
        return f"{value:,}" if isinstance(value, int) else in_markdown(str(value))

    rows = [[show(name, value) for name, value in row.items()] for row in frame.to_dict("records")]
    lines = [[in_markdown(str(name)) for name in frame.columns], ["---"] * len(frame.columns), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def failure_line(record: Record) -> str:
    """List item with a failed job and the reason."""
    line = f"{record['task']}, {record['method']}, {record['learning_rate']:g}: {record['failure']}"
    return f"- {in_markdown(line)}"
