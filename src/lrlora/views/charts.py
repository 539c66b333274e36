"""Charts of the report page, as Vega-Lite specifications with named, empty data.

The page's script fills in the data and updates it on interaction.
"""

from __future__ import annotations

import json
import textwrap
from collections.abc import Callable, Sequence
from typing import Any

import altair as alt

from .figure import COLOURS

Chart = alt.Chart | alt.LayerChart | alt.FacetChart
_SHAPES = ("circle", "square", "triangle-up", "diamond", "cross", "triangle-down")
_DASHES = ([1, 0], [6, 3], [2, 2], [8, 3, 2, 3])
_NAME_WIDTH = 32  # characters of a run's name per legend line, to fit on a phone
_STEP = alt.X("step:Q", title="step")
_PARAMETERS = alt.X(
    "parameters:Q", title="parameters", scale=alt.Scale(type="log", nice=False), axis=alt.Axis(format="~s")
)


def _legend(runs: Sequence[str], drawn: Sequence[str] | None) -> alt.Legend | None:
    """Legend for colors and shapes, with wrapped names, of the runs drawn (None: all); None for a single one."""
    drawn = runs if drawn is None else drawn
    if len(drawn) <= 1:
        return None
    lines = [textwrap.wrap(name, _NAME_WIDTH) or [name] for name in runs]
    label = f"({json.dumps(lines)})[indexof({json.dumps(list(runs))}, datum.value)]"
    options: dict[str, Any] = {"orient": "top", "columns": 1, "labelLimit": 270, "labelExpr": label}
    return alt.Legend(title=None, values=list(drawn), symbolOpacity=1, **options)


def _of_run(runs: Sequence[str], drawn: Sequence[str] | None = None) -> alt.Color:
    """Color of a run, the same in every chart."""
    scale = alt.Scale(domain=list(runs), range=list(COLOURS[: len(runs)]))
    return alt.Color("run:N", scale=scale, legend=_legend(runs, drawn))


def _shape(runs: Sequence[str], drawn: Sequence[str] | None = None) -> alt.Shape:
    """Shape of a run, the same in every point chart; distinguishes runs in grayscale."""
    scale = alt.Scale(domain=list(runs), range=list(_SHAPES[: len(runs)]))
    return alt.Shape("run:N", scale=scale, legend=_legend(runs, drawn))


def _dash(field: str) -> alt.StrokeDash:
    # A line symbol, long enough to show its dashes.
    legend = alt.Legend(
        title=None, orient="top", columns=2, labelLimit=270, symbolType="M-3,0L3,0", symbolStrokeColor="gray",
        symbolOffset=10, labelOffset=20,
    )  # fmt: skip
    return alt.StrokeDash(f"{field}:N", scale=alt.Scale(range=_DASHES), sort=None, legend=legend)


def _lines(chart: alt.Chart, dash: str, runs: Sequence[str], pointed: str = "true") -> Chart:
    """Lines, dashed by a field, with small points where `pointed` holds; about eight per line have the run's shape."""
    line = ["run", dash]
    points = (
        chart.transform_filter(pointed)
        .transform_window(place="row_number()", groupby=line)
        .transform_joinaggregate(points="count()", groupby=line)
        .transform_calculate(marked="(datum.place - 1) % ceil(datum.points / 8) == 0")
        .mark_point(filled=True, opacity=1)
        .encode(shape=_shape(runs), size=alt.condition("datum.marked", alt.value(44), alt.value(8)))
    )
    return alt.layer(chart.mark_line(strokeWidth=2).encode(strokeDash=_dash(dash)), points)


def _chart(data: str, runs: Sequence[str], x: alt.X, y: alt.Y, *tips: str | alt.Tooltip) -> alt.Chart:
    """Named data in the color of their run, without marks."""
    return alt.Chart(alt.NamedData(data)).encode(x=x, y=y, color=_of_run(runs), tooltip=["run:N", *tips])


def kinds(runs: Sequence[str]) -> Chart:
    """One measure in attention, MLP and other modules: one point per module, and the median.

    Data "modules": run, kind, module, value; place and centre, positions of a point and of its run, in [0, 1].
    """
    x = alt.X("kind:N", title=None, axis=alt.Axis(labelAngle=0))
    points = (
        _chart("modules", runs, x, alt.Y("value:Q", title=None), "module:N", alt.Tooltip("value:Q", format=".3~f"))
        .mark_point(filled=True, size=28, opacity=0.55)
        .encode(xOffset=alt.XOffset("place:Q", scale=alt.Scale(domain=[0, 1])), shape=_shape(runs))
    )
    width = alt.ExprRef(f"min(36, 0.8 * bandwidth('x') / {len(runs)})")
    medians = (
        alt.Chart(alt.NamedData("modules"))
        .mark_tick(thickness=3, size=width, orient="horizontal")
        .encode(
            x="kind:N",
            xOffset=alt.XOffset("centre:Q", scale=alt.Scale(domain=[0, 1])),
            y="median(value):Q",
            color=_of_run(runs),
        )
    )
    return alt.layer(points, medians)


