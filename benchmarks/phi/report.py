"""Tables and pictures of the study of φ, from the stored results: python benchmarks/phi/report.py.

Rewrites the generated parts of `docs/phi.md` and the pictures in `docs/phi/`.
"""

from __future__ import annotations

import json
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable
from pathlib import Path
from statistics import fmean
from typing import Any

DOCS = Path(__file__).parents[2] / "docs"
sys.path.insert(0, str(DOCS))

import matplotlib  # noqa: E402

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402
from sections import table, with_section  # noqa: E402

Record = dict[str, Any]
PAGE = DOCS / "phi.md"
STORED = DOCS / "phi"
TYPES = ("query", "key", "value", "attention output", "MLP up", "MLP down", "MLP gate")
_PLACES = {
    **{f"self.{name}": name for name in ("query", "key", "value")},
    **{"q_proj": "query", "k_proj": "key", "v_proj": "value", "o_proj": "attention output"},
    **{"up_proj": "MLP up", "down_proj": "MLP down", "gate_proj": "MLP gate"},
    **{"attention.output.dense": "attention output", "intermediate.dense": "MLP up", "output.dense": "MLP down"},
}


def read(name: str) -> list[Record]:
    """The records of a stored file."""
    path = STORED / name
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []


def place(module: str) -> str:
    """Where in its layer a module of either model sits."""
    return next(name for suffix, name in _PLACES.items() if module.endswith(suffix))


def group_means(pairs: Iterable[tuple[Any, float]]) -> dict[Any, float]:
    """Key → mean of its values, in the order of appearance."""
    groups = defaultdict(list)
    for name, value in pairs:
        groups[name].append(value)
    return {name: fmean(values) for name, values in groups.items()}


# Layer 1: what φ(BA) can represent.


class Fits:
    """The fits, beside the SVD of the same update."""

    def __init__(self) -> None:
        records = read("fits.jsonl")
        self.sources = {record["source"]: record for record in records if record["fit"] == "svd"}
        self.fits = [record for record in records if record["fit"] != "svd"]

    def gains(self, source: str, fit: str) -> dict[str, float]:
        """Module → energy kept by the fit beyond that of the best matrix of the same rank r."""
        svd = {module["module"]: module["svd"] for module in self.sources[source]["modules"]}
        for record in self.fits:
            if (record["source"], record["fit"]) == (source, fit):
                return {m["module"]: m["kept"] - svd[m["module"]][str(record["r"])] for m in record["modules"]}
        return {}

    def gain(self, source: str, fit: str) -> str:
        """The mean of `gains` in percentage points."""
        gains = self.gains(source, fit)
        return f"{100 * fmean(gains.values()):+.1f}" if gains else ""

    def mean(self, source: str, value: Callable[[Record], float]) -> float:
        """Mean over the modules of an update."""
        return fmean(map(value, self.sources[source]["modules"]))


MAIN_FORMS = ("tanh", "saturating N=8", "residual N=8", "residual N=50")


def describe(source: Record) -> str:
    """A source in words."""
    model = {"minilm": "MiniLM", "smollm2": "SmolLM2, 10 layers"}[source["model"]]
    return f"{model}, {source['task']}, {source['optimizer']} {source['learning_rate']:g}, {source['steps']} × {source['batch_size']}"


def updates_table(fits: Fits) -> str:
    """Real updates, and what each form keeps of them at r = 4."""
    header = ["full fine-tuning: model, task, optimizer and rate, steps × batch", "stable rank", "kurtosis"]
    header += ["rank 4 keeps, %", "rank 8 adds", *(f"{form} adds" for form in MAIN_FORMS)]
    rows = []
    for name, source in fits.sources.items():
        four, eight = (fits.mean(name, lambda m, k=k: m["svd"][k]) for k in ("4", "8"))
        numbers = [
            f"{fits.mean(name, lambda m: m['stable_rank']):.1f}",
            f"{fits.mean(name, lambda m: m['kurtosis']):.1f}",
        ]
        numbers += [f"{100 * four:.1f}", f"{100 * (eight - four):+.1f}"]
        rows.append([describe(source), *numbers, *(fits.gain(name, f"{form}, module, r=4") for form in MAIN_FORMS)])
    return table(header, rows)


def ranks_table(fits: Fits) -> str:
    """The same by r, where all were fitted."""
    header = ["full fine-tuning", "form", *(f"r = {r}" for r in (1, 2, 4, 8))]
    rows = []
    for name, source in fits.sources.items():
        for form in MAIN_FORMS:
            cells = [fits.gain(name, f"{form}, module, r={r}") for r in (1, 2, 4, 8)]
            if all(cells):
                rows.append([describe(source), form, *cells])
    return table(header, rows)


def types_table(fits: Fits, form: str) -> str:
    """The gain of one form at r = 4 by type of module."""
    rows = []
    for name, source in fits.sources.items():
        gains = group_means((place(module), gain) for module, gain in fits.gains(name, f"{form}, module, r=4").items())
        rows.append([describe(source), *(f"{100 * gains[t]:+.1f}" if t in gains else "" for t in TYPES)])
    return table(["full fine-tuning", *TYPES], rows)


