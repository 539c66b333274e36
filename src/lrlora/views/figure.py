"""Figure of ranks by layer and module type, as SVG, PNG or PDF, in Okabe and Ito's colorblind-safe colors."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import altair as alt

from ..checks import require_known
from ..files import replacing
from ..naming import has_several_stacks, type_label
from ..ranks import MEASURES, RankReport, RankRow

# Default measure of the figure and the page.
OPENING_MEASURE = "stable_rank"
TRAINED_RANK = "r"
_LABELS = {TRAINED_RANK: "rank r", **{name: measure.label for name, measure in MEASURES.items()}}
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00")
_POINTS = 5_000  # of all curves


def save_rank_figure(
    report: RankReport, path: str | os.PathLike[str], *, measure: str = OPENING_MEASURE, title: str = "Ranks of ΔW"
) -> None:
    """Save layers × module types of a measure, and below, by kind, each module's deviation of φ from φ(z) = z.

    Reports without curves, such as plain LoRA's, show only the ranks. Requires `pip install '.[plots]'`.

    Args:
        report: ranks.
        path: file to write, atomically; its suffix is the format: .png, .svg or .pdf.
        measure: a rank measure, or "r".
        title: of the figure.

    Raises:
        ValueError: `measure` or the file format is unknown, or no module has such a rank.

    """
    charts = [_map(report, measure)]
    if any(row.module in report.curves for row in report.rows):
        charts.append(_bends(report))
    _save(alt.vconcat(*charts, title=title), path)


def save_rank_comparison(panels: Mapping[str, tuple[RankReport, str]], path: str | os.PathLike[str]) -> None:
    """Save layers × module types of several adapters side by side, each on a colour scale of its own.

    Args:
        panels: title → report, and measure as of `save_rank_figure`.
        path: file to write, as by `save_rank_figure`.

    Raises:
        ValueError: see `save_rank_figure`.

    """
    maps = [_map(report, measure, title) for title, (report, measure) in panels.items()]
    _save(alt.hconcat(*maps).resolve_scale(color="independent"), path)


def _save(chart: Any, path: str | os.PathLike[str]) -> None:
    kind: Any = Path(path).suffix.removeprefix(".").lower()
    require_known("format of a figure", kind, ("png", "svg", "pdf"))
    with replacing(path) as partial:
        chart.save(str(partial), format=kind, ppi=150)


def _map(report: RankReport, measure: str, title: str | None = None) -> Any:
    require_known("measure", measure, _LABELS)
    rows: list[RankRow] = [row for row in report.rows if getattr(row, measure) is not None]
    if not rows:
        raise ValueError(f"The report has no {measure}, so there is nothing to draw. Choose another measure.")
    cells: dict[tuple[str, int | None], list[float]] = {}
    with_stack = has_several_stacks(row.module for row in rows)
    for row in rows:
        label = type_label(row.module, with_stack=with_stack)
        cells.setdefault((label, row.layer), []).append(getattr(row, measure))
    layers = sorted({layer for _, layer in cells}, key=lambda layer: (layer is None, layer))
    means = {cell: sum(ranks) / len(ranks) for cell, ranks in cells.items()}
    values = [
        {"type": name, "layer": "–" if layer is None else str(layer), "value": value, "shown": _shown(value)}
        for (name, layer), value in means.items()
    ]
    ranks = sorted({row.r for row in rows if row.r is not None})
    rank = f"; rank of BA: r = {', '.join(map(str, ranks))}" * (bool(ranks) and measure != TRAINED_RANK)
    averaged = "; mean where several modules share a cell" * any(len(cell_ranks) > 1 for cell_ranks in cells.values())
    about = f"{_LABELS[measure]}{' of ΔW' * (measure in MEASURES)}"
    order = ["–" if layer is None else str(layer) for layer in layers]
    base = alt.Chart(alt.Data(values=values), title=title or f"{about}{rank}{averaged}").encode(
        x=alt.X("layer:N", sort=order, title="layer", axis=alt.Axis(labelAngle=0)),
        y=alt.Y("type:N", sort=None, title=None, axis=alt.Axis(labelLimit=0)),
    )
    largest = max(means.values()) or 1
    scale = alt.Scale(scheme="cividis", domain=[0, largest])
    dark_on_light = alt.condition(f"datum.value > {largest / 2}", alt.value("black"), alt.value("white"))
    heat = base.mark_rect().encode(color=alt.Color("value:Q", scale=scale, legend=None))
    return (heat + base.mark_text().encode(text="shown:N", color=dark_on_light)).properties(
        width=alt.Step(38), height=alt.Step(26)
    )


def _shown(value: float) -> str:
    return f"{value:.0f}" if value == int(value) else f"{value:.1f}"


def _bends(report: RankReport) -> Any:
    stride = max(4, sum(len(curve.z) for curve in report.curves.values()) // _POINTS)
    values = [
        {"kind": row.kind, "module": row.module, "z": z, "bend": phi - z}
        for row in report.rows
        if (curve := report.curves.get(row.module))
        for z, phi in list(zip(curve.z, curve.phi, strict=True))[::stride]
    ]
    return (
        alt.Chart(alt.Data(values=values), title="Learned φ, one curve per module; 0 is plain LoRA")
        .mark_line(color=COLOURS[0], opacity=0.35, strokeWidth=0.8)
        .encode(
            x=alt.X("z:Q", title="z: the central 99 % of the entries of g·BA"),
            y=alt.Y("bend:Q", title="φ(z) − z"),
            detail="module:N",
            column=alt.Column("kind:N", title=None),
        )
        .properties(width=220, height=180)
    )
