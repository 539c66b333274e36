"""The page of one or several runs: one HTML file that needs nothing else, neither network nor server."""

from __future__ import annotations

import html
import json
import math
import os
import re
import shlex
from collections.abc import Sequence
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import vl_convert
from matplotlib import colormaps

from ..files import write_whole
from ..ranks import MEASURES, RankReport
from .charts import CHARTS, COLOURS, specification
from .energy import kept_over_size
from .figure import OPENING_MEASURE
from .runs import Run

# Key of a row → label, digits after the point, what it is.
_SHOWN = {name: (measure.label, measure.digits, measure.about) for name, measure in MEASURES.items()} | {
    "loss_rank": ("loss rank", 0, "rank in the smallest LoRA of about the same loss"),
    "relative_norm": ("size of the update, %", 2, "‖ΔW‖ in % of ‖W₀‖"),
    "curvature": ("curvature of φ", 3, "share of φ that no straight line explains"),
}
_IN_PERCENT = ("relative_norm",)
_OF_PHI = ("curvature", "phi_zero")
# Records over training, and points of a curve, that a page shows at most: more cannot be told apart, but weigh.
MOST_RECORDS, MOST_POINTS = 60, 400
_T = TypeVar("_T")


def write_page(runs: Sequence[Run], path: str | os.PathLike[str], title: str = "Learned ranks") -> None:
    """Write the page of one run, or of several beside each other.

    Needs `pip install '.[plots]'`.

    Raises:
        ValueError: there is no run, or more than there are colours; two have the same name; or one has no modules.

    """
    if not runs:
        raise ValueError("runs is empty: there is nothing to show.")
    if len(runs) > len(COLOURS):
        raise ValueError(f"A page tells {len(COLOURS)} runs apart at most, and was given {len(runs)}.")
    if empty := [run.name for run in runs if not run.report.rows]:
        raise ValueError(f"There is nothing to show of {', '.join(empty)}: the report has no modules.")
    if len({run.name for run in runs}) < len(runs):
        raise ValueError(f"Every run needs a name of its own; they are {', '.join(run.name for run in runs)}.")
    folder = Path(__file__).parent
    is_curved, is_learned = _is_curved(runs), any(part.linear for run in runs for part in run.report.spectra.values())
    parts = {
        "title": html.escape(title),
        "about": "ΔW = s·φ(BA): the shape of φ, learned for each module, decides how many directions its update uses."
        if is_curved
        else "How many directions the update of each module uses.",
        "shown": "φ and spectrum" if is_curved else "spectrum",
        "linear": " (solid), and of s·BA, what LoRA would make of the same factors (dashed)" if is_learned else "",
        "style": (folder / "page.css").read_text(encoding="utf-8"),
        "vega": _charts_library(),
        "data": _in_script(_content(runs)),
        "charts": _in_script({name: specification(name, [run.name for run in runs]) for name in CHARTS}),
        "script": "".join((folder / name).read_text(encoding="utf-8") for name in ("compare.js", "page.js")),
    }
    template = (folder / "page.html").read_text(encoding="utf-8")
    page = re.sub(r"\{\{(\w+)\}\}", lambda match: parts[match[1]], template)
    write_whole(path, page)


@cache
def _charts_library() -> str:
    """Vega-Embed in one script: a second's work, and the same for every page."""
    bundle: str = vl_convert.javascript_bundle("window.vegaEmbed = vegaEmbed;")
    return bundle