def forms_table(fits: Fits) -> str:
    """All forms on the sources that had them all, r = 4."""
    names = [record["fit"] for record in fits.fits if record["r"] == 4]
    deep = [name for name in fits.sources if fits.gain(name, "sinc N=50, module, r=4")]
    rows = [
        [
            name.replace(", module, r=4", "").replace(", global, r=4", ", one φ for all"),
            *(fits.gain(s, name) for s in deep),
        ]
        for name in dict.fromkeys(names)
        if any(fits.gain(s, name) for s in deep)
    ]
    return table(["form", *(describe(fits.sources[s]) for s in deep)], rows)


# Layers 2 and 3: training.


def module_mean(run: Record, measure: str) -> float:
    """Mean of a measure over the modules of a run."""
    return fmean(row.get(measure) or 0.0 for row in run["ranks"])


def label(run: Record) -> str:
    """Method and settings of a run, in words."""
    if run["method"] == "lora":
        return "LoRA" if run.get("scaling", 1.0) == 1.0 else f"LoRA, s = {run['scaling']:g}"
    options = run["options"]
    words = [options["form"], f"g = {options['input_gain']}"]
    if options["form"] == "saturating" and options["phi_lr_multiplier"] < 1e-6:
        words[0] = "tanh, fixed"
    elif options["form"] != "sine":
        words += [f"N = {options['num_basis']}", f"μ = {options['phi_lr_multiplier']:g}"]
    if run.get("scaling", 1.0) != 1.0:
        words.append(f"s = {run['scaling']:g}")
    return ", ".join(words)


def dynamics_runs() -> list[Record]:
    """The runs of layer 2."""
    return [run for run in read("runs.jsonl") if run["watch_ranks"]]


def dynamics_table() -> str:
    """What settings do to loss and rank: one task, one seed."""
    header = [
        "method and settings",
        "rate",
        "accuracy",
        "loss",
        "training loss",
        "stable rank",
        "energy-90",
        "energy-99",
    ]
    header += ["‖ΔW‖/‖W‖", "curvature", "outside ±I, %", "φ(0)"]
    rows = []
    order = lambda run: (run["method"] != "lora", label(run), run.get("head_rate") or 0, run["learning_rate"])  # noqa: E731
    for run in sorted(dynamics_runs(), key=order):
        rows.append(
            [
                label(run),
                f"{run['learning_rate']:g}",
                f"{run.get('head_rate') or run['learning_rate']:g}",
                f"{run['validation_accuracy']:.3f}",
                f"{run['validation_loss']:.3f}",
                f"{run['train_loss']:.3f}",
                f"{module_mean(run, 'stable_rank'):.2f}",
                f"{module_mean(run, 'energy90_rank'):.1f}",
                f"{module_mean(run, 'energy99_rank'):.1f}",
                f"{module_mean(run, 'relative_norm'):.3f}",
                f"{module_mean(run, 'curvature'):.3f}",
                f"{100 * module_mean(run, 'outside'):.1f}",
                f"{fmean(abs(row['phi_zero']) for row in run['ranks']):.2f}",
            ]
        )
    return table(header, rows)


def sections() -> dict[str, str]:
    """Name of a generated section → its content."""
    fits = Fits()
    return {
        "updates": updates_table(fits),
        "updates-by-rank": ranks_table(fits),
        "updates-by-type": types_table(fits, "residual N=50"),
        "updates-by-form": forms_table(fits),
        "dynamics": dynamics_table(),
    }


def draw_dynamics() -> None:
    """Rank and loss over training, by setting."""
    figure, axes = plt.subplots(1, 2, figsize=(11, 4.2), constrained_layout=True)
    for run in dynamics_runs():
        if run["learning_rate"] != 4e-3 or run.get("scaling", 1.0) != 1.0:
            continue
        steps = [record["step"] for record in run["history"]]
        line = {"label": label(run), "linewidth": 2.5 if run["method"] == "lora" else 1.2}
        for axis, measure in zip(axes, ("stable_rank", "energy99_rank"), strict=True):
            axis.plot(steps[1:], [record[f"rank/{measure}_mean"] for record in run["history"]][1:], **line)
    axes[0].set(title="stable rank, mean over modules", xlabel="step")
    axes[1].set(title="energy-99 rank, mean over modules", xlabel="step", yscale="log")
    axes[1].legend(fontsize=6, loc="upper right")
    figure.savefig(STORED / "dynamics.png", dpi=130)
    plt.close(figure)


def updated(page: str) -> str:
    """The page's text with every generated section rendered anew."""
    for name, content in sections().items():
        page = with_section(page, name, content)
    return page


def main() -> None:
    """Rewrite page and pictures."""
    PAGE.write_text(updated(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
    draw_dynamics()


if __name__ == "__main__":
    main()
