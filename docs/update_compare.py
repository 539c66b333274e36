"""Pack each stored comparison into one file, and fill the tables of docs/compare.md: python docs/update_compare.py."""

from __future__ import annotations

import gzip
import json
import math
from pathlib import Path

import pandas as pd

from lrlora_lab.jobs import PACKED_FILE, read_comparison, read_records
from lrlora_lab.sections import table, with_section

DOCS = Path(__file__).parent
SUITES = ("offline-nlu",)
COLUMNS = ("LoRA at 2r", "DoRA", "AdaLoRA")  # methods of the table of differences


def render_results() -> str:
    """The table of differences: a row for each task, a column for each method."""
    frame = pd.concat(pd.read_csv(DOCS / "compare" / suite / "results.csv") for suite in SUITES)
    rows = []
    for task, cells in frame.groupby("task", sort=False):
        by_method = cells.set_index("method")
        differences = (_difference(by_method.loc[name]) if name in by_method.index else "" for name in COLUMNS)
        rows.append([str(task), f"{by_method.loc['LoRA', 'mean']:.1f}", *differences])
    return table(["task", "LoRA", *COLUMNS], rows)


def _difference(row: pd.Series) -> str:
    if math.isnan(row["from"]):
        return f"{row['difference']:+.1f}"
    return f"{row['difference']:+.1f} ({row['from']:+.1f} to {row['to']:+.1f})"


def render_hours() -> str:
    """How long the stored runs took, by task."""
    rows, total = [], 0.0
    for suite in SUITES:
        folder = DOCS / "compare" / suite
        records = read_records(folder)
        reported = read_comparison(suite, folder).select(records)
        for task in dict.fromkeys(record["task"] for record in records.values()):
            runs = {name: record["wall"] / 3600 for name, record in records.items() if record["task"] == task}
            unused = sum(hours for name, hours in runs.items() if name not in reported)
            rows.append([task, str(len(runs)), f"{sum(runs.values()):.1f}", f"{unused:.1f}" if unused else ""])
            total += sum(runs.values())
    rows.append(["all", "", f"{total:.1f}", ""])
    return table(["task", "runs", "hours of one core", "of which not in the report"], rows)


def pack(folder: Path) -> None:
    """Put the finished jobs of a comparison into one file."""
    lines = [json.dumps({"job": name} | record) + "\n" for name, record in read_records(folder).items()]
    (folder / PACKED_FILE).write_bytes(gzip.compress("".join(lines).encode(), mtime=0))
    for path in folder.glob("jobs/*.json"):
        path.unlink()


def updated(page: str) -> str:
    """The page with its tables of the stored comparisons."""
    return with_section(with_section(page, "comparison", render_results()), "hours", render_hours())


if __name__ == "__main__":
    for folder in (DOCS / "compare").iterdir():
        pack(folder)
    page = DOCS / "compare.md"
    page.write_text(updated(page.read_text(encoding="utf-8")), encoding="utf-8")
