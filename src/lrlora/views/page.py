"""Report page of one or more runs: a self-contained HTML file without network or server."""

from __future__ import annotations

import html
import json
import math
import os
import re
import shlex
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
import vl_convert
from torch import Tensor

from ..by_class import ByClass
from ..files import write_whole
from ..lora.factors import best_per_parameter
from ..naming import place_in_layer, position_in_stack, stack_of
from ..ranks import MEASURES, RankReport, Spectrum
from .charts import CHARTS, specification
from .figure import COLOURS, OPENING_MEASURE
from .runs import Run

# Row key → label, decimal places, description.
_SHOWN = {name: (measure.label, measure.digits, measure.about) for name, measure in MEASURES.items()} | {
    "loss_rank": ("loss rank", 0, "rank in the smallest LoRA of about the same loss"),
    "relative_norm": ("size of the update, %", 2, "‖ΔW‖ in % of ‖W₀‖"),
    "curvature": ("curvature of φ", 3, "share of φ that no straight line explains"),
}
# Maximum numbers of classes of a confusion matrix, of classes in the table, and of confused pairs.
MOST_IN_MATRIX, MOST_CLASSES, MOST_PAIRS = 12, 20, 10
_IN_PERCENT = ("relative_norm",)
_OF_PHI = ("curvature", "phi_zero")
# Maximum numbers of records over training, of curve points, and of sizes of an export: more are indistinguishable but
# increase the size of the page.
MOST_RECORDS, MOST_POINTS, MOST_SIZES = 60, 400, 60
_Kept = tuple[float, int, int, float, int]
_T = TypeVar("_T")


def require_shown(count: int) -> None:
    """Raise ValueError for more runs than a page has colors for."""
    if count > len(COLOURS):
        raise ValueError(f"A page supports at most {len(COLOURS)} runs, got {count}. Name those to show.")


def write_page(runs: Sequence[Run], path: str | os.PathLike[str], title: str = "Ranks") -> None:
    """Write the page of one run, or of several side by side.

    Requires `pip install '.[plots]'`.

    Raises:
        ValueError: no runs, or more runs than colors; duplicate names; or a run without modules.

    """
    if not runs:
        raise ValueError("runs is empty, so there is nothing to show.")
    require_shown(len(runs))
    if empty := [run.name for run in runs if not run.report.rows]:
        raise ValueError(f"Nothing to show for {', '.join(empty)}: the report has no modules.")
    if len({run.name for run in runs}) < len(runs):
        raise ValueError(f"Run names must be unique, got {', '.join(run.name for run in runs)}.")
    folder = Path(__file__).parent
    is_curved = _is_curved(runs)
    is_learned = any(spectrum.linear for run in runs for spectrum in run.report.spectra.values())
    names = [run.name for run in runs]
    options = {"loss": {"drawn": [run.name for run in runs if run.shrunk is not None]}}
    fields = {
        "title": html.escape(title),
        "about": "The smallest LoRA that keeps what was learned, and the directions that each module's update uses."
        + " LR-LoRA's update is s·φ(BA), with a learned φ for each module." * is_curved,
        "shown": "φ and spectrum" if is_curved else "spectrum",
        "linear": " (solid), and of s·BA, the LoRA update from the same factors (dashed)" if is_learned else "",
        "style": (folder / "page.css").read_text(encoding="utf-8"),
        "vega": _charts_library(),
        "data": _in_script(_content(runs)),
        "charts": _in_script({name: specification(name, names, **options.get(name, {})) for name in CHARTS}),
        "script": (folder / "page.js").read_text(encoding="utf-8"),
    }
    template = (folder / "page.html").read_text(encoding="utf-8")
    page = re.sub(r"\{\{(\w+)\}\}", lambda match: fields[match[1]], template)
    write_whole(path, page)


def is_page(path: Path) -> bool:
    """Whether a file is a page of `write_page`."""
    return path.is_file() and b'<meta name="generator" content="lrlora">' in path.read_bytes()[:200]


@cache
def _charts_library() -> str:
    """Vega-Embed as one script, cached: bundling takes a second."""
    bundle: str = vl_convert.javascript_bundle("window.vegaEmbed = vegaEmbed;")
    return bundle


