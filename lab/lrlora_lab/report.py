"""Report of a comparison: Markdown, CSV and figures, from the stored jobs alone."""

from __future__ import annotations

import math
from pathlib import Path

import pandas as pd

from lrlora.checks import in_markdown
from lrlora.files import write_whole

from .capacity_report import write_capacity_report
from .figures import parameters_figure, ranks_figure, rates_figure, save_figure
from .jobs import Comparison, Record, check_folder, read_records
from .statistics import Interval
from .tables import (
    SIGNIFICANT,
    against_reference,
    conditions,
    failure_line,
    fitted_ranks,
    markdown,
    ranks_by_layer,
    results,
    tuning,
    variants,
)


def write_report(comparison: Comparison, output: Path) -> Path:
    """Write `report.md`, `results.csv`, figures and PEFT's files to a comparison's folder.

    Raises:
        FileExistsError: the folder holds another comparison.
        ValueError: no job has finished.

    """
    check_folder(comparison, output)
    if comparison.definition.capacity_tasks:
        return write_capacity_report(comparison, output)
    records = comparison.select(read_records(output))
    if not records:
        raise ValueError(f"No job in {output} is finished, so there is nothing to report.")
    parts = [f"# {in_markdown(f'{comparison.suite}: {comparison.definition.model}')}, r = {comparison.r}\n"]
    for section in (_results, _rates, _fitted_ranks, _variants, _failures):
        parts += section(comparison, records, output)
    path = output / "report.md"
    write_whole(path, "\n".join(parts) + "\n")
    return path


def _results(comparison: Comparison, records: dict[str, Record], output: Path) -> list[str]:
    table = results(comparison, records)
    if not len(table):
        return []
    write_whole(output / "results.csv", table.to_csv(index=False))
    named = (record["label"] for record in records.values() if record["method"] == comparison.reference)
    reference = next(named, comparison.reference)
    parts = [
        "Training steps, batch size and number of examples of each task.\n",
        markdown(conditions(comparison, records)),
        "\n## Results\n",
        "Test metric and test loss (log loss, of numbers the root of the mean squared error), times 100, mean ± "
        "standard deviation over seeds, each method at its own learning rate. The difference, with the 95 % "
        "interval of a mean over such seeds, and p (paired t-test, corrected by Holm for all of the table) are the "
        f"metric's against {reference}; time and memory are relative to it, time unless other hardware was used. "
        "Intervals cover the variation between seeds, not that of the test sample.\n",
        markdown(_compact(table)),
    ]
    if len(compared := against_reference(comparison, table)):
        parts += [
            f"\n## Against {reference}\n",
            f"Number of tasks on which a method is better or worse than {reference} at p < {SIGNIFICANT} (after "
            "correction); on the others the difference is not statistically significant. Methods may have different "
            "tasks, and do not have those on which a run failed.\n",
            markdown(compared),
        ]
    save_figure(parameters_figure(comparison, records), output / "parameters.png")
    return [
        *parts,
        "\n![Metric and loss against trainable parameters](parameters.png)\n",
        "Mean and standard deviation. Methods of about the same size are drawn side by side.\n",
    ]


def _rates(comparison: Comparison, records: dict[str, Record], output: Path) -> list[str]:
    rates = tuning(records)
    if not len(rates):
        return []
    parts = [
        "\n## How much hangs on the learning rate\n",
        "Validation loss on the tuning seed (of numbers, the root of the mean squared error).\n",
        markdown(rates),
    ]
    measured = rates.replace(math.inf, math.nan).dropna(thresh=3)  # task, method and a loss
    shown = rates[rates["task"].isin(measured["task"])]
    if len(shown):
        parts.append("\n![Validation loss by learning rate](rates.png)\n")
        save_figure(rates_figure(records, shown), output / "rates.png")
    return parts


def _fitted_ranks(comparison: Comparison, records: dict[str, Record], output: Path) -> list[str]:
    parts, ranks = [], fitted_ranks(records)
    if len(ranks):
        parts += [
            "\n## Ranks of the updates\n",
            "Of stable ranks, in the logarithm, with 95 % intervals. Do modules differ, and how much of the variance "
            "lies between them and not between seeds of a module? Of the modules' means over seeds: do layers differ "
            "beyond their types, and types beyond their layers, and how much of the variance lies between them? (p by "
            "permutation.) Attention less MLP, the difference and Cohen's d.\n",
            markdown(ranks),
        ]
    if places := ranks_by_layer(comparison, records):
        parts.append("\n![Stable rank by layer and type of module, mean over seeds](ranks.png)\n")
        save_figure(ranks_figure(places), output / "ranks.png")
    return parts


def _variants(comparison: Comparison, records: dict[str, Record], output: Path) -> list[str]:
    others = variants(comparison, records)
    if not len(others):
        return []
    return [
        "\n## What of φ matters\n",
        "Variants of LR-LoRA less LR-LoRA: test metric and test loss times 100, paired by seed, with 95 % "
        "intervals, p corrected (Holm).\n",
        markdown(_compact(others)),
    ]


def _failures(comparison: Comparison, records: dict[str, Record], output: Path) -> list[str]:
    failures = [record for record in records.values() if record.get("failure")]
    if not failures:
        return []
    return [
        "\n## What failed\n\nA method on a task has no mean where a final run failed. The same command runs the failed "
        "jobs again, but for those that diverged.\n",
        *map(failure_line, failures),
    ]


def _compact(frame: pd.DataFrame) -> pd.DataFrame:
    """Merge the columns of a spread, or of a difference and its interval."""
    table = frame.drop(columns=["std", "standard error", "from", "to"], errors="ignore")
    if "std" in frame:
        spreads = frame["std"].map(lambda std: "" if math.isnan(std) else f" ± {std:.1f}")
        table["mean"] = frame["mean"].map("{:.1f}".format) + spreads
    columns = (frame[name] for name in ("difference", "from", "to"))
    table["difference"] = [Interval(*values) for values in zip(*columns, strict=True)]
    return table