def history(runs: Sequence[str]) -> Chart:
    """One measure over training: the mean of each kind, the chosen module, and a rule at the displayed step.

    Data "history": run, series, step, value; "now": step.
    """
    y = alt.Y("value:Q", title=None, scale=alt.Scale(zero=True))
    chart = _chart("history", runs, _STEP, y, "series:N", "step:Q", alt.Tooltip("value:Q", format=".3~f"))
    rule = alt.Chart(alt.NamedData("now")).mark_rule(color="gray").encode(x="step:Q")
    return alt.layer(_lines(chart, "series", runs), rule)


def phi(runs: Sequence[str]) -> Chart:
    """φ of one module, learned and initial, over the histogram of its inputs.

    Data "curve": run, which, z, value; "entries": run, z, share.
    """
    bars = (
        alt.Chart(alt.NamedData("entries"))
        .mark_area(opacity=0.25, interpolate="step-after")
        .encode(
            x=alt.X("z:Q", title="z, an entry of g·BA (g: input gain)"),
            y=alt.Y("share:Q", stack=False, title="share of entries", axis=alt.Axis(format="%", grid=False)),
            color=_of_run(runs),
        )
    )
    tips = [alt.Tooltip("z:Q", format=".3~g"), alt.Tooltip("value:Q", format=".3~g")]
    chart = _chart("curve", runs, alt.X("z:Q"), alt.Y("value:Q", title="φ(z)"), "which:N", *tips)
    lines = chart.mark_line(strokeWidth=2).encode(strokeDash=_dash("which"))
    return alt.layer(bars, lines).resolve_scale(y="independent")


def spectrum(runs: Sequence[str]) -> Chart:
    """Singular values of one module's ΔW, and of s·BA, the plain-LoRA update of the same factors.

    Data "spectrum": run, which, index, sigma.
    """
    x = alt.X("index:Q", title="index of the singular value", scale=alt.Scale(type="log"))
    y = alt.Y("sigma:Q", title="singular value", scale=alt.Scale(type="log"), axis=alt.Axis(format=".0e"))
    chart = _chart("spectrum", runs, x, y, "which:N", "index:Q", alt.Tooltip("sigma:Q", format=".3~g"))
    return _lines(chart, "which", runs)


def energy(runs: Sequence[str]) -> Chart:
    """Share of the total energy of all updates kept, by number of parameters, and a rule at the chosen one.

    Data "energy": run, parameters, share; "size": parameters. The signal "picked" holds the parameters of a click.
    """
    picked = alt.selection_point(
        name="picked", encodings=["x"], nearest=True, on="click", toggle=False, clear=False, empty=False
    )
    y = alt.Y("share:Q", title="energy kept", scale=alt.Scale(domain=[0, 1]), axis=alt.Axis(format="%"))
    tips = [alt.Tooltip("parameters:Q", format=","), alt.Tooltip("share:Q", format=".1%")]
    chart = _chart("energy", runs, _PARAMETERS, y, *tips)
    points = chart.mark_point(filled=True, size=36, opacity=1, cursor="pointer").encode(shape=_shape(runs))
    rule = alt.Chart(alt.NamedData("size")).mark_rule(color="gray").encode(x="parameters:Q")
    return alt.layer(rule, chart.mark_line(strokeWidth=2), points.add_params(picked))


def loss(runs: Sequence[str], drawn: Sequence[str] | None = None) -> Chart:
    """Share of the gain in loss kept, by number of parameters, down to the lower end of its interval.

    Rules are at the chosen size, and at the share that the lower end had to reach. Data "losses": run, parameters,
    kept, low; "chosen": run, parameters, keep.
    """
    y = alt.Y("kept:Q", title="gain kept", scale=alt.Scale(zero=False), axis=alt.Axis(format="%"))
    shares = [alt.Tooltip(f"{name}:Q", format=".1%") for name in ("kept", "low")]
    tips = [alt.Tooltip("parameters:Q", format=","), *shares]
    color = _of_run(runs, drawn)
    chart = _chart("losses", runs, _PARAMETERS, y, *tips).encode(color=color)
    points = chart.mark_point(filled=True, size=36, opacity=1).encode(shape=_shape(runs, drawn))
    chosen = alt.Chart(alt.NamedData("chosen")).mark_rule(strokeDash=[3, 3]).encode(color=color)
    rules = [chosen.encode(x="parameters:Q"), chosen.encode(y="keep:Q"), chart.mark_rule().encode(y2="low:Q")]
    return alt.layer(*rules, chart.mark_line(strokeWidth=2), points)


def training(runs: Sequence[str]) -> Chart:
    """Loss and metrics over training, with points at the evaluations.

    Data "training": run, which, step, value.
    """
    y = alt.Y("value:Q", title=None, scale=alt.Scale(zero=False))
    chart = _chart("training", runs, _STEP, y, "which:N", "step:Q", alt.Tooltip("value:Q", format=".4~g"))
    return _lines(chart, "which", runs, "indexof(datum.which, 'eval_') == 0")


_ALL: tuple[Callable[..., Chart], ...] = (kinds, history, phi, spectrum, loss, energy, training)
CHARTS = {chart.__name__: chart for chart in _ALL}


def specification(name: str, runs: Sequence[str], **options: Any) -> dict[str, Any]:
    """One of `CHARTS` for these runs, as Vega-Lite, at container width."""
    chart: Any = CHARTS[name](runs, **options)
    about = (CHARTS[name].__doc__ or "").splitlines()[0]
    return chart.properties(width="container", height=260, description=about).to_dict()
