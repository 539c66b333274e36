"""Tables and maps of `lrlora-lab paper`, from its rows alone."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import pandas as pd

from lrlora.files import write_whole
from lrlora.naming import module_kind, module_type

from .figures import ranks_figure, save_figure
from .jobs import TUNING_SEED
from .methods import find_method
from .paper import RANK, ROWS
from .pool import Record
from .statistics import paired_difference
from .study import read_rows
from .tables import SIGNIFICANT, by_place, final_runs, fitted_ranks, markdown, ratio, stable_ranks, tuning

_RATIO = "LR-LoRA / LoRA"


def write_paper_report(output: Path) -> Path:
    """Write `report.md` and `ranks.png` to the folder of the rows.

    Raises:
        ValueError: no row has a test.

    """
    rows = read_rows(output / ROWS)
    tests, records = scores(rows), records_of(rows)
    if not len(tests):
        raise ValueError(f"No run in {output} is tested, so there is nothing to report. Run lrlora-lab paper first.")
    ranks = fitted_ranks(records)
    parts = [
        "# GLUE and commonsense reasoning\n\n## Scores\n",
        "Score (accuracy; Matthews of CoLA, Pearson's r of STS-B) times 100, mean ± standard deviation over seeds, and "
        "test loss (of STS-B, the root of the mean squared error). Differences, of the score and of the loss, are from "
        "LoRA of the same r, paired by seed, with 95 % intervals; time is relative to it.\n",
        markdown(tests),
        "\n## Held-out loss by rate\n",
        markdown(tuning(records)),
    ]
    if len(ranks):
        save_figure(ranks_figure(maps(records)), output / "ranks.png")
        parts += [
            "\n## Ranks\n",
            f"Of ln stable ranks; {_RATIO}: of their quotient, by module and seed, which is what LR-LoRA does beyond "
            "LoRA. Layers: beyond the types of module, p by permutation. Attention − MLP: bootstrap over modules.\n",
            markdown(mean_ranks(records)),
            "",
            markdown(ranks),
            "\nNumber of tasks on which layers differ, and attention differs from MLP by its interval:\n",
            markdown(claims(ranks)),
            "\n![Stable rank by layer and type of module, mean over seeds](ranks.png)",
        ]
    write_whole(output / "report.md", "\n".join(parts) + "\n")
    return output / "report.md"


def lora_of(method: str) -> str:
    """LoRA of the same r."""
    r = find_method(method).options.get("r", RANK)
    return "lora" if r == RANK else f"lora+r={r}"


def scores(rows: Sequence[Record]) -> pd.DataFrame:
    """One row for each test and method: score and loss, and their paired differences to LoRA of the same r."""
    cells: dict[tuple[str, str], dict[int, Record]] = {}
    for row in rows:
        for name, test in (row.get("test") or {}).items():
            cells.setdefault((name, row["method"]), {})[row["seed"]] = {**row, **test}
    table = []
    for (name, method), runs in cells.items():
        base = {} if method == lora_of(method) else cells.get((name, lora_of(method)), {})
        seeds = sorted(runs.keys() & base.keys())
        values = [100 * run["score"] for run in runs.values()]
        spread = f" ± {stdev(values):.1f}" if len(values) > 1 else ""
        differences = {
            key: paired_difference(*([factor * each[seed][key] for seed in seeds] for each in (runs, base)))
            for key, factor in (("score", 100), ("loss", 1))
        }
        table.append(
            {
                "test": name,
                "method": find_method(method).name,
                "rate": next(iter(runs.values()))["learning_rate"],
                "seeds": len(runs),
                "guess": f"{100 * next(iter(runs.values()))['guess']:.1f}",
                "score": f"{fmean(values):.1f}{spread}",
                "difference": differences["score"],
                "loss (nats)": fmean(run["loss"] for run in runs.values()),
                "difference (nats)": differences["loss"],
                "time": ratio([*runs.values()], [*base.values()], "seconds"),
            }
        )
    return pd.DataFrame(table)


def records_of(rows: Sequence[Record]) -> dict[str, Record]:
    """Rows as records of a comparison; besides, of LR-LoRA's runs, the quotients of their stable ranks and LoRA's."""
    runs = {(row["task"], row["method"], row["learning_rate"], row["seed"]): row for row in rows}
    tested = {(row["task"], row["method"], row["seed"]): row for row in rows if row["seed"] != TUNING_SEED}
    records = {f"{key}": _record(row, find_method(row["method"]).name, row.get("ranks")) for key, row in runs.items()}
    for (task, method, seed), row in tested.items():
        base = tested.get((task, lora_of(method), seed), {}).get("ranks")
        if method.startswith("lr-lora") and base and row.get("ranks"):
            quotients = {
                module: [value / other for value, other in zip(values, base[module], strict=True)]
                for module, values in row["ranks"].items()
            }
            label = find_method(method).name.replace("LR-LoRA", _RATIO)
            records[f"{label} {task} {seed}"] = _record({**row, "method": f"{method} / LoRA"}, label, quotients)
    return records


def _record(row: Record, label: str, ranks: Mapping[str, Sequence[float]] | None) -> Record:
    listed = [
        {
            "module": module,
            "type": module_type(module),
            "kind": module_kind(module),
            "stable_rank": stable,
            "effective_rank": effective,
        }
        for module, (stable, effective) in (ranks or {}).items()
    ]
    return {**row, "label": label, "ranks": listed or None}


def mean_ranks(records: Mapping[str, Record]) -> pd.DataFrame:
    """Geometric means of stable and effective ranks over modules and seeds, of all and by kind."""
    table = []
    for (task, _), runs in final_runs(records).items():
        modules = [row for run in runs for row in run["ranks"] or ()]
        columns: dict[str, Any] = {"task": task, "method": runs[0]["label"]}
        for name in ("stable_rank", "effective_rank"):
            for kind in ("all", "attention", "mlp") if name == "stable_rank" else ("all",):
                logs = [math.log(row[name]) for row in modules if kind in ("all", row["kind"])]
                if logs:
                    columns[f"{name.replace('_', ' ')}, {kind}"] = f"{math.exp(fmean(logs)):.2f}"
        if modules:
            table.append(columns)
    return pd.DataFrame(table)


def claims(ranks: pd.DataFrame) -> pd.DataFrame:
    """By method: number of tasks with p < 0.05 that layers differ, and with attention above and below MLP."""
    gaps = ranks["attention − MLP"]
    marked = ranks.assign(
        layers=ranks["layers differ: p"] < SIGNIFICANT,
        above=[gap.low > 0 for gap in gaps],
        below=[gap.high < 0 for gap in gaps],
    )
    columns = {
        "tasks": ("task", "size"),
        "layers differ on": ("layers", "sum"),
        "attention above MLP on": ("above", "sum"),
        "attention below MLP on": ("below", "sum"),
    }
    return marked.groupby("method", sort=False).agg(**columns).reset_index()


def maps(records: Mapping[str, Record]) -> dict[tuple[str, str], dict[tuple[str, int | None], float]]:
    """(task, label) → (type, layer) → stable rank, mean over seeds, of LoRA and LR-LoRA."""
    return {
        (task, runs[0]["label"]): by_place(stable_ranks(runs).mean(), runs[0])
        for (task, method), runs in final_runs(records).items()
        if method.startswith(("lora", "lr-lora")) and runs[0]["ranks"]
    }
