"""Fill docs/paper.md from the stored runs: python docs/update_paper.py."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from pathlib import Path

from sections import table, with_section

from lrlora_lab.jobs import Record, read_comparison, read_records
from lrlora_lab.methods import find_method
from lrlora_lab.statistics import Interval, paired_difference
from lrlora_lab.suite import Task, load_suite
from lrlora_lab.tables import final_runs, learned_ranks

DOCS = Path(__file__).parent
PAGE = DOCS / "paper.md"
# Suite → what it is called in the table.
SUITES = {
    "offline-nlu": "language",
    "offline-commonsense": "language",
    "capacity": "language, rank binds",
    "offline-vision": "vision",
}
PICTURES = ("picture-labels",)  # of `capacity`
LORA = "lora"
Cells = dict[tuple[str, str], list[Record]]


def _cells() -> Iterator[tuple[str, str, Cells]]:
    """(suite, modality, its final runs) of all that is stored."""
    for suite, modality in SUITES.items():
        folder = DOCS / "compare" / suite
        if not folder.is_dir():
            continue
        records = read_records(folder)
        # Of each method all seeds at the rate that was chosen: a folder may hold runs at others.
        cells = final_runs(read_comparison(suite, folder).of_all(records).select(records))
        for name, chosen in ((modality, False), ("vision, rank binds", True)):
            some = {cell: runs for cell, runs in cells.items() if (cell[0] in PICTURES) == chosen}
            if some:
                yield suite, name, some


def _score(suite: str, task: str) -> tuple[Callable[[Record], float], str]:
    """What is compared, of which more is better, and its unit."""
    known = load_suite(suite).tasks[task]
    if isinstance(known, Task):
        return lambda run: 100 * run["test"][known.metric], "points"
    return lambda run: -run["test"]["loss"], "nats"


def _rank_of(method: str) -> str:
    """The part of a method's name that LoRA's of the same r has too."""
    return "".join(f"+{part}" for part in method.split("+")[1:] if part.startswith("r="))


def _verdict(found: Interval, *, either: bool = False) -> str:
    """Of a claim that a difference is above zero, or, `either`, that there is one."""
    if math.isnan(found.low) or found.low <= 0 <= found.high:
        return "undecided"
    return "confirmed" if either or found.low > 0 else "refuted"


def _shown(found: Interval, unit: str) -> str:
    digits = 1 if unit == "points" else 3
    if math.isnan(found.low):
        return f"{found.value:+.{digits}f} {unit}, one seed"
    return f"{found.value:+.{digits}f} ({found.low:+.{digits}f} to {found.high:+.{digits}f}) {unit}"


def better_than_lora() -> list[list[str]]:
    """φ(BA), default and published, against LoRA of the same r."""
    rows = []
    for suite, modality, cells in _cells():
        for (task, method), runs in cells.items():
            known, lora = find_method(method), cells.get((task, LORA + _rank_of(method)))
            is_phi = method.partition("+")[0] in ("lr-lora", "paper") and "sharing" not in method
            if is_phi and lora is not None:
                rows.append([modality, task, known.name, *_against(suite, task, runs, lora)])
    return rows


def one_each_beats_one_for_all() -> list[list[str]]:
    """A φ for each module against one for all."""
    rows = []
    for suite, modality, cells in _cells():
        for shared in ("lr-lora-shared", "paper+r=4+sharing=global"):
            each = "lr-lora" if shared == "lr-lora-shared" else "paper+r=4"
            for task in dict.fromkeys(task for task, _ in cells):
                if (task, each) in cells and (task, shared) in cells:
                    found = _against(suite, task, cells[task, each], cells[task, shared])
                    rows.append([modality, task, find_method(each).name, *found])
    return rows


def _against(suite: str, task: str, runs: list[Record], others: list[Record]) -> tuple[str, str]:
    score, unit = _score(suite, task)
    ours, theirs = ({run["seed"]: score(run) for run in each} for each in (runs, others))
    seeds = [seed for seed in ours if seed in theirs]
    found = paired_difference([ours[seed] for seed in seeds], [theirs[seed] for seed in seeds])
    assert found is not None
    return _shown(found, unit), _verdict(found)


def ranks_differ() -> str:
    """Between modules, and between attention and MLP, in logarithms of φ(BA)'s stable rank; counts for LoRA."""
    rows, lora = [], []
    for _, modality, cells in _cells():
        records = {f"{task}{method}{run['seed']}": run for (task, method), runs in cells.items() for run in runs}
        for row in learned_ranks(records).to_dict("records"):
            p, gap = row["modules differ: p"], row["attention − MLP"]
            shown = f"{gap.value:+.2f} ({gap.low:+.2f} to {gap.high:+.2f})"
            found = ["confirmed" if p < 0.05 else "undecided", shown, _verdict(gap, either=True)]
            if row["method"] in ("LR-LoRA", "the paper's form, r=4"):
                rows.append([modality, row["task"], row["method"], f"{p:.4f}", *found])
            elif row["method"] in ("LoRA", "LoRA, r=4"):
                lora.append((row["task"], found[0], gap))
    gaps = [f"{task} ({gap.value:+.2f})" for task, _, gap in lora if _verdict(gap, either=True) == "confirmed"]
    differ = sum(verdict == "confirmed" for _, verdict, _ in lora)
    heads = ["", "task", "method", "modules differ: p", "verdict", "attention − MLP, ln", "verdict"]
    return (
        f"{table(heads, rows)}\nLoRA's modules differ on {differ} of {len(lora)} tasks; attention − MLP is significant "
        f"on {', '.join(gaps)}.\n"
    )


def updated(page: str) -> str:
    """The page with the tables of the stored runs."""
    heads = ["", "task", "method", "difference", "verdict"]
    page = with_section(page, "better", table(heads, better_than_lora()))
    page = with_section(page, "shared", table(heads, one_each_beats_one_for_all()))
    return with_section(page, "ranks", ranks_differ())


if __name__ == "__main__":
    PAGE.write_text(updated(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
