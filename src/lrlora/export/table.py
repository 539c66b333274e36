"""The table of exported ranks in a terminal."""

from __future__ import annotations

from collections.abc import Sequence

from rich import box
from rich.markup import escape
from rich.table import Table

from ..checks import printable
from ..naming import MOST_ROWS, module_type, shortened
from .factorize import Factors, kept_energy

_HEADINGS = ("r", "stable", "rank", "energy %", "parameters")


def factors_table(factors: Sequence[Factors], title: str, *, width: int = 120, every: bool = False) -> Table:
    """What of each module's update is exported, or of many modules those of a type together, then the sum.

    Args:
        factors: as `factorize` returns them.
        title: of the table.
        width: of the terminal; longer paths lose their beginning.
        every: show all modules, however many.

    """
    table = Table(title=printable(title), title_justify="left", box=box.SIMPLE_HEAD)
    table.padding, table.pad_edge = (0, 1), False
    table.add_column("module", no_wrap=True)
    for heading in _HEADINGS:
        table.add_column(heading, justify="right", no_wrap=True)
    groups: dict[str, list[Factors]] = {}
    for part in factors:
        name = part.module if every or len(factors) <= MOST_ROWS else module_type(part.module)
        groups.setdefault(name, []).append(part)
    rows = {name if len(parts) == 1 else f"{name} ×{len(parts)}": _cells(parts) for name, parts in groups.items()}
    rows["all"] = ["", "", *_cells(factors)[2:]]
    room = width - sum(max(map(len, column)) + 2 for column in zip(_HEADINGS, *rows.values(), strict=True))
    for name, cells in rows.items():
        if name == "all":
            table.add_section()
        table.add_row(escape(printable(shortened(name, room))), *cells)
    return table


def _cells(parts: Sequence[Factors]) -> list[str]:
    """Of modules together: r, mean stable rank, smallest and largest rank, kept energy, and parameters."""
    ranks, trained = sorted(part.rank for part in parts), {part.r for part in parts}
    rank = str(ranks[0]) if ranks[0] == ranks[-1] else f"{ranks[0]} to {ranks[-1]}"
    return [
        "–" if trained == {None} or len(trained) > 1 else str(*trained),
        f"{sum(part.stable_rank for part in parts) / len(parts):.1f}",
        "left out" if ranks[-1] == 0 else rank,
        f"{100 * kept_energy(parts):.2f}",
        f"{sum(part.parameters for part in parts):,}",
    ]
