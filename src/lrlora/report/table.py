"""The table of learned ranks in a terminal."""

from __future__ import annotations

from rich import box
from rich.table import Table

from ..rank import MEASURES, RankReport, RankRow

_COLUMNS = {
    "r": "r",
    "rank_limit": "limit",
    **{name: measure.heading for name, measure in MEASURES.items()},
    "relative_norm": "‖ΔW‖ %",
    "phi_zero": "φ(0)",
    "curvature": "curv.",
}
_CAPTION = "Ranks of ΔW: stable, effective, and how many directions hold 90 % and 99 % of its energy."
# What is said of the columns that not every report has.
_OPTIONAL = {
    "rank_limit": "limit: the largest rank that an update of this form can have.",
    "relative_norm": "‖ΔW‖ in % of ‖W0‖.",
    "phi_zero": "",
    "curvature": "curv.: share of φ that no straight line explains.",
}


def rank_table(report: RankReport, title: str) -> Table:
    """All rows of the report, then the mean by kind. Readable from 80 columns on."""
    there = {
        # Of LoRA the limit is r, of φ(BA) that of any matrix.
        "rank_limit": any(row.rank_limit not in (None, row.r, min(row.m, row.n)) for row in report.rows),
        "relative_norm": any(row.relative_norm is not None for row in report.rows),
        "phi_zero": bool(report.curves),
        "curvature": bool(report.curves),
    }
    columns = {name: heading for name, heading in _COLUMNS.items() if there.get(name, True)}
    caption = " ".join([_CAPTION, *(about for name, about in _OPTIONAL.items() if there[name] and about)])
    table = Table(title=title, title_justify="left", caption=caption, caption_justify="left", box=box.SIMPLE_HEAD)
    table.padding, table.pad_edge = (0, 0), False
    table.add_column("module", overflow="fold")
    table.add_column("kind", no_wrap=True)
    for heading in columns.values():
        table.add_column(heading, justify="right", no_wrap=True)
    for row in report.rows:
        table.add_row(row.module, row.kind, *(_format(name, getattr(row, name)) for name in columns))
    table.add_section()
    for kind in sorted({row.kind for row in report.rows}):
        rows = [row for row in report.rows if row.kind == kind]
        table.add_row(f"mean of {len(rows)}", kind, *(_format(name, _mean(rows, name)) for name in columns))
    return table


def _mean(rows: list[RankRow], column: str) -> float | None:
    known = [value for row in rows if (value := getattr(row, column)) is not None]
    return sum(known) / len(known) if known else None


def _format(name: str, value: float | None) -> str:
    if value is None:
        return "–"
    if name == "relative_norm":
        return f"{100 * value:.2f}"
    if name in ("phi_zero", "curvature"):
        return f"{value:.3f}"
    return f"{value:.1f}" if isinstance(value, float) and not (name == "r" and value.is_integer()) else f"{value:.0f}"
