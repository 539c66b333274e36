"""Main figures of runs for a paper, as SVG and PNG, in colorblind-safe colors."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure

from ..ranks import MEASURES, RankReport
from .charts import COLOURS
from .figure import save_figure, save_rank_figure
from .runs import Run

FORMATS = ("svg", "png")
_LINES = ("-", "--", ":")
_MARKERS = "os^DPv"  # one per run, to distinguish runs in grayscale


def save_pictures(runs: Sequence[Run], folder: str | os.PathLike[str]) -> None:
    """Write each run's heat map and φ, and its ranks by kind of module and over training (if recorded).

    Requires `pip install '.[plots]'`.
    """
    target = Path(folder)
    target.mkdir(parents=True, exist_ok=True)
    names = [re.sub(r"\W+", "-", run.name).strip("-") for run in runs]
    for i, (run, name) in enumerate(zip(runs, names, strict=True), start=1):
        if names.count(name) > 1:
            name = f"{i}-{name}"
        for measure in ("stable_rank", "energy99_rank"):
            for suffix in FORMATS:
                path = target / f"{name}-{measure.replace('_', '-')}.{suffix}"
                save_rank_figure(run.report, path, measure=measure, title=run.name)
    figures = {"kinds": _kinds(runs)}
    if any(run.history for run in runs):
        figures["history"] = _history(runs)
    for name, figure in figures.items():
        for suffix in FORMATS:
            save_figure(figure, target / f"{name}.{suffix}")


def _kinds(runs: Sequence[Run]) -> Figure:
    """Box plots of each measure, by kind and run."""
    kinds = sorted({row.kind for run in runs for row in run.report.rows})
    figure = Figure(figsize=(12, 3.5), layout="constrained")
    for measure, axes in zip(MEASURES, figure.subplots(1, len(MEASURES)), strict=True):
        for i, run in enumerate(runs):
            places = [k + (i + 0.5) / len(runs) * 0.8 - 0.4 for k in range(len(kinds))]
            ranks = [[getattr(row, measure) for row in run.report.rows if row.kind == kind] for kind in kinds]
            boxes = axes.boxplot(ranks, positions=places, widths=0.6 / len(runs), patch_artist=True, manage_ticks=False)
            for box in boxes["boxes"]:
                box.set_facecolor(COLOURS[i % len(COLOURS)])
            for median in boxes["medians"]:
                median.set_color("black")
            axes.plot([], [], color=COLOURS[i % len(COLOURS)], linewidth=6, label=run.name)
        axes.set_xticks(range(len(kinds)), kinds)
        axes.set_title(MEASURES[measure].label, fontsize="medium")
    if len(runs) > 1:
        figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=len(runs))
    return figure


def _history(runs: Sequence[Run]) -> Figure:
    """Mean of each measure over training, by kind and run."""
    kinds = sorted({row.kind for run in runs for row in run.report.rows})
    figure = Figure(figsize=(12, 3.5), layout="constrained")
    for measure, axes in zip(MEASURES, figure.subplots(1, len(MEASURES)), strict=True):
        for i, run in enumerate(runs):
            for kind, line in zip(kinds, _LINES, strict=False):
                means = [
                    (step, mean) for step, report in run.history if (mean := _mean(report, kind, measure)) is not None
                ]
                if means:
                    label = kind if len(runs) == 1 else f"{run.name}, {kind}"
                    steps, values = zip(*means, strict=True)
                    style = {"linestyle": line, "marker": _MARKERS[i % len(_MARKERS)], "markersize": 4}
                    every = -(-len(steps) // 8)
                    axes.plot(steps, values, **style, markevery=every, color=COLOURS[i % len(COLOURS)], label=label)
        axes.set_title(MEASURES[measure].label, fontsize="medium")
        axes.set_xlabel("step")
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=3)
    return figure


def _mean(report: RankReport, kind: str, measure: str) -> float | None:
    ranks = [getattr(row, measure) for row in report.rows if row.kind == kind]
    return sum(ranks) / len(ranks) if ranks else None
