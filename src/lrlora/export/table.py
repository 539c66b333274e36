"""The table of exported ranks in a terminal."""

from __future__ import annotations

from collections.abc import Sequence

from rich import box
from rich.table import Table

from .factorize import Factors, kept_energy


def factors_table(factors: Sequence[Factors], title: str) -> Table:
    """What of each module's update is exported, then the sum."""
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD)
    table.padding, table.pad_edge = (0, 1), False
    table.add_column("module", overflow="fold")
    for heading in ("r", "stable", "rank", "energy %", "parameters"):
        table.add_column(heading, justify="right", no_wrap=True)
    for part in factors:
        rank = str(part.rank) if part.rank else "left out"
        table.add_row(
            part.module,
            "–" if part.r is None else str(part.r),
            f"{part.stable_rank:.1f}",
            rank,
            f"{100 * part.kept:.2f}",
            f"{part.parameters:,}",
        )
    table.add_section()
    ranks, parameters = sum(part.rank for part in factors), sum(part.parameters for part in factors)
    table.add_row("all", "", "", str(ranks), f"{100 * kept_energy(factors):.2f}", f"{parameters:,}")
    return table
