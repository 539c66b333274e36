"""Tables and pictures of the study of φ, from the stored results: python benchmarks/phi/report.py.

Rewrites the generated parts of `docs/phi.md` and the pictures in `docs/phi/`.
"""

from __future__ import annotations

import json
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable
from pathlib import Path
from statistics import fmean, median
from typing import Any

DOCS = Path(__file__).parents[2] / "docs"
sys.path.insert(0, str(DOCS))

import matplotlib  # noqa: E402

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402
import numpy as np  # noqa: E402
from scipy.stats import sem  # noqa: E402
from sections import table, with_section  # noqa: E402

from lrlora_lab.statistics import columns_differ, gap, paired_difference  # noqa: E402

Record = dict[str, Any]
PAGE = DOCS / "phi.md"
STORED = DOCS / "phi"
RANKS = (1, 2, 4, 8)
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

    def gains(self, source: str, form: str, r: int = 4, sharing: str = "module") -> dict[str, float]:
        """Module → energy kept beyond that of the best matrix of the same rank r, by the best of the starts."""
        svd = {module["module"]: module["svd"] for module in self.sources[source]["modules"]}
        gains: dict[str, float] = {}
        for record in self.fits:
            if (record["source"], record["name"], record["r"], record["sharing"]) == (source, form, r, sharing):
                for module in record["modules"]:
                    name = module["module"]
                    gain = module["kept"] - svd[name][str(r)]
                    gains[name] = max(gain, gains.get(name, gain))
        return gains

    def gain(self, source: str, form: str, r: int = 4, sharing: str = "module") -> str:
        """The mean of `gains` in percentage points."""
        gains = self.gains(source, form, r, sharing)
        return f"{100 * fmean(gains.values()):+.1f}" if gains else ""

    def kurtosis(self, source: str) -> float:
        """Median over the modules of the kurtosis of the update's entries; 3 for a normal variable."""
        return median(module["kurtosis"] for module in self.sources[source]["modules"])

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
    header = ["full fine-tuning: model, task, optimizer and rate, steps × batch", "stable rank", "kurtosis, median"]
    header += ["rank 4 keeps, %", "rank 8 adds", *(f"{form} adds" for form in MAIN_FORMS)]
    rows = []
    for name, source in fits.sources.items():
        four, eight = (fits.mean(name, lambda m, k=k: m["svd"][k]) for k in ("4", "8"))
        numbers = [
            f"{fits.mean(name, lambda m: m['stable_rank']):.1f}",
            f"{fits.mean(name, lambda m: m['kurtosis']):.1f}",
        ]
        numbers += [f"{100 * four:.1f}", f"{100 * (eight - four):+.1f}"]
        rows.append([describe(source), *numbers, *(fits.gain(name, form) for form in MAIN_FORMS)])
    return table(header, rows)


def ranks_table(fits: Fits) -> str:
    """The unbounded forms by r, where all were fitted."""
    header = ["full fine-tuning", "form", *(f"r = {r}" for r in RANKS)]
    rows = []
    for name, source in fits.sources.items():
        for form in ("residual N=8", "residual N=50"):
            cells = [fits.gain(name, form, r) for r in RANKS]
            if all(cells):
                rows.append([describe(source), form, *cells])
    return table(header, rows)


def types_table(fits: Fits, form: str) -> str:
    """The gain of one form at r = 4 by type of module."""
    rows = []
    for name, source in fits.sources.items():
        gains = group_means((place(module), gain) for module, gain in fits.gains(name, form).items())
        rows.append([describe(source), *(f"{100 * gains[t]:+.1f}" if t in gains else "" for t in TYPES)])
    return table(["full fine-tuning", *TYPES], rows)


def forms_table(fits: Fits) -> str:
    """All forms on the sources that had them all, r = 4, with a φ for each module and with one for all."""
    deep = [name for name in fits.sources if fits.gain(name, "sinc N=50")]
    forms = dict.fromkeys(record["name"] for record in fits.fits if record["source"] in deep)
    rows = [
        [form + words, *(fits.gain(source, form, sharing=sharing) for source in deep)]
        for sharing, words in (("module", ""), ("global", ", one φ for all"))
        for form in forms
        if any(fits.gain(source, form, sharing=sharing) for source in deep)
    ]
    return table(["form", *(describe(fits.sources[source]) for source in deep)], rows)


