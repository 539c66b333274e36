"""Generated parts of hand-written pages: tables, and the markers between which they stand."""

from __future__ import annotations

from collections.abc import Iterable, Sequence


def row(*cells: str) -> str:
    """One row of a table."""
    return f"| {' | '.join(cells)} |"


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A whole table.

    Raises:
        ValueError: a row has not as many cells as the header.

    """
    rows = list(rows)
    if any(len(cells) != len(header) for cells in rows):
        raise ValueError(f"Every row must have {len(header)} cells, as the header has.")
    return "\n".join([row(*header), "|" + "---|" * len(header), *(row(*cells) for cells in rows)]) + "\n"


def with_section(page: str, name: str, content: str) -> str:
    """The page with `content` between `<!-- name -->` and `<!-- /name -->`.

    Raises:
        ValueError: the page does not hold each marker once.

    """
    start, end = f"<!-- {name} -->\n", f"<!-- /{name} -->\n"
    if page.count(start) != 1 or page.count(end) != 1:
        raise ValueError(f"The page must hold {start.strip()} and {end.strip()} once each.")
    before, _, rest = page.partition(start)
    return before + start + content + end + rest.partition(end)[2]
