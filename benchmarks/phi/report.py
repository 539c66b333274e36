"""Tables and pictures of the study of φ, from the stored results: python benchmarks/phi/report.py.

Rewrites the generated parts of `docs/phi.md` and the pictures in `docs/phi/`.
"""

from __future__ import annotations

import json
import math
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

DOCS = Path(__file__).parents[2] / "docs"
sys.path.insert(0, str(DOCS))

import matplotlib  # noqa: E402

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402
import numpy as np  # noqa: E402
from scipy.stats import bootstrap, permutation_test  # noqa: E402
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
    optimizer = f"{source['optimizer']} {source['learning_rate']:g}"
    return f"{model}, {source['task']}, {optimizer}, {source['steps']} × {source['batch_size']}"


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


# Layer 3: the comparison. Tuning runs have seed 0 and no test accuracy; the others are at the rate chosen for their cell.

Cell = tuple[str, int, str]


def comparison_runs() -> list[Record]:
    """The runs of layer 3."""
    return [run for run in read("runs.jsonl") if not run["watch_ranks"]]


def cell(run: Record) -> Cell:
    """(task, r, method and settings)."""
    return run["task"], run["r"], label(run)


def finals() -> dict[Cell, dict[int, Record]]:
    """Cell → seed → run at the chosen rate."""
    cells: dict[Cell, dict[int, Record]] = defaultdict(dict)
    for run in comparison_runs():
        if "test_accuracy" in run:
            cells[cell(run)][run["seed"]] = run
    return cells


def mean_and_error(values: Sequence[float]) -> tuple[float, float]:
    """Mean and its standard error."""
    return fmean(values), stdev(values) / math.sqrt(len(values))


def comparison_table() -> str:
    """Test accuracy of every cell, and the difference to LoRA at the same r, paired by seed."""
    header = ["task", "r", "method", "rate", "seeds", "test accuracy", "difference to LoRA at r", "test loss"]
    header += ["stable rank", "energy-90", "energy-99"]
    rows, cells = [], finals()
    for (task, r, method), runs in sorted(cells.items()):
        if len(runs) < 2:
            continue
        accuracy, error = mean_and_error([run["test_accuracy"] for run in runs.values()])
        lora = cells.get((task, r, "LoRA"), {})
        differences = [run["test_accuracy"] - lora[seed]["test_accuracy"] for seed, run in runs.items() if seed in lora]
        difference = ""
        if method != "LoRA" and len(differences) > 1:
            difference = "{:+.1f} ± {:.1f}".format(*(100 * value for value in mean_and_error(differences)))
        rows.append(
            [
                task,
                str(r),
                method,
                f"{next(iter(runs.values()))['learning_rate']:g}",
                str(len(runs)),
                f"{100 * accuracy:.1f} ± {100 * error:.1f}",
                difference,
                f"{fmean(run['test_loss'] for run in runs.values()):.3f}",
                f"{fmean(module_mean(run, 'stable_rank') for run in runs.values()):.2f}",
                f"{fmean(module_mean(run, 'energy90_rank') for run in runs.values()):.1f}",
                f"{fmean(module_mean(run, 'energy99_rank') for run in runs.values()):.1f}",
            ]
        )
    return table(header, rows)


def tuning_table() -> str:
    """Validation accuracy (and loss) of every cell by learning rate, on the tuning seed."""
    cells: dict[Cell, dict[float, Record]] = defaultdict(dict)
    for run in comparison_runs():
        if "test_accuracy" not in run:
            cells[cell(run)][run["learning_rate"]] = run
    rates = sorted({rate for runs in cells.values() for rate in runs})
    rows = [
        [
            *map(str, name),
            *(
                f"{100 * runs[rate]['validation_accuracy']:.1f} ({runs[rate]['validation_loss']:.3f})"
                if rate in runs
                else ""
                for rate in rates
            ),
        ]
        for name, runs in sorted(cells.items())
    ]
    return table(["task", "r", "method", *(f"{rate:g}" for rate in rates)], rows)


def ranks_table_of(method: str) -> str:
    """Whether ranks differ between modules and between attention and MLP: by task and r, over the seeds."""
    header = [
        "task",
        "r",
        "seeds",
        "modules differ, p",
        "attention − MLP, log stable rank",
        "95 % interval",
        "Cohen's d",
    ]
    rows = []
    for (task, r, name), runs in sorted(finals().items()):
        if name != method or len(runs) < 2:
            continue
        by_seed = np.log([[row["stable_rank"] for row in run["ranks"]] for run in runs.values()])
        kinds = np.array([row["kind"] for row in next(iter(runs.values()))["ranks"]])
        # Under the null hypothesis a module's rank says nothing about its rank under another seed.
        p = permutation_test(
            by_seed,
            lambda *seeds: np.var(np.mean(seeds, axis=0)),
            permutation_type="pairings",
            alternative="greater",
            vectorized=False,
            n_resamples=2000,
            rng=np.random.default_rng(0),
        ).pvalue
        attention, mlp = (by_seed.mean(0)[kinds == kind] for kind in ("attention", "mlp"))
        interval = bootstrap(
            (attention, mlp), lambda a, b: a.mean() - b.mean(), vectorized=False, rng=np.random.default_rng(0)
        ).confidence_interval
        d = (attention.mean() - mlp.mean()) / math.sqrt((attention.var(ddof=1) + mlp.var(ddof=1)) / 2)
        difference = f"{attention.mean() - mlp.mean():+.2f}"
        rows.append(
            [
                task,
                str(r),
                str(len(runs)),
                f"{p:.4f}",
                difference,
                f"{interval.low:+.2f} … {interval.high:+.2f}",
                f"{d:+.2f}",
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
        "tuning": tuning_table(),
        "comparison": comparison_table(),
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
