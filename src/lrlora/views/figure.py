"""Figures of ranks, as SVG, PNG or PDF, in Okabe and Ito's colorblind-safe colors."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.figure import Figure, SubFigure

from ..checks import require_known
from ..files import replacing
from ..naming import several_stacks, type_label
from ..ranks import MEASURES, RankReport, RankRow

# Default measure of the figure and the page.
OPENING_MEASURE = "stable_rank"
TRAINED_RANK = "r"
_LABELS = {TRAINED_RANK: "rank r", **{name: measure.label for name, measure in MEASURES.items()}}
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00")


def save_rank_figure(
    report: RankReport, path: str | os.PathLike[str], *, measure: str = OPENING_MEASURE, title: str = "Ranks of ΔW"
) -> None:
    """Save `rank_figure` in the format of the suffix of `path` (.png, .svg, .pdf).

    Raises:
        ValueError: `measure` is not a rank measure.

    """
    save_figure(rank_figure(report, measure=measure, title=title), path)


def rank_figure(report: RankReport, *, measure: str = OPENING_MEASURE, title: str = "Ranks of ΔW") -> Figure:
    """Layers × module types of `measure`, and below, by kind, each module's deviation of φ from φ(z) = z.

    `measure` may also be "r".

    Reports without curves, such as plain LoRA's, show only the ranks.
    Requires `pip install '.[plots]'`.

    Raises:
        ValueError: `measure` is not a rank measure.

    """
    require_known("measure", measure, _LABELS)
    types, layers = ({getattr(row, name) for row in report.rows} for name in ("type", "layer"))
    heat_height = 0.4 * len(types) + 1.2
    is_curved = any(row.module in report.curves for row in report.rows)
    heights = [heat_height, 3] if is_curved else [heat_height]
    figure = Figure(figsize=(max(10.0, 0.8 * len(layers) + 5), sum(heights) + 0.5), layout="constrained")
    figure.suptitle(title)
    parts = figure.subfigures(len(heights), 1, squeeze=False, height_ratios=heights)
    _draw_ranks(parts[0, 0].subplots(), report.rows, measure)
    if is_curved:
        _draw_curves(parts[1, 0], report)
    return figure


def save_figure(figure: Figure, path: str | os.PathLike[str]) -> None:
    """Write a figure atomically in the format of the suffix."""
    with replacing(path) as partial:
        figure.savefig(partial, dpi=150, format=Path(path).suffix.removeprefix("."))


def _draw_ranks(axes: Axes, rows: list[RankRow], measure: str) -> None:
    cells: dict[tuple[str, int | None], list[float]] = {}
    with_stack = several_stacks(row.module for row in rows)
    for row in rows:
        label = type_label(row.module, with_stack=with_stack)
        cells.setdefault((label, row.layer), []).append(getattr(row, measure))
    means = {cell: sum(ranks) / len(ranks) for cell, ranks in cells.items()}
    image = draw_heat_map(axes, means, vmin=0, vmax=max(means.values()))
    axes.figure.colorbar(image, ax=axes, label=_LABELS[measure])
    ranks = sorted({row.r for row in rows if row.r is not None})
    rank = f"; rank of BA: r = {', '.join(map(str, ranks))}" * (bool(ranks) and measure != TRAINED_RANK)
    title = f"{_LABELS[measure]}{' of ΔW' * (measure in MEASURES)}{rank}"
    averaged = any(len(several) > 1 for several in cells.values())
    axes.set_title(title + "; mean where several modules share a cell" * averaged, fontsize="medium")


def draw_heat_map(
    axes: Axes, cells: Mapping[tuple[str, int | None], float], *, vmin: float, vmax: float
) -> ScalarMappable:
    """Draw one value per (module type, layer); the caller sets title and scale."""
    types = list(dict.fromkeys(place for place, _ in cells))
    layers = sorted({layer for _, layer in cells}, key=lambda layer: (layer is None, layer))
    values = [[cells.get((place, layer), math.nan) for layer in layers] for place in types]
    image = axes.imshow(values, aspect="auto", cmap="cividis", vmin=vmin, vmax=vmax)
    axes.set_xticks(range(len(layers)), ["–" if layer is None else str(layer) for layer in layers])
    axes.set_yticks(range(len(types)), types)
    axes.set_xlabel("layer")
    for (place, layer), value in cells.items():
        text = f"{value:.0f}" if value == int(value) else f"{value:.1f}"
        color = "black" if value > (vmin + vmax) / 2 else "white"
        axes.text(layers.index(layer), types.index(place), text, ha="center", va="center", color=color)
    return image


def _draw_curves(figure: SubFigure, report: RankReport) -> None:
    kinds = sorted({row.kind for row in report.rows if row.module in report.curves})
    figure.suptitle("Learned φ, one curve per module; 0 is plain LoRA", fontsize="medium")
    for kind, axes in zip(kinds, figure.subplots(1, len(kinds), sharey=True, squeeze=False)[0], strict=True):
        modules = [row.module for row in report.rows if row.kind == kind and row.module in report.curves]
        for module in modules:
            curve = report.curves[module]
            bend = [value - point for point, value in zip(curve.z, curve.phi, strict=True)]
            axes.plot(curve.z, bend, color=COLOURS[0], alpha=0.35, linewidth=0.8)
        axes.axhline(0, color="black", linewidth=0.8, linestyle=":")
        axes.set_title(f"{kind}: {len(modules)}", fontsize="medium")
    figure.supxlabel("z: the central 99 % of the entries of g·BA", fontsize="medium")
    figure.supylabel("φ(z) − z", fontsize="medium")
