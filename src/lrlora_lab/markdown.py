"""Tables and lists of a report as Markdown."""

from __future__ import annotations

import math

import pandas as pd

from lrlora.checks import in_markdown

from .equivalence import EquivalentRank
from .jobs import Record
from .statistics import Interval

# Decimal places; other columns are not rounded.
_DIGITS = {"mean difference": 1, "loss": 1, "difference": 2, "p": 3, "time": 2, "memory": 2}
_DIGITS |= {"stable rank": 2, "energy-99 rank": 1, "attention − MLP": 3, "Cohen's d": 2}
_DIGITS |= {"loss (nats)": 3, "difference (nats)": 3, "std": 3, "step": 2, "terms": 1, "ρ": 2}
_DIGITS |= {"growth": 2, "stable rank at the fewest texts": 1, "at the most": 1}
_DIGITS |= {f"{name} differ: p": 4 for name in ("modules", "layers", "types")}
_DIGITS |= {f"share of {name}": 2 for name in ("modules", "layers", "types")}


def markdown(frame: pd.DataFrame) -> str:
    """Frame as a table."""

    def show(name: object, value: object) -> str:
        digits = _DIGITS.get(str(name))
        if value is None or isinstance(value, EquivalentRank):
            return "" if value is None else str(value)
        if isinstance(value, Interval):
            values = [show(name, part) for part in (value.value, value.low, value.high)]
            return values[0] if "" in values else f"{values[0]} ({values[1]} to {values[2]})"
        if isinstance(value, float):
            if math.isnan(value):
                return ""
            if math.isinf(value):
                return "failed"
            return f"{value:g}" if digits is None else f"{value:.{digits}f}"
        return f"{value:,}" if isinstance(value, int) else in_markdown(str(value))

    rows = [[show(name, value) for name, value in row.items()] for row in frame.to_dict("records")]
    lines = [[in_markdown(str(name)) for name in frame.columns], ["---"] * len(frame.columns), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def failure_line(record: Record) -> str:
    """List item with a failed job and the reason."""
    line = f"{record['task']}, {record['method']}, {record['learning_rate']:g}: {record['failure']}"
    return f"- {in_markdown(line)}"
