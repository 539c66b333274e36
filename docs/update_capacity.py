"""Fill docs/capacity.md from the stored runs: python docs/update_capacity.py."""

from __future__ import annotations

from pathlib import Path

from sections import with_section

from lrlora_lab.capacity_report import differences
from lrlora_lab.jobs import Comparison, read_records
from lrlora_lab.tables import markdown

FOLDER = Path(__file__).parent / "compare" / "capacity"
PAGE = Path(__file__).parent / "capacity.md"
SIZES = ((1, 32), (2, 16), (4, 8))
# What each row of the table of differences asks.
PAIRS = [
    *((f"expansion+r={r}+num_terms={q}", f"lora+r={r}") for r, q in SIZES),
    ("expansion+r=1+num_terms=128", "expansion+r=1+num_terms=32"),
    *((f"hira+r={r}", f"expansion+r={r}+num_terms={q}") for r, q in SIZES),
]


def updated(page: str) -> str:
    """The page with the tables of the stored runs."""
    comparison, records = Comparison("capacity", seeds=5), read_records(FOLDER)
    hours = sum(record["wall"] for record in records.values()) / 3600
    runs, records = len(records), comparison.of_all(records).select(records)
    page = with_section(page, "differences", f"{markdown(differences(records, PAIRS))}\n")
    return with_section(page, "hours", f"{runs} runs, {hours:.1f} hours of one core.\n")


if __name__ == "__main__":
    PAGE.write_text(updated(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
