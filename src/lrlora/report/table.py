"""The rank table, in a terminal."""

from __future__ import annotations

from rich.table import Table

from ..rank import RankReport

_COLUMNS = {
    "stable_rank": "stable\nrank",
    "effective_rank": "effective\nrank",
    "energy90_rank": "energy-90\nrank",
    "energy99_rank": "energy-99\nrank",
    "relative_norm": "‖ΔW‖/‖W0‖\n%",
    "phi_zero": "φ(0)",
    "curvature": "curvature",
}


def rank_table(report: RankReport, title: str) -> Table:
    """All rows of the report, then the mean by kind."""
    table = Table(title=title, title_justify="left")
    table.add_column("module", overflow="fold")
    table.add_column("kind")
    table.add_column("m × n", justify="right")
    table.add_column("r", justify="right")
    for heading in _COLUMNS.values():
        table.add_column(heading, justify="right")
    for row in report.rows:
        values = [_format(name, getattr(row, name)) for name in _COLUMNS]
        table.add_row(row.module, row.kind, f"{row.m} × {row.n}", str(row.r), *values)
    table.add_section()
    for kind in sorted({row.kind for row in report.rows}):
        rows = [row for row in report.rows if row.kind == kind]
        values = []
        for name in _COLUMNS:
            known = [value for row in rows if (value := getattr(row, name)) is not None]
            values.append(_format(name, sum(known) / len(known) if known else None))
        table.add_row(f"mean of {len(rows)}", kind, "", "", *values)
    return table


def _format(name: str, value: float | None) -> str:
    if value is None:
        return "–"
    if name == "relative_norm":
        return f"{100 * value:.2f}"
    if name in ("phi_zero", "curvature"):
        return f"{value:.4f}"
    return f"{value:.1f}" if isinstance(value, float) else str(value)
