"""The report of tasks on which rank binds: losses, LoRA-equivalent ranks, and learned rank against demand."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from statistics import fmean, stdev

import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter, ScalarFormatter
from scipy.stats import spearmanr

from ..files import write_whole
from ..report.figure import save_figure
from .capacity import CapacityTask
from .equivalence import equivalent_rank
from .figures import with_legend
from .jobs import Comparison, Record, read_records
from .markdown import markdown
from .methods import find_method
from .statistics import Interval, paired_difference
from .tables import final_runs, ratio, same_hardware

REFERENCE = "lora"
LABEL_STEPS, LABEL_CLASSES = 800, 64  # of the tasks that ask for ever more texts, and for nothing else
Cells = Mapping[tuple[str, str], Sequence[Record]]


def family(method: str) -> str:
    """The name of a method without its rank and terms, which a curve goes over."""
    name, *options = method.split("+")
    kept = [option for option in options if option.partition("=")[0] not in ("r", "num_terms")]
    return find_method("+".join([name, *kept])).name


def rank_of(method: str) -> int:
    """R, the rank of BA."""
    return int(find_method(method).adapter(1)["r"])


def served_rank(method: str) -> int | None:
    """The rank of the plain LoRA that holds the same update; None where that is not known beforehand."""
    options = find_method(method).adapter(1)
    if options.get("form") in ("expansion", "blocks"):
        return int(options["r"]) * int(options.get("num_terms", 16))
    return int(options["r"]) if find_method(method).train in ("lora", "dora") else None


def by_seed(runs: Sequence[Record]) -> dict[int, float]:
    """Seed → test loss."""
    return {run["seed"]: run["test"]["loss"] for run in runs}


def lora_curve(cells: Cells, task: str) -> dict[int, dict[int, float]]:
    """R → seed → loss, of plain LoRA."""
    return {
        rank_of(method): by_seed(runs)
        for (other, method), runs in cells.items()
        if other == task and method.startswith(f"{REFERENCE}+r=") and method.count("+") == 1
    }


def losses(records: Mapping[str, Record], task: str) -> pd.DataFrame:
    """One row per method: size, tuned setting, loss, and the r at which LoRA has the same."""
    cells = final_runs(records)
    curve, rows = lora_curve(cells, task), []
    for (other, method), runs in cells.items():
        if other != task:
            continue
        values = list(by_seed(runs).values())
        is_full = find_method(method).train == "full"
        r = None if is_full else rank_of(method)
        base = cells.get((task, f"{REFERENCE}+r={r}"), [])
        equal = equivalent_rank(curve, by_seed(runs)) if len(curve) > 1 and family(method) != "LoRA" else None
        rows.append(
            {
                "method": family(method),
                "r": r,
                "served r": None if is_full else served_rank(method),
                "parameters": runs[0]["trainable"],
                "rate": runs[0]["learning_rate"],
                "scale": runs[0].get("scale", 1.0),
                "seeds": len(runs),
                "loss (nats)": fmean(values),
                "std": stdev(values) if len(values) > 1 else math.nan,
                "LoRA's r for this loss": equal,
                "seconds": _mean(run["seconds"] for run in runs),
                "step": ratio(runs, base, "seconds") if same_hardware(runs, base) else math.nan,
                "terms": _mean(run.get("terms") for run in runs),
                "stable rank": _mean(row["stable_rank"] for run in runs for row in run["ranks"] or ()),
            }
        )
    return pd.DataFrame(rows)


def differences(records: Mapping[str, Record], pairs: Sequence[tuple[str, str]]) -> pd.DataFrame:
    """Test loss of the first of each pair of methods less that of the second, paired by seed, on every task of both."""
    cells, rows = final_runs(records), []
    for task in dict.fromkeys(task for task, _ in cells):
        for first, second in pairs:
            if (task, first) in cells and (task, second) in cells:
                ours, others = by_seed(cells[task, first]), by_seed(cells[task, second])
                seeds = [seed for seed in ours if seed in others]
                found = paired_difference([ours[seed] for seed in seeds], [others[seed] for seed in seeds])
                if found is not None:
                    row = {"task": task, "of": first, "less": second, "seeds": len(seeds)}
                    rows.append(row | {"difference (nats)": Interval(found.value, found.low, found.high)})
    return pd.DataFrame(rows)


def demand(records: Mapping[str, Record], tasks: Mapping[str, CapacityTask]) -> pd.DataFrame:
    """One row per run on labels of 64 classes: how many texts it was asked to learn, and its mean stable rank."""
    rows = []
    for (task, method), runs in final_runs(records).items():
        asked = tasks[task]
        if (asked.kind, asked.steps, asked.classes) != ("labels", LABEL_STEPS, LABEL_CLASSES):
            continue
        for run in runs:
            if run["ranks"]:
                stable = _mean(row["stable_rank"] for row in run["ranks"])
                rows.append({"method": method, "texts": asked.texts, "seed": run["seed"], "stable rank": stable})
    return pd.DataFrame(rows)


def follows_demand(frame: pd.DataFrame) -> pd.DataFrame:
    """By method with at least three sizes: Spearman's ρ of stable rank and texts, with its interval over seeds."""
    rows = []
    for method, runs in frame.groupby("method", sort=False) if len(frame) else ():
        if runs["texts"].nunique() < 3:
            continue
        rho = [spearmanr(some["texts"], some["stable rank"]).statistic for _, some in runs.groupby("seed")]
        found = paired_difference(rho, [0.0] * len(rho))
        assert found is not None
        growth = runs.groupby("texts")["stable rank"].mean()
        rows.append(
            {
                "method": str(method),
                "seeds": len(rho),
                "ρ": Interval(found.value, found.low, found.high),
                "stable rank at the fewest texts": growth.iloc[0],
                "at the most": growth.iloc[-1],
            }
        )
    return pd.DataFrame(rows)