def _in_script(content: Any) -> str:
    """JSON that no text in it can end the script element of."""
    return json.dumps(content, ensure_ascii=False, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")


def _content(runs: Sequence[Run]) -> dict[str, Any]:
    rows = [asdict(row) for run in runs for report in _all_reports(run) for row in report.rows]
    left_out = () if _is_curved(runs) else _OF_PHI
    keys = [key for key in _SHOWN if key not in left_out and any(row[key] is not None for row in rows)]
    values = [key for key in (*keys, "phi_zero") if key not in left_out]
    measures = [
        {"key": key, **dict(zip(("label", "digits", "about"), _SHOWN[key], strict=True))}
        | {"factor": 100 if key in _IN_PERCENT else 1}
        for key in keys
    ]
    shades = (255 * colormaps["cividis"](np.linspace(0, 1, 17))[:, :3]).round().astype(int).tolist()
    return {
        "opening": OPENING_MEASURE,
        "measures": measures,
        "recorded": values,  # in the order of the values of a record
        "runs": [_run(run, values) for run in runs],
        "sizes": _sizes(runs),
        "losses": _losses(runs),
        "colours": COLOURS,
        "shades": shades,
    }


def _is_curved(runs: Sequence[Run]) -> bool:
    """Whether there is any φ to speak of."""
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
    """What each run keeps of its energy at the same sizes, and the two ends of the command that exports it."""
    budgets, kept = kept_over_size([run.report for run in runs])
    commands = [_export(run, "--by", "energy", "--budget") for run in runs]
    # As an array each: names of fields would be most of it.
    lists = [
        [(round(at.share, 5), at.parameters, at.smallest, round(at.mean, 2), at.largest) for at in points]
        for points in kept
    ]
    return {"budgets": budgets, "kept": lists, "commands": commands} if budgets else None


def _export(run: Run, *options: str) -> tuple[str, str]:
    """The two ends of a command that exports a run, between which the last option's value belongs."""
    source, *base = run.arguments or (run.name,)
    # What begins with a dash would be taken for an option.
    source = f"./{source}" if source.startswith("-") else source
    small = re.sub(r"(\.safetensors)?$", r"-small\1", source.rstrip("/"), count=1)
    return f"{shlex.join(['lrlora', 'export', source, *base, *options])} ", f" --output {shlex.quote(small)}"


def _losses(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """What was measured of the losses of smaller LoRAs, run by run, and the command for the chosen one."""
    found = []
    for run in runs:
        if (record := run.losses) is not None:
            option, value = ("--budget", record.chosen) if record.rise is None else ("--loss", record.rise)
            points = [
                {"run": run.name, "parameters": size, "loss": loss, "whole": record.loss}
                for size, loss in zip(record.sizes, record.losses, strict=True)
            ]
            begin, end = _export(run, option)
            found.append({"run": run.name, "points": points, "chosen": record.chosen, "rise": record.rise})
            found[-1] |= {"loss": record.loss, "command": f"{begin}{value}{end}"}
    return found


def _curves(log: list[dict[str, float]]) -> dict[str, list[tuple[int, float]]]:
    """Name → (step, value) of what training logged, without what is no number: losses and gradients may overflow."""
    curves: dict[str, list[tuple[int, float]]] = {}
    for entry in log:
        for name, value in entry.items():
            is_curve = name in ("loss", "learning_rate", "grad_norm") or name.startswith("eval_")
            if "step" not in entry or not is_curve or name.endswith(("_runtime", "_per_second")):
                continue
            if isinstance(value, (int, float)) and math.isfinite(value):
                curves.setdefault(name, []).append((int(entry["step"]), value))
    return curves


def _thinned(points: Sequence[_T], most: int) -> list[_T]:
    """So many of the points at most, the first and the last among them."""
    if len(points) <= most:
        return list(points)
    return [points[i] for i in np.linspace(0, len(points) - 1, most).round().astype(int)]


def _rows(report: RankReport, keys: list[str]) -> list[dict[str, Any]]:
    fixed = ("module", "layer", "type", "kind", "m", "n", "r")
    return [
        {name: row[name] for name in fixed} | {key: _short(row[key]) for key in keys}
        for row in map(asdict, report.rows)
    ]


def _short(value: float | None) -> float | None:
    return None if value is None else float(f"{value:.6g}")


def _in_order(report: RankReport, keys: list[str], modules: list[str]) -> list[list[float | None]]:
    """The values of some modules, in this order; None for a module that the report does not have."""
    rows = {row["module"]: row for row in _rows(report, keys)}
    return [[rows[module][key] if module in rows else None for key in keys] for module in modules]
