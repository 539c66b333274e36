"""Tables of lab/studies/loss.md."""

from __future__ import annotations

import math
import re
import statistics
from typing import Any

import numpy as np

from ..sections import table

BYTES = "byte model"
LANGUAGE = (BYTES, "german", "chat")
SHARES = {0.5: 4, 0.25: 2}  # share of the size of r = 8 → r of the LoRA trained at that size
KEEPS = (0.95, 0.99)
STAGES = ("cut", "keep", "own")
Record = dict[str, Any]


def kept_table(records: list[Record]) -> str:
    """Shares that were kept, over seeds."""
    rows = [{"task": record["task"]} | cut for record in records for cut in record["cuts"]]
    lines = []
    for name in dict.fromkeys(row["task"] for row in rows):
        for share in KEEPS:
            group = [row for row in rows if row["task"] == name and row["keep"] == share]
            if refused := [row["refused"] for row in group if "refused" in row]:
                most = [float(kept) for kept in re.findall(r"all directions, ([\d.]+)%", " ".join(refused))]
                why = f"{statistics.mean(most):.1f}% with all directions" if most else "no measurable gain"
                lines.append([name, f"{share:g}", str(len(group)), "not cut", why, "–", "–"])
                continue
            tests = [row["test"]["share"] for row in group]
            nats = [statistics.mean(row[key] for row in group) for key in ("without", "whole", "cut")]
            metrics = [statistics.mean(row[key] for row in group) for key in ("before", "after")]
            lines.append(
                [
                    name, f"{share:g}", str(len(group)), f"{statistics.mean(row['size'] for row in group):.0%}",
                    f"{statistics.mean(tests):.1%} ({min(tests):.1%} to {max(tests):.1%})",
                    "{:.3f}, {:.3f}, {:.3f}".format(*nats),
                    "{}: {:.3f}, {:.3f}".format(group[0]["metric"].replace("_", " "), *metrics),
                ]
            )  # fmt: skip
    heads = ["adapter", "asked", "seeds", "size", "kept on test data", "nats without, whole, cut", "metric whole, cut"]
    return table(heads, lines)


def own_table(rows: list[Record], cuts: list[Record]) -> str:
    """Cuts without data, over seeds."""
    sources = {"real": "its own data", "sampled": "with sampled labels", "fixed": "a fixed text", "own": "own text"}
    lines = []
    for name in dict.fromkeys(row["task"] for row in rows):
        group = [row for row in rows if row["task"] == name]
        others = [row for row in cuts if row["task"] == name]
        found = [
            [[row.get(f"{each}, {s}", math.nan) - row["whole"] for row in group] for s in SHARES] for each in sources
        ]
        found += [[[added(row, method, s) for row in others] for s in SHARES] for method in ("by energy", "every k")]
        line = [name, str(len(group)), *(", ".join(shown(statistics.mean(part)) for part in cell) for cell in found)]
        kept = [row["kept"]["share"] for row in group if "kept" in row]
        if kept:
            size = statistics.mean(row["size"] for row in group)
            line += [f"{size:.0%}", f"{statistics.mean(kept):.1%} ({min(kept):.1%} to {max(kept):.1%})"]
        lines.append(line if kept else [*line, "–", "–"])
    heads = ["adapter", "seeds", *sources.values(), "by energy", "every module k", "size for 0.95", "kept"]
    return table(heads, lines)


COLUMNS = {
    "by loss": "by loss", "by scalar": "one scalar a module", "by energy": "by energy", "every k": "every module k",
    "trained": "LoRA trained", "healed": "by loss, healed",
}  # fmt: skip


def added(row: Record, method: str, share: float) -> float:
    """Test loss added by a cut to the uncut adapter's; NaN if not measured."""
    loss = row.get(f"{method}, {share}")
    return math.nan if loss is None else float(loss - row["test"])


def shown(value: float) -> str:
    """Added loss."""
    return "–" if math.isnan(value) else f"{value:+.3f}"