# Layers 2 and 3: training.


def module_mean(run: Record, measure: str, digits: int) -> str:
    """Mean size of a measure over the modules of a run; a dash if the run diverged."""
    if run["ranks"] is None:
        return "–"
    return f"{fmean(abs(row.get(measure) or 0.0) for row in run['ranks']):.{digits}f}"


def label(run: Record) -> str:
    """Method and settings of a run, in words."""
    words = ["LoRA"]
    if run["method"] == "lr-lora":
        options = run["options"]
        words = [options["form"], f"g = {options['input_gain']}"]
        if options["form"] == "saturating" and options["phi_lr_multiplier"] < 1e-6:
            words[0] = "tanh, fixed"
        elif options["form"] != "sine":
            words += [f"N = {options['num_basis']}", f"μ = {options['phi_lr_multiplier']:g}"]
        if options.get("centred"):
            words.append("without φ(0)")
    if run.get("scaling", 1.0) != 1.0:
        words.append(f"s = {run['scaling']:g}")
    return ", ".join(words)


def dynamics_runs() -> list[Record]:
    """The runs of layer 2, LoRA first."""
    runs = [run for run in read("runs.jsonl") if run["watch_ranks"]]
    return sorted(
        runs,
        key=lambda run: (
            -run["r"],
            run["method"] != "lora",
            label(run),
            run.get("head_rate") or 0,
            run["learning_rate"],
        ),
    )


def dynamics_table() -> str:
    """What settings do to loss and rank: one task, one seed."""
    header = ["method and settings", "r", "rate", "head's rate", "accuracy", "loss", "training loss", "stable rank"]
    header += ["energy-90", "energy-99", "‖ΔW‖/‖W‖", "curvature", "outside ±I", "φ(0)"]
    header += ["modules with energy-99 > r"]
    measures = {"stable_rank": 2, "energy90_rank": 1, "energy99_rank": 1, "relative_norm": 3, "curvature": 3}
    measures |= {"outside": 3, "phi_zero": 2}
    rows = [
        [
            label(run),
            str(run["r"]),
            f"{run['learning_rate']:g}",
            f"{run.get('head_rate') or run['learning_rate']:g}",
            f"{run['validation_accuracy']:.3f}",
            f"{run['validation_loss']:.3f}",
            f"{run['train_loss']:.3f}",
            *(module_mean(run, measure, digits) for measure, digits in measures.items()),
            str(sum(row["energy99_rank"] > row["r"] for row in run["ranks"] or [])),
        ]
        for run in dynamics_runs()
    ]
    return table(header, rows)


# Layer 3: the comparison. Tuning runs have seed 0 and no test accuracy; the others are at the rate chosen for their
# cell, which is a task, an r and a method with its settings.

Cell = tuple[str, int, str]


def cells(is_final: bool) -> dict[Cell, list[Record]]:
    """The runs of layer 3 by cell: those at the chosen rate in the order of seeds, or those that chose it."""
    groups: dict[Cell, list[Record]] = defaultdict(list)
    runs = [run for run in read("runs.jsonl") if not run["watch_ranks"] and ("test_accuracy" in run) == is_final]
    for run in sorted(runs, key=lambda run: (run["task"], run["r"], run["method"] != "lora", label(run), run["seed"])):
        groups[run["task"], run["r"], label(run)].append(run)
    return groups


def tuning_table() -> str:
    """Validation accuracy (and loss) of every cell by learning rate, on the tuning seed."""
    groups = {name: {run["learning_rate"]: run for run in runs} for name, runs in cells(is_final=False).items()}
    rates = sorted({rate for runs in groups.values() for rate in runs})

    def show(run: Record | None) -> str:
        return f"{100 * run['validation_accuracy']:.1f} ({run['validation_loss']:.3f})" if run else ""

    rows = [[*map(str, name), *(show(runs.get(rate)) for rate in rates)] for name, runs in groups.items()]
    return table(["task", "r", "method", *(f"{rate:g}" for rate in rates)], rows)


