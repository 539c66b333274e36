"""The page of one or several runs: one HTML file that needs nothing else, neither network nor server."""

from __future__ import annotations

import html
import json
import math
import os
import re
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import vl_convert
from matplotlib import colormaps

from ..files import write_whole
from ..rank import MEASURES, RankReport
from .charts import CHARTS, COLOURS, specification
from .runs import Run

# Key of a row → label, digits after the point, what it is.
_SHOWN = {name: (measure.label, measure.digits, measure.about) for name, measure in MEASURES.items()} | {
    "relative_norm": ("size of the update, %", 2, "‖ΔW‖ in % of ‖W₀‖"),
    "curvature": ("curvature of φ", 3, "share of φ that no straight line explains"),
}
_IN_PERCENT = ("relative_norm",)
# Records over training, and points of a curve, that a page shows at most: more cannot be told apart, but weigh.
MOST_RECORDS, MOST_POINTS = 60, 400
_T = TypeVar("_T")


def write_page(runs: Sequence[Run], path: str | os.PathLike[str], title: str = "Learned ranks") -> None:
    """Write the page of one run, or of several beside each other.

    Needs `pip install lrlora[plots]`.

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
    parts = {
        "title": html.escape(title),
        "style": (folder / "page.css").read_text(encoding="utf-8"),
        "vega": vl_convert.javascript_bundle("window.vegaEmbed = vegaEmbed;"),
        "data": _in_script(_content(runs)),
        "charts": _in_script({name: specification(name, [run.name for run in runs]) for name in CHARTS}),
        "script": (folder / "page.js").read_text(encoding="utf-8"),
    }
    template = (folder / "page.html").read_text(encoding="utf-8")
    page = re.sub(r"\{\{(\w+)\}\}", lambda match: parts[match[1]], template)
    write_whole(path, page)


def _in_script(content: Any) -> str:
    """JSON that no text in it can end the script element of."""
    return json.dumps(content, ensure_ascii=False, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")


def _content(runs: Sequence[Run]) -> dict[str, Any]:
    rows = [asdict(row) for run in runs for report in _all_reports(run) for row in report.rows]
    keys = [key for key in _SHOWN if any(row[key] is not None for row in rows)]
    measures = [
        {"key": key, **dict(zip(("label", "digits", "about"), _SHOWN[key], strict=True))}
        | {"factor": 100 if key in _IN_PERCENT else 1}
        for key in keys
    ]
    shades = (255 * colormaps["cividis"](np.linspace(0, 1, 17))[:, :3]).round().astype(int).tolist()
    return {"measures": measures, "runs": [_run(run, keys) for run in runs], "colours": COLOURS, "shades": shades}


def _all_reports(run: Run) -> list[RankReport]:
    return [run.report, *(report for _, report in run.history)]


def _run(run: Run, keys: list[str]) -> dict[str, Any]:
    values = [*keys, "phi_zero"]  # in the order of the values of a record
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
