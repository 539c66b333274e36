"""Figures of a comparison."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, LogLocator, NullFormatter, StrMethodFormatter

from lrlora.files import replacing

from .jobs import Comparison, Record
from .tables import final_runs, loss, score


def parameters_figure(comparison: Comparison, records: Mapping[str, Record]) -> Figure:
    """Test metric and loss by trainable parameters: mean ± standard deviation over seeds."""
    cells, styles = final_runs(records), _styles(records)
    measures = {"test metric × 100": score, "test loss × 100": loss}
    figure, columns = _panels(list(dict.fromkeys(task for task, _ in cells)), list(measures), "trainable parameters")
    for task, column in columns.items():
        sizes = {method: runs[0]["trainable"] for (other, method), runs in cells.items() if other == task}
        for method, aside in _aside(sizes).items():
            for axes, measure in zip(column, measures.values(), strict=True):
                runs = cells[task, method]
                values = [measure(run, comparison.definition.training_tasks[task]) for run in runs]
                spread = stdev(values) if len(values) > 1 else 0.0
                axes.errorbar(sizes[method] * aside, fmean(values), spread, linestyle="", **styles[runs[0]["label"]])
        axis = column[-1].xaxis
        low, high = min(sizes.values()), max(sizes.values())
        column[-1].set_xlim(low / 1.3, high * 1.3)
        axis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 5)) if high < 10 * low else LogLocator())
        axis.set_major_formatter(EngFormatter(sep=""))
    return with_legend(figure)


def _aside(sizes: Mapping[str, int]) -> dict[str, float]:
    """Method → horizontal factor that separates methods of similar size."""
    groups: list[list[str]] = []
    for method in sorted(sizes, key=lambda method: sizes[method]):
        if groups and sizes[method] < 1.05 * sizes[groups[-1][0]]:
            groups[-1].append(method)
        else:
            groups.append([method])
    return {method: 1.025 ** (i - (len(group) - 1) / 2) for group in groups for i, method in enumerate(group)}


def rates_figure(records: Mapping[str, Record], table: pd.DataFrame) -> Figure:
    """Validation loss by learning rate; rates with failed runs at the top."""
    figure, columns = _panels(list(dict.fromkeys(table["task"])), ["validation loss"], "learning rate")
    styles = _styles(records)
    rates = [name for name in table.columns if isinstance(name, float)]
    for row in table.to_dict("records"):
        style, axes = styles[row["method"]], columns[row["task"]][0]
        tried = [rate for rate in rates if math.isfinite(row[rate])]
        axes.plot(tried, [row[rate] for rate in tried], **style)
        failed = [rate for rate in rates if math.isinf(row[rate])]
        axes.plot(failed, [0.97] * len(failed), "x", color=style["color"], transform=axes.get_xaxis_transform())
    for axes in figure.axes:
        axes.set_xticks(rates, [f"{rate:g}" for rate in rates], rotation=45)
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 5, 7)))
        axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        axes.yaxis.set_minor_formatter(NullFormatter())
    return with_legend(figure)


def ranks_figure(places: Mapping[tuple[str, str], Mapping[tuple[str, int | None], float]]) -> Figure:
    """Stable rank by layer and module type: one column of panels, with its own scale, per task."""
    tasks, methods = (list(dict.fromkeys(names)) for names in zip(*places, strict=True))
    types, layers = (set(names) for names in zip(*(place for cells in places.values() for place in cells), strict=True))
    size = ((0.4 * len(layers) + 0.8) * len(tasks) + 3, (0.35 * len(types) + 0.8) * len(methods))
    figure = Figure(figsize=size, layout="constrained")
    grid = figure.subplots(len(methods), len(tasks), squeeze=False, sharey=True)
    for axes in grid.flat:
        axes.set_axis_off()
    for (task, method), cells in places.items():
        axes = grid[methods.index(method), tasks.index(task)]
        axes.set_axis_on()
        highest = max(max(places[task, other].values()) for other in methods if (task, other) in places)
        _draw_heat_map(axes, cells, vmin=1, vmax=max(1, highest))  # a zero update has no rank
        axes.set_title(f"{task}, {method}", fontsize="medium")
    return figure


def save_figure(figure: Figure, path: Path) -> None:
    """Write a figure atomically in the format of the suffix."""
    with replacing(path) as partial:
        figure.savefig(partial, dpi=150, format=path.suffix.removeprefix("."))


def _draw_heat_map(axes: Axes, cells: Mapping[tuple[str, int | None], float], *, vmin: float, vmax: float) -> None:
    """Draw one value per (module type, layer)."""
    types = list(dict.fromkeys(place for place, _ in cells))
    layers = sorted({layer for _, layer in cells}, key=lambda layer: (layer is None, layer))
    values = [[cells.get((place, layer), math.nan) for layer in layers] for place in types]
    axes.imshow(values, aspect="auto", cmap="cividis", vmin=vmin, vmax=vmax)
    axes.set_xticks(range(len(layers)), ["–" if layer is None else str(layer) for layer in layers])
    axes.set_yticks(range(len(types)), types)
    axes.set_xlabel("layer")
    for (place, layer), value in cells.items():
        text = f"{value:.0f}" if value == int(value) else f"{value:.1f}"
        color = "black" if value > (vmin + vmax) / 2 else "white"
        axes.text(layers.index(layer), types.index(place), text, ha="center", va="center", color=color)


def _panels(tasks: Sequence[str], ylabels: Sequence[str], xlabel: str) -> tuple[Figure, dict[str, list[Axes]]]:
    """Figure with a column of panels per task, and a row per `ylabels` entry."""
    figure = Figure(figsize=(3.2 * len(tasks) + 2, 2.5 * len(ylabels) + 0.5), layout="constrained")
    grid = figure.subplots(len(ylabels), len(tasks), squeeze=False, sharex="col")
    for axes, ylabel in zip(grid, ylabels, strict=True):
        axes[0].set_ylabel(ylabel)
    columns = dict(zip(tasks, grid.T.tolist(), strict=True))
    for task, column in columns.items():
        column[0].set_title(task)
        column[-1].set(xlabel=xlabel, xscale="log")
        column[-1].xaxis.set_minor_formatter(NullFormatter())
    return figure, columns


def _styles(records: Mapping[str, Record]) -> dict[str, dict[str, Any]]:
    """Drawing style by label, the same in all panels."""
    labels = dict.fromkeys(record["label"] for record in records.values())
    # Nine markers and ten colors: unique styles for 90 methods.
    return {
        label: {"label": label, "color": f"C{i % 10}", "marker": "osD^vPX*<"[i % 9]} for i, label in enumerate(labels)
    }


def with_legend(figure: Figure) -> Figure:
    """Add a legend of all panels' unique labels."""
    entries = {
        label: handle for axes in figure.axes for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)
    }
    figure.legend(list(entries.values()), list(entries), loc="outside right center", fontsize=8)
    return figure
