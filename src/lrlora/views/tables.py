"""Terminal tables of ranks and of exports."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TypeVar

from rich import box
from rich.markup import escape
from rich.table import Table

from ..adapters import Factors
from ..adapters.factorize import kept_energy
from ..by_class import ByClass
from ..checks import printable
from ..naming import has_several_stacks, stack_of, type_label
from ..ranks import MEASURES, RankReport, RankRow

MOST_ROWS = 10  # of a table; more modules are shown as means by type, and by layer if there is room
_MOST_PAIRS = 3  # of confused classes
_T = TypeVar("_T")
_COLUMNS = {
    "r": "r",
    "rank_limit": "limit",
    "loss_rank": "loss",
    **{name: measure.heading for name, measure in MEASURES.items()},
    "relative_norm": "‖ΔW‖ %",
    "phi_zero": "φ(0)",
    "curvature": "curv.",
}
_CAPTION = "Ranks of ΔW: stable, effective, and how many directions hold 90 % and 99 % of its energy."
_SPREAD = "Of experts: the mean, and the range of stable ranks."
# Descriptions of optional columns.
_OPTIONAL = {
    "rank_limit": "limit: the largest rank that an update of this form can have.",
    "loss_rank": "loss: rank in the smallest LoRA of about the same loss.",
    "relative_norm": "‖ΔW‖ in % of ‖W0‖.",
    "phi_zero": "φ(0): what φ adds to every entry of ΔW, before scaling.",
    "curvature": "curv.: share of φ that no straight line explains.",
}


def rank_table(report: RankReport, title: str, *, width: int = 120, every: bool = False) -> Table:
    """Table of ranks by module (for many modules, means by type, and by layer if there is room), then by kind.

    Args:
        report: the ranks.
        title: table title.
        width: terminal width; longer paths are truncated on the left.
        every: show all modules, however many.

    """
    has_values = {
        # The limit of LoRA is r, that of φ(BA) is the full rank.
        "rank_limit": any(row.rank_limit not in (row.r, min(row.m, row.n)) for row in report.rows),
        "loss_rank": any(row.loss_rank is not None for row in report.rows),
        "relative_norm": any(row.relative_norm is not None for row in report.rows),
        "phi_zero": bool(report.curves),
        "curvature": bool(report.curves),
    }
    columns = {name: heading for name, heading in _COLUMNS.items() if has_values.get(name, True)}
    sections = [
        {label: [_cell(rows, name) for name in columns] for label, rows in section.items()}
        for section in _sections(report.rows, every=every)
    ]
    means = "Means over modules. " if len(sections) > 2 else ""
    means += f"{_SPREAD} " if any(row.expert is not None for row in report.rows) else ""
    table = _table(title, [*columns.values()], sections, width)
    table.caption = " ".join([means + _CAPTION, *(about for name, about in _OPTIONAL.items() if has_values[name])])
    return table


def _sections(rows: list[RankRow], *, every: bool) -> Iterator[dict[str, list[RankRow]]]:
    """For each section of the table: label → rows to average."""
    modules = _grouped(rows, _module_label)
    if every or len(modules) <= MOST_ROWS:
        yield modules
    else:
        with_stack = has_several_stacks(row.module for row in rows)
        types = _grouped(rows, lambda row: type_label(row.module, with_stack=with_stack))
        yield types
        layers = _grouped(rows, lambda row: _layer_label(row, with_stack=with_stack))
        if 1 < len(layers) <= MOST_ROWS - len(types) - len({row.kind for row in rows}):
            yield layers
    yield _grouped(rows, lambda row: f"all: {row.kind}")


def _module_label(row: RankRow) -> str:
    """Path of a module, or of the parameter that holds an expert."""
    return row.module if row.expert is None else row.module.rpartition(".")[0]


def _cell(rows: list[RankRow], name: str) -> str:
    """Mean over rows; of experts with the range of stable ranks."""
    mean = _format(name, _mean(rows, name))
    if name != "stable_rank" or len(rows) == 1 or any(row.expert is None for row in rows):
        return mean
    ranks = [row.stable_rank for row in rows]
    return f"{mean} ({_format(name, min(ranks))}–{_format(name, max(ranks))})"


def _layer_label(row: RankRow, *, with_stack: bool) -> str:
    if row.layer is None:
        return "outside of layers"
    return f"{stack_of(row.module)} {row.layer}" if with_stack else f"layer {row.layer}"


def _grouped(items: Iterable[_T], label: Callable[[_T], str]) -> dict[str, list[_T]]:
    groups: dict[str, list[_T]] = {}
    for item in items:
        groups.setdefault(label(item), []).append(item)
    return {f"{name} ×{len(group)}" if len(group) > 1 else name: group for name, group in groups.items()}


def _mean(rows: list[RankRow], column: str) -> float | None:
    values = [value for row in rows if (value := getattr(row, column)) is not None]
    return sum(values) / len(values) if len(values) > 1 else (values or [None])[0]


def _format(name: str, value: float | None) -> str:
    if value is None:
        return "–"
    if name == "relative_norm":
        return f"{100 * value:.2f}"
    if name in ("phi_zero", "curvature"):
        return f"{value:.3f}"
    return f"{value:.1f}" if isinstance(value, float) and not (name == "r" and value.is_integer()) else f"{value:.0f}"


def class_table(record: ByClass) -> Table:
    """Table of scores by class, the worst first."""
    names, shown = record.worst, record.worst[:MOST_ROWS]
    more = f", the {len(shown)} of lowest F1" if len(shown) < len(names) else ""
    table = Table(title=f"By class{more}", title_justify="left", box=box.SIMPLE_HEAD)
    table.add_column("class")
    for heading in ("precision", "recall", "F1", "examples"):
        table.add_column(heading, justify="right", no_wrap=True)
    for name in shown:
        scores = record.classes[name]
        values = [f"{scores[key]:.4f}" for key in ("precision", "recall", "f1")]
        table.add_row(escape(printable(name)), *values, f"{scores['support']:,}")
    if pairs := record.confused[:_MOST_PAIRS]:
        table.caption = escape(printable(f"Most confused: {'; '.join(map(str, pairs))}."))
        table.caption_justify = "left"
    return table


_EXPORTED = ("r", "stable", "rank", "energy %", "parameters")


def factors_table(factors: Sequence[Factors], title: str, *, width: int = 120, every: bool = False) -> Table:
    """Table of exported factors by module (for many modules, by type), then the sum.

    Args:
        factors: result of `factorize`.
        title: table title.
        width: terminal width; longer paths are truncated on the left.
        every: show all modules, however many.

    """
    is_single = every or len(factors) <= MOST_ROWS
    with_stack = has_several_stacks(pair.module for pair in factors)
    groups = _grouped(
        factors, lambda pair: pair.module if is_single else type_label(pair.module, with_stack=with_stack)
    )
    rows = {label: _cells(pairs) for label, pairs in groups.items()}
    return _table(title, _EXPORTED, [rows, {"all": ["", "", *_cells(factors)[2:]]}], width, padding=1)


def _cells(pairs: Sequence[Factors]) -> list[str]:
    """Cells of a row that summarizes modules: r, mean stable rank, least and largest rank, kept energy, parameters."""
    ranks, trained = sorted(pair.rank for pair in pairs), {pair.r for pair in pairs}
    rank = str(ranks[0]) if ranks[0] == ranks[-1] else f"{ranks[0]} to {ranks[-1]}"
    return [
        "–" if trained == {None} or len(trained) > 1 else str(*trained),
        f"{sum(pair.stable_rank for pair in pairs) / len(pairs):.1f}",
        "left out" if ranks[-1] == 0 else rank,
        f"{100 * kept_energy(pairs):.2f}",
        f"{sum(pair.parameters for pair in pairs):,}",
    ]


def _table(
    title: str, headings: Sequence[str], sections: list[dict[str, list[str]]], width: int, padding: int = 0
) -> Table:
    """Table of sections of label → cells, with labels shortened to fit the width."""
    table = Table(title=printable(title), title_justify="left", caption_justify="left", box=box.SIMPLE_HEAD)
    table.padding, table.pad_edge = (0, padding), False
    table.add_column("module", no_wrap=True)
    for heading in headings:
        table.add_column(heading, justify="right", no_wrap=True)
    cells = [headings, *(values for section in sections for values in section.values())]
    # Each column has a divider and padding on both sides; the table has two edges.
    room = width - sum(max(map(len, column)) + 1 + 2 * padding for column in zip(*cells, strict=True)) - 2
    for section in sections:
        for label, values in section.items():
            table.add_row(escape(printable(shortened(label, room))), *values)
        table.add_section()
    return table


def shortened(path: str, room: int) -> str:
    """Shorten a module path to `room` characters by dropping leading parts; parts are never cut."""
    names = path.split(".")
    first = next((i for i in range(len(names)) if len(".".join(names[i:])) + 2 * (i > 0) <= room), len(names) - 1)
    return ("… " if first else "") + ".".join(names[first:])