def demand_figure(frame: pd.DataFrame) -> Figure:
    """Mean stable rank against the number of texts whose labels are learned, one line a method."""
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    for method, runs in frame.groupby("method", sort=False):
        some = runs.groupby("texts")["stable rank"].agg(["mean", "std"])
        if len(some) > 2:
            name = find_method(str(method)).name
            axes.errorbar(some.index, some["mean"], some["std"], marker="o", capsize=2, label=name)
    axes.set(xscale="log", xlabel="texts with random labels", ylabel="stable rank, mean of modules")
    axes.xaxis.set_major_formatter(ScalarFormatter())
    axes.set_xticks(sorted(frame["texts"].unique()))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.legend(fontsize=8)
    return figure


def curves_figure(records: Mapping[str, Record], tasks: Sequence[str]) -> Figure:
    """Loss against trainable parameters, and against the time of training relative to LoRA's at its lowest r."""
    figure = Figure(figsize=(4.5 * len(tasks) + 2, 6.5), layout="constrained")
    grid = figure.subplots(2, len(tasks), squeeze=False)
    colours: dict[str, str] = {}
    for column, task in enumerate(tasks):
        frame = losses(records, task)
        upper, lower = grid[0][column], grid[1][column]
        for name, runs in frame.groupby("method", sort=False):
            colour = colours.setdefault(str(name), f"C{len(colours) % 10}")
            style = {"color": colour, "marker": "os^Dv"[len(colours) // 10], "capsize": 2, "label": str(name)}
            ordered = runs.sort_values("parameters")
            upper.errorbar(ordered["parameters"], ordered["loss (nats)"], ordered["std"], **style)
            lower.errorbar(ordered["seconds"], ordered["loss (nats)"], ordered["std"], linestyle="", **style)
        upper.set(xscale="log", xlabel="trainable parameters", title=task)
        lower.set(xscale="log", xlabel="processor time of a training step, s")
        lower.xaxis.set_minor_formatter(NullFormatter())
    for row in grid:
        row[0].set_ylabel("loss")
    return with_legend(figure)


def _mean(values: Iterable[float | None]) -> float:
    known = [value for value in values if value is not None]
    return fmean(known) if known else math.nan


def write_capacity_report(comparison: Comparison, output: Path) -> Path:
    """Write `report.md` and pictures from all stored runs of a folder, whichever call asked for them."""
    records, tasks = read_records(output), comparison.definition.capacity_tasks
    names = [task for task in tasks if len(lora_curve(final_runs(records), task)) > 1]
    parts = [f"# {comparison.suite}\n"]
    for task in names:
        parts += [f"\n## {task}\n", markdown(losses(records, task).drop(columns="seconds"))]
    if names:
        parts.insert(1, "\n![Loss against parameters and time](curves.png)\n")
        save_figure(curves_figure(records, names), output / "curves.png")
    asked = demand(records, tasks)
    if len(asked) and len(followed := follows_demand(asked)):
        parts += ["\n## Learned rank against demand\n", markdown(followed), "\n![Stable rank by texts](demand.png)\n"]
        save_figure(demand_figure(asked), output / "demand.png")
    path = output / "report.md"
    write_whole(path, "\n".join(parts) + "\n")
    return path
