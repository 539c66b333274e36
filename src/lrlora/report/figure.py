"""The picture of a rank report: a heat map of learned ranks and the learned φ of every module."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from ..rank import MEASURES, RankReport, RankRow

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_LABELS = {
    "stable_rank": "stable rank",
    "effective_rank": "effective rank",
    "energy90_rank": "energy-90 rank",
    "energy99_rank": "energy-99 rank",
}
# Okabe and Ito's colours, told apart by line style as well.
_KIND_COLOURS = {"attention": "#0072B2", "mlp": "#D55E00", "other": "#009E73"}
_KIND_STYLES = {"attention": "-", "mlp": "--", "other": "-."}


def save_rank_figure(
    report: RankReport, path: str | os.PathLike[str], *, measure: str = "energy99_rank", title: str = "Learned ranks"
) -> None:
    """Draw layers × module types of `measure`, and below it φ of every module over the entries it acts on.

    The format follows the suffix of `path` (.png, .svg, .pdf). Needs `pip install lrlora[plots]`.

    Raises:
        ValueError: `measure` is not one of the ranks of a report.

    """
    if measure not in MEASURES:
        raise ValueError(f"measure must be one of {', '.join(MEASURES)}, and is {measure!r}.")
    from matplotlib.figure import Figure

    types = list(dict.fromkeys(row.type for row in report.rows))
    layers = sorted({row.layer for row in report.rows}, key=lambda layer: (layer is None, layer))
    figure = Figure(figsize=(max(8.0, 1.3 * len(layers) + 5), 0.45 * len(types) + 5.5), layout="constrained")
    figure.suptitle(title)
    heat, curves = figure.subplots(2, 1, height_ratios=[0.45 * len(types) + 1, 4])
    _draw_heat_map(heat, report.rows, types, layers, measure)
    _draw_curves(curves, report)
    target = Path(path)
    partial = target.with_name(f"{target.stem}.partial{target.suffix}")
    figure.savefig(partial, dpi=150)
    partial.replace(target)


def _draw_heat_map(axes: Axes, rows: list[RankRow], types: list[str], layers: list[int | None], measure: str) -> None:
    values = [[float("nan")] * len(layers) for _ in types]
    for row in rows:
        values[types.index(row.type)][layers.index(row.layer)] = getattr(row, measure)
    image = axes.imshow(values, aspect="auto", cmap="cividis", vmin=0)
    axes.figure.colorbar(image, ax=axes, label=_LABELS[measure])
    axes.set_xticks(range(len(layers)), ["–" if layer is None else str(layer) for layer in layers])
    axes.set_yticks(range(len(types)), types)
    axes.set_xlabel("layer")
    ranks = sorted({row.r for row in rows})
    axes.set_title(f"{_LABELS[measure]} of ΔW; rank of BA: r = {', '.join(map(str, ranks))}", fontsize="medium")
    threshold = max(getattr(row, measure) for row in rows) / 2
    for row in rows:
        value = getattr(row, measure)
        text = f"{value:.1f}" if isinstance(value, float) else str(value)
        position = layers.index(row.layer), types.index(row.type)
        axes.text(*position, text, ha="center", va="center", color="black" if value > threshold else "white")


def _draw_curves(axes: Axes, report: RankReport) -> None:
    kinds = {row.module: row.kind for row in report.rows}
    for module, (z, phi) in report.curves.items():
        kind = kinds[module]
        axes.plot(z, phi, color=_KIND_COLOURS[kind], linestyle=_KIND_STYLES[kind], alpha=0.6, linewidth=1)
    for kind in dict.fromkeys(kinds.values()):
        axes.plot([], [], color=_KIND_COLOURS[kind], linestyle=_KIND_STYLES[kind], label=kind)
    axes.axline((0, 0), slope=1, color="black", linewidth=0.8, linestyle=":", label="φ(z) = z, plain LoRA")
    axes.set_xlabel("z, from the smallest to the largest entry of g·BA")
    axes.set_ylabel("φ(z)")
    axes.set_title("Learned φ, one curve per module", fontsize="medium")
    axes.legend(loc="best", fontsize="small")
