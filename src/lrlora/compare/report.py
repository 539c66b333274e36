"""The report of a comparison: Markdown, CSV and pictures, made from the stored jobs alone."""

from __future__ import annotations

import math
from pathlib import Path

import pandas as pd

from ..files import write_whole
from ..report.figure import save_figure
from .figures import parameters_figure, ranks_figure, rates_figure
from .jobs import Comparison, check_folder, read_records
from .methods import find_method
from .tables import final_runs, learned_ranks, ranks_by_layer, results, tidy, tuning, variants, wins

# Digits after the point; what is not here is written as it is.
_DIGITS = {"mean": 1, "std": 1, "difference": 1, "standard error": 1, "p": 3, "time": 2, "memory": 2, "loss": 1}
_DIGITS |= {"stable rank": 2, "energy-99 rank": 1, "mean difference": 1, "modules differ: p": 4}
_DIGITS |= {"std over modules, log": 2, "share of variance": 2, "share from": 2, "share to": 2}
_DIGITS |= {"attention − MLP, log": 2, "from": 2, "to": 2, "Cohen's d": 2}


def write_report(comparison: Comparison, output: Path) -> Path:
    """Write `report.md`, `results.csv`, `runs.jsonl` and pictures into the folder of a comparison.

    Raises:
        FileExistsError: the folder holds another comparison.
        ValueError: no job is finished yet.

    """
    check_folder(comparison, output)
    records = comparison.select(read_records(output))
    if not records:
        raise ValueError(f"No job in {output} is finished yet: there is nothing to report.")
    write_whole(output / "runs.jsonl", tidy(records).to_json(orient="records", lines=True))
    table = results(comparison, records)
    parts = [f"# {comparison.suite}: {comparison.definition.model}, r = {comparison.rank}\n"]
    if len(table):
        write_whole(output / "results.csv", table.to_csv(index=False))
        reference = find_method(comparison.reference).name
        parts += [
            "Test metric and test loss (log loss, of numbers the root of the mean squared error), times 100, over "
            "seeds, each method at its own learning rate. `difference` ± `standard error` and p (paired by seed, "
            f"corrected by Holm) are the metric's against {reference}; time and memory are relative to it.\n",
            markdown(table.drop(columns=["from", "to"])),
            "\n## Who wins\n",
            f"On how many of its tasks a method has the best mean of all, and one above {reference}'s; the mean of its "
            "differences.\n",
            markdown(wins(table)),
            "\n![Metric and loss against trainable parameters](parameters.png)\n",
            "Mean and standard deviation. Methods of about the same size are drawn side by side.\n",
        ]
        save_figure(parameters_figure(comparison, final_runs(records)), output / "parameters.png")
    if len(rates := tuning(records)):
        parts += [
            "\n## How much hangs on the learning rate\n",
            "Validation loss on the tuning seed (of numbers, the root of the mean squared error).\n",
            markdown(rates),
            "\n![Validation loss by learning rate](rates.png)\n",
        ]
        save_figure(rates_figure(comparison, rates), output / "rates.png")
    ranks = learned_ranks(records)
    if len(ranks):
        parts += [
            "\n## Learned ranks\n",
            "Stable ranks, in the logarithm, with 95 % intervals. Modules: p that they differ (by permutation), their "
            "standard deviation, and how much of all variance is between modules, the rest being between seeds. Kinds: "
            "attention less MLP.\n",
            markdown(ranks),
        ]
    if places := ranks_by_layer(comparison, records):
        parts.append("\n![Stable rank by layer and type of module, mean over seeds](ranks.png)\n")
        save_figure(ranks_figure(places), output / "ranks.png")
    if len(others := variants(comparison, records)):
        parts += [
            "\n## What of φ matters\n",
            "Variants of LR-LoRA less LR-LoRA: test metric and test loss times 100, paired by seed, with 95 % "
            "intervals, p corrected (Holm).\n",
            markdown(others),
        ]
    failures = [record for record in records.values() if record.get("failure")]
    if failures:
        parts.append("\n## What failed\n\nA method on a task has no mean where a final run failed.\n")
        parts += [f"- {r['task']}, {r['method']}, {r['learning_rate']:g}: {r['failure']}" for r in failures]
    path = output / "report.md"
    write_whole(path, "\n".join(parts) + "\n")
    return path


def markdown(frame: pd.DataFrame) -> str:
    """A frame as a table."""

    def show(name: object, value: object) -> str:
        if isinstance(value, float):
            if math.isnan(value):
                return ""
            return f"{value:.{_DIGITS[str(name)]}f}" if name in _DIGITS else f"{value:g}"
        return f"{value:,}" if isinstance(value, int) else str(value)

    rows = [[show(name, value) for name, value in row.items()] for row in frame.to_dict("records")]
    lines = [list(map(str, frame.columns)), ["---"] * len(frame.columns), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