def difference(runs: list[Record], others: list[Record]) -> str:
    """Mean difference in test accuracy, in points, paired by seed, with standard error and p of the paired t-test."""
    accuracy = {run["seed"]: run["test_accuracy"] for run in others}
    paired = [run for run in runs if run["seed"] in accuracy]
    values = [100 * run["test_accuracy"] for run in paired]
    result = paired_difference(values, [100 * accuracy[run["seed"]] for run in paired])
    return f"{result.value:+.1f} ± {result.standard_error:.1f} (p = {result.p:.2f})" if len(paired) > 1 else ""


def comparison_table() -> str:
    """Test accuracy of every cell ± standard error over seeds, and the difference to LoRA at r and at 2r."""
    header = ["task", "r", "method", "rate", "seeds", "test accuracy", "to LoRA at r", "to LoRA at 2r", "test loss"]
    header += ["stable rank", "energy-90", "energy-99"]
    groups = cells(is_final=True)
    rows = []
    for (task, r, method), runs in groups.items():
        accuracies = [100 * run["test_accuracy"] for run in runs]
        references = [groups.get((task, k * r, "LoRA"), []) if method != "LoRA" else [] for k in (1, 2)]
        ranks = {"stable_rank": 2, "energy90_rank": 1, "energy99_rank": 1}
        rows.append(
            [
                task,
                str(r),
                method,
                f"{runs[0]['learning_rate']:g}",
                str(len(runs)),
                f"{fmean(accuracies):.1f} ± {sem(accuracies):.1f}" if len(runs) > 1 else f"{accuracies[0]:.1f}",
                *(difference(runs, reference) for reference in references),
                f"{fmean(run['test_loss'] for run in runs):.3f}",
                *(module_mean(runs[0], measure, digits) for measure, digits in ranks.items()),
            ]
        )
    return table(header, rows)


def learned_ranks_table() -> str:
    """Whether stable ranks differ between modules, and between attention and MLP, over the seeds of a cell."""
    header = ["task", "r", "method", "seeds", "modules differ: p", "attention − MLP, log", "95 % interval", "Cohen's d"]
    rows = []
    for name, runs in cells(is_final=True).items():
        if len(runs) < 2 or any(run["ranks"] is None for run in runs):
            continue
        by_seed = np.log([[row["stable_rank"] for row in run["ranks"]] for run in runs])
        if np.ptp(by_seed) < 1e-6:
            continue  # LoRA at r = 1
        kinds = np.array([row["kind"] for row in runs[0]["ranks"]])
        p = columns_differ(by_seed)
        attention, mlp = (by_seed.mean(0)[kinds == kind] for kind in ("attention", "mlp"))
        g, d = gap(attention, mlp)
        bounds = f"{g.low:+.2f} … {g.high:+.2f}"
        rows.append([*map(str, name), str(len(runs)), f"{p:.4f}", f"{g.value:+.2f}", bounds, f"{d.value:+.2f}"])
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
        "learned-ranks": learned_ranks_table(),
    }


def draw_dynamics() -> None:
    """Rank and loss over training, by setting."""
    figure, axes = plt.subplots(1, 2, figsize=(13, 4.2), constrained_layout=True)
    for run in dynamics_runs():
        if (run["learning_rate"], run["r"]) != (4e-3, 4) or not run.get("head_rate"):
            continue
        steps = [record["step"] for record in run["history"]]
        line = {"label": label(run), "linewidth": 2.5 if run["method"] == "lora" else 1.2}
        for axis, measure in zip(axes, ("stable_rank", "energy99_rank"), strict=True):
            axis.plot(steps[1:], [record[f"rank/{measure}_mean"] for record in run["history"]][1:], **line)
    axes[0].set(title="stable rank, mean over modules", xlabel="step")
    axes[1].set(title="energy-99 rank, mean over modules", xlabel="step", yscale="log")
    figure.legend(*axes[1].get_legend_handles_labels(), loc="outside right", fontsize=7)
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