def ratio(rows: list[Record], method: str, rival: str, share: float) -> str:
    """Ratio of the losses added by two methods, in units of the adapter's loss, over all rows.

    With the 95 % bootstrap interval of 10,000 draws of tasks, and of seeds of each.
    """
    tasks = dict.fromkeys(row["task"] for row in rows)
    values = [
        np.array(
            [[added(row, name, share) / row["test"] for name in (method, rival)] for row in rows if row["task"] == t]
        )
        for t in tasks
    ]
    chance = np.random.default_rng(0)
    drawn = np.empty((10_000, 2))
    for draw in drawn:
        draw[:] = sum(
            values[task][chance.integers(len(values[task]), size=len(values[task]))].sum(0)
            for task in chance.integers(len(values), size=len(values))
        )
    low, high = np.quantile(drawn[:, 0] / drawn[:, 1], [0.025, 0.975])
    mean = np.concatenate(values).sum(0)
    return f"{mean[0] / mean[1]:.2f} ({low:.2f} to {high:.2f})"


def sections(records: dict[str, Record]) -> dict[str, str]:
    """Tables of the page."""
    stages = {stage: [r for job, r in records.items() if job.startswith(f"{stage}--")] for stage in STAGES}
    rows = stages["cut"]
    groups = {name: [row for row in rows if row["task"] == name] for name in dict.fromkeys(r["task"] for r in rows)}
    parts = []
    for share in SHARES:
        lines = []
        for name, group in groups.items():
            cells = [statistics.mean(added(row, method, share) for row in group) for method in COLUMNS]
            test = statistics.mean(row["test"] for row in group)
            lines.append([name, str(len(group)), f"{test:.3f}", *map(shown, cells)])
        title = {0.5: "At half the parameters", 0.25: "At a quarter of them"}[share]
        parts.append(f"{title}:\n\n" + table(["adapter", "seeds", "test loss", *COLUMNS.values()], lines))
    found = {"cuts": "\n".join(parts)}
    adapters = [row for row in rows if row["task"] != "news-full"]
    pools = {
        "byte model": [row for row in rows if row["task"] == BYTES],
        "SmolLM2": [row for row in rows if row["task"] in ("german", "chat")],
        "language models": [row for row in rows if row["task"] in LANGUAGE],
        "classifiers": [row for row in adapters if row["task"] not in LANGUAGE],
        "all of these": adapters,
        "full fine-tuning": [row for row in rows if row["task"] == "news-full"],
    }
    lines = [
        [
            name,
            f"{share:g}",
            *(ratio(pool, "by loss", rival, share) for rival in ("by energy", "every k", "sv_fro", "by scalar")),
        ]
        for name, pool in pools.items()
        if pool
        for share in SHARES
    ]
    heads = ["adapters", "size", "over by energy", "over every module k", "over one share", "over one scalar"]
    found["ratios"] = table(heads, lines)
    lines = []
    for name, group in groups.items():
        predicted = [statistics.mean(row[f"predicted, {share}"] for row in group) for share in SHARES]
        actual = [statistics.mean(added(row, "by loss", share) for row in group) for share in SHARES]
        said = [f"{one:.3f} / {two:.3f}" for one, two in zip(predicted, actual, strict=True)]
        lines.append([name, *said])
    found["predicted"] = table(["adapter", "at 1/2", "at 1/4"], lines)
    found |= {"kept": kept_table(stages["keep"]), "own": own_table(stages["own"], rows)}
    if known := records.get("costs"):
        command, layer = known["MiniLM"], known["layer"]
        lines = [
            [
                "`lrlora export --keep 0.99`, MiniLM, LoRA r = 8",
                f"{command['seconds']:.0f} s",
                f"{command['gibibytes']:.1f} GiB",
            ],
            ["forward and backward of one layer of 7B shapes, 512 tokens, bfloat16", f"{layer['step']:.2f} s", ""],
            ["the same with the moments of its 7 modules, LoRA r = 16", f"{layer['moments']:.2f} s", ""],
            ["the directions of these modules", f"{layer['directions']:.3f} s", ""],
            ["the moments of all 32 layers, counted", "", f"{layer['megabytes of all 32 layers']:.1f} MB"],
        ]
        found["costs"] = table(["what", "time", "memory"], lines)
    return found