def _in_script(content: Any) -> str:
    """JSON that cannot terminate the script element."""
    return json.dumps(content, ensure_ascii=False, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")


def _content(runs: Sequence[Run]) -> dict[str, Any]:
    rows = [row for run in runs for report in _all_reports(run) for row in report.rows]
    left_out = () if _is_curved(runs) else _OF_PHI
    keys = [key for key in _SHOWN if key not in left_out and any(getattr(row, key) is not None for row in rows)]
    values = [key for key in (*keys, "phi_zero") if key not in left_out]
    measures = [
        {"key": key, **dict(zip(("label", "digits", "about"), _SHOWN[key], strict=True))}
        | {"factor": 100 if key in _IN_PERCENT else 1}
        for key in keys
    ]
    return {
        "opening": OPENING_MEASURE,
        "measures": measures,
        "recorded": values,  # in the order of a record's values
        "runs": [_run(run, values) for run in runs],
        "sizes": _sizes(runs),
        "losses": _losses(runs),
        "classes": [_classes(run.name, run.by_class) for run in runs if run.by_class is not None],
        "colours": COLOURS,
    }


def _is_curved(runs: Sequence[Run]) -> bool:
    """Whether any run has a φ."""
    return any(run.report.curves for run in runs)


def _all_reports(run: Run) -> list[RankReport]:
    return [run.report, *(report for _, report in run.history)]


def _run(run: Run, values: list[str]) -> dict[str, Any]:
    modules = [row.module for row in run.report.rows]
    return {
        "name": run.name,
        "facts": run.facts,
        "settings": run.settings,
        "modules": _rows(run.report, values),
        "curves": {
            module: {"z": [curve.z[0], curve.z[-1]], "phi": curve.phi, "start": curve.start, "entries": curve.entries}
            for module, curve in run.report.curves.items()
        },
        "spectra": {module: spectrum._asdict() for module, spectrum in run.report.spectra.items()},
        "history": [
            {"step": step, "values": _in_order(report, values, modules)}
            for step, report in _thinned(run.history, MOST_RECORDS)
        ],
        "log": [
            {"step": step, "which": name, "value": value}
            for name, points in _curves(run.log).items()
            for step, value in _thinned(points, MOST_POINTS)
        ],
    }


def _sizes(runs: Sequence[Run]) -> dict[str, Any] | None:
    """Energy kept by each run at common sizes, and both parts of the export command."""
    budgets, kept = kept_over_size([run.report for run in runs])
    commands = [_export(run, "--by", "energy", "--size") for run in runs]
    return {"budgets": budgets, "kept": kept, "commands": commands} if budgets else None


def kept_over_size(reports: Sequence[RankReport]) -> tuple[list[int], list[list[_Kept]]]:
    """Parameter budgets, and what `factorize(budget=...)` keeps of each report at each budget.

    The budgets are shared by all reports and log-spaced, from one rank of a module to all ranks of the largest report.
    What is kept: the share of ‖ΔW‖²_F, all modules together; the parameters used, at most the budget; the smallest,
    mean and largest rank of a module. A report without spectra has an empty list.
    """
    runs = [
        (
            [singular_values(report.spectra.get(row.module, Spectrum([], []))).square() for row in report.rows],
            [row.m + row.n for row in report.rows],
        )
        for report in reports
    ]
    nonempty = [run for run in runs if any(map(len, run[0]))]
    if not nonempty:
        return [], [[] for _ in runs]
    first = max(min(cost for values, cost in zip(*run, strict=True) if len(values)) for run in nonempty)
    last = max(sum(len(values) * cost for values, cost in zip(*run, strict=True)) for run in nonempty)
    budgets = sorted({_round_up(budget) for budget in np.geomspace(first, last, MOST_SIZES).tolist()})
    return budgets, [
        [_energy_kept(*run, budget) for budget in budgets] if any(map(len, run[0])) else [] for run in runs
    ]


def singular_values(spectrum: Spectrum) -> Tensor:
    """All singular values; omitted ones are interpolated linearly in log σ over log number."""
    if not spectrum.number:
        return torch.zeros(0, dtype=torch.float64)
    number, sigma = np.log(spectrum.number), np.log(spectrum.sigma)
    return torch.from_numpy(np.exp(np.interp(np.log(np.arange(1, spectrum.number[-1] + 1)), number, sigma)))


def _energy_kept(energies: Sequence[Tensor], costs: Sequence[int], budget: int) -> _Kept:
    ranks = best_per_parameter(energies, costs, budget)
    energy = sum(values[:rank].sum().item() for values, rank in zip(energies, ranks, strict=True))
    share = energy / sum(values.sum().item() for values in energies)
    parameters = sum(rank * cost for rank, cost in zip(ranks, costs, strict=True))
    # A tuple, because field names would dominate the size of the page.
    return round(share, 5), parameters, min(ranks), round(sum(ranks) / len(ranks), 2), max(ranks)


def _round_up(budget: float) -> int:
    """Round up to three digits, which are easy to copy."""
    whole = math.ceil(budget)
    step = 10 ** max(0, len(str(whole)) - 3)
    return -(-whole // step) * step


def _export(run: Run, *options: str) -> tuple[str, str]:
    """Both parts of a run's export command; the last option's value goes between."""
    source, *base = run.arguments or (run.name,)
    # A leading dash would be parsed as an option.
    source = f"./{source}" if source.startswith("-") else source
    small = re.sub(r"(\.safetensors)?$", r"-small\1", source.rstrip("/"), count=1)
    return f"{shlex.join(['lrlora', 'export', source, *base, *options])} ", f" --output {shlex.quote(small)}"


def _losses(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """Share of the gain that smaller LoRAs keep, per run, and the export command for the chosen one."""
    losses = []
    for run in runs:
        if (record := run.shrunk) is not None:
            option, value = ("--size", record.parameters) if record.keep is None else ("--keep", record.keep)
            points = [
                {"run": run.name, "parameters": size, "kept": kept, "low": low}
                for size, kept, low in zip(record.sizes, record.shares, record.lows, strict=True)
            ]
            begin, end = _export(run, option)
            chosen = {"run": run.name, "parameters": record.parameters, "keep": record.keep}
            losses.append({"run": run.name, "points": points, "chosen": chosen, "text": str(record)})
            if record.step is None:  # else the run is as small
                losses[-1]["command"] = f"{begin}{value}{end}"
    return losses


def _classes(run: str, record: ByClass) -> dict[str, Any]:
    """Scores of the worst classes, the pairs most often confused, and the confusion matrix of a few classes."""
    names = list(record.classes) if len(record.classes) <= MOST_IN_MATRIX else []
    return {
        "run": run,
        "count": len(record.worst),
        "scores": [{"label": name, **record.classes[name]} for name in record.worst[:MOST_CLASSES]],
        "pairs": [pair._asdict() for pair in record.confused[:MOST_PAIRS]],
        "names": names,
        "matrix": [[record.confusion[label].get(answer, 0) for answer in names] for label in names],
    }


def _curves(log: list[dict[str, float]]) -> dict[str, list[tuple[int, float]]]:
    """Name → (step, value) from the training log, skipping non-finite values from overflowing losses and gradients."""
    curves: dict[str, list[tuple[int, float]]] = {}
    for entry in log:
        for name, value in entry.items():
            is_curve = name in ("loss", "learning_rate", "grad_norm") or name.startswith("eval_")
            if "step" not in entry or not is_curve or name.endswith(("_runtime", "_per_second")):
                continue
            if isinstance(value, (int, float)) and math.isfinite(value):
                curves.setdefault(name, []).append((int(entry["step"]), value))
    return curves


def _thinned(points: Sequence[_T], limit: int) -> list[_T]:
    """At most `limit` points, including the first and last."""
    if len(points) <= limit:
        return list(points)
    return [points[i] for i in np.linspace(0, len(points) - 1, limit).round().astype(int)]


def _rows(report: RankReport, keys: list[str]) -> list[dict[str, Any]]:
    fixed = ("module", "layer", "type", "kind", "m", "n", "r")
    return [
        {name: getattr(row, name) for name in fixed}
        | {key: _short(getattr(row, key)) for key in keys}
        | {
            "stack": stack_of(row.module),
            "position": position_in_stack(row.module),
            "place": place_in_layer(row.module),
        }
        for row in report.rows
    ]


def _short(value: float | None) -> float | None:
    return None if value is None else float(f"{value:.6g}")


def _in_order(report: RankReport, keys: list[str], modules: list[str]) -> list[list[float | None]]:
    """Values of the modules, in this order; None for a module missing from the report."""
    rows = {row.module: row for row in report.rows}
    return [[_short(getattr(rows[module], key)) if module in rows else None for key in keys] for module in modules]
