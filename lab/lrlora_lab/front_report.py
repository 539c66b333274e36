"""Tables and picture of the study of `front`.

python -m lrlora_lab.front_report front.jsonl
"""

from __future__ import annotations

import math
import sys
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, LogLocator, NullFormatter
from scipy.stats import ttest_1samp

from lrlora.files import replacing, write_whole

from .front import AT, RATES, RULES, SHARES, SMALL, WIDE, best_factor, lora_arm, read_rows
from .sections import table, with_section

Row = dict[str, Any]
STUDY, PICTURE = Path("lab") / "studies" / "front.md", Path("docs") / "front.png"
_WHOLE = "r16"
_SLACK = 0.01  # of the share, in the gate


def interval(values: Sequence[float]) -> tuple[float, float, float]:
    """Mean and 95 % interval over seeds; infinite for one."""
    mean = fmean(values)
    if len(values) < 2 or not np.ptp(values):
        half = math.inf if len(values) < 2 else 0.0
        return mean, mean - half, mean + half
    bounds = ttest_1samp(values, 0.0).confidence_interval()
    return mean, float(bounds.low), float(bounds.high)


class Study:
    """Rows by task, arm and seed."""

    def __init__(self, rows: Sequence[Row]) -> None:
        self.rows = list(rows)
        self.by: dict[str, dict[str, dict[int, Row]]] = defaultdict(lambda: defaultdict(dict))
        for row in rows:
            self.by[row["task"]][row["arm"]][row["seed"]] = row

    @property
    def tasks(self) -> list[str]:
        """Tasks with a whole LoRA."""
        return [task for task, arms in self.by.items() if _WHOLE in arms and task not in RATES]

    def share(self, task: str, row: Row) -> float:
        """Share of the gain of LoRA r = 16 of the same seed, on test data."""
        arms, seed = self.by[task], row["seed"]
        none = arms["none"][seed]["loss"]
        return float((none - row["loss"]) / (none - arms[_WHOLE][seed]["loss"]))

    def cells(self, task: str, arm: str) -> list[Row]:
        """Rows of an arm whose seed has a whole LoRA."""
        return [row for seed, row in self.by[task].get(arm, {}).items() if seed in self.by[task][_WHOLE]]

    def tuned(self, task: str) -> dict[int, str]:
        """Rank → arm of LoRA at its best rate."""
        return {rank: lora_arm(rank, best_factor(self.rows, task, rank)) for rank in (*SMALL, WIDE)}

    def tuned_loss(self, task: str, seed: int, parameters: int) -> float:
        """Loss of tuned LoRA of a size, interpolated linearly in log parameters; NaN beyond its sizes."""
        rows = [row for arm in self.tuned(task).values() if (row := self.by[task].get(arm, {}).get(seed))]
        rows = sorted(rows, key=lambda row: row["parameters"])
        sizes = [math.log(row["parameters"]) for row in rows]
        if len(rows) < 2 or not sizes[0] <= math.log(parameters) <= sizes[-1]:
            return math.nan
        return float(np.interp(math.log(parameters), sizes, [row["loss"] for row in rows]))

    def size_at_end(self, task: str, seed: int, share: float) -> float:
        """Parameters of a cut at the end with a share on test data, interpolated; NaN beyond its shares."""
        cuts = [self.by[task].get(f"keep {kept:g} at 1", {}).get(seed) for kept in SHARES]
        rows = sorted((row for row in cuts if row is not None), key=lambda row: self.share(task, row))
        shares = [self.share(task, row) for row in rows]
        if len(rows) < 2 or not shares[0] <= share <= shares[-1]:
            return math.nan
        return float(np.exp(np.interp(share, shares, [math.log(row["parameters"]) for row in rows])))


def _shown(values: Sequence[float], scale: float = 1.0, digits: int = 1) -> str:
    mean, low, high = interval(values)
    if not math.isfinite(low):
        return f"{scale * mean:.{digits}f}"
    return f"{scale * mean:.{digits}f} ({scale * low:.{digits}f} to {scale * high:.{digits}f})"


def arms_table(study: Study, task: str) -> str:
    """A row per arm."""
    whole = fmean(row["parameters"] for row in study.cells(task, _WHOLE))
    seconds = fmean(row["seconds"] for row in study.cells(task, _WHOLE))
    tuned = set(study.tuned(task).values())
    rows = []
    for arm in study.by[task]:
        cells = study.cells(task, arm)
        if arm == "none" or not cells:
            continue
        accuracy = [row["accuracy"] for row in cells if "accuracy" in row]
        rows.append(
            [
                f"**{arm}**" if arm in tuned else arm,
                str(len(cells)),
                f"{fmean(row['loss'] for row in cells):.4f}",
                _shown([study.share(task, row) for row in cells], 100),
                f"{100 * fmean(row['parameters'] for row in cells) / whole:.0f}",
                f"{fmean(row['largest_rank'] for row in cells):.0f}",
                f"{fmean(row['seconds'] for row in cells) / seconds:.2f}",
                f"{fmean(accuracy):.3f}" if accuracy else "",
            ]
        )
    heads = ["arm", "seeds", "test loss", "share of the gain, %", "parameters, %", "largest rank", "time", "accuracy"]
    return table(heads, rows)


def gate_table(study: Study) -> str:
    """Whether cuts while training keep what was asked for, are smaller than cuts at the end, and beat tuned LoRA."""
    rows = []
    for task in study.tasks:
        for at in AT[:-1]:
            for share in SHARES:
                cells = study.cells(task, f"keep {share:g} at {at:g}")
                if not cells or not any("of the adapter's gain" in str(row.get("told")) for row in cells):
                    continue
                kept = interval([study.share(task, row) for row in cells])
                sizes = [
                    row["parameters"] / other
                    for row in cells
                    if math.isfinite(other := study.size_at_end(task, row["seed"], study.share(task, row)))
                ]
                differences = [
                    row["loss"] - other
                    for row in cells
                    if math.isfinite(other := study.tuned_loss(task, row["seed"], row["parameters"]))
                ]
                rows.append(
                    [
                        task,
                        f"{100 * share:g} % at {100 * at:g} %",
                        f"{100 * kept[0]:.1f} ({100 * kept[1]:.1f})" if len(cells) > 1 else f"{100 * kept[0]:.1f}",
                        "yes" if (kept[1] if len(cells) > 1 else kept[0]) >= share - _SLACK else "no",
                        f"{fmean(sizes):.2f}" if sizes else "",
                        _shown(differences, digits=3) if differences else "",
                    ]
                )
    heads = ["task", "asked", "share, % (lower bound)", "kept", "parameters / cut at the end", "loss − tuned LoRA's"]
    return table(heads, rows)


def rules_table(study: Study) -> str:
    """Test loss after a cut to 99 % at 60 %, by the rule for the rate after it, and the rule's largest regret."""
    cut = f"keep {SHARES[-1]:g} at {AT[1]:g}"
    arms = {"(parameters before / after)^½": cut, **{rule: f"{cut}, {rule}" for rule in RULES}}
    rows, regrets = [], []
    for name, task in RATES.items():
        of_task = study.by[name]
        seeds = sorted(set.intersection(*(set(of_task[arm]) for arm in (_WHOLE, *arms.values()))))
        if seeds:
            whole, *losses = (fmean(of_task[arm][s]["loss"] for s in seeds) for arm in (_WHOLE, *arms.values()))
            best = min(losses)
            regrets.append([loss - best for loss in losses])
            shown = [f"**{loss:.4f}**" if loss == best else f"{loss:.4f}" for loss in losses]
            rows.append([f"{task.rate:g}", str(len(seeds)), f"{whole:.4f}", *shown])
    if rows:
        rows.append(["largest regret", "", "", *(f"{max(column):.4f}" for column in zip(*regrets, strict=True))])
    return table(["rate", "seeds", "LoRA r = 16, uncut", *arms], rows)


def figure(study: Study) -> Figure:
    """Test loss by parameters: a panel a task, tuned LoRA as a line, cuts by moment."""
    ranks = {task: [arm for arm in study.tuned(task).values() if study.cells(task, arm)] for task in study.tasks}
    tasks = [task for task in study.tasks if len(ranks[task]) > 1]
    picture = Figure(figsize=(4.2 * len(tasks), 3.8), layout="constrained")
    panels = picture.subplots(1, len(tasks), squeeze=False)[0]
    for axes, task in zip(panels, tasks, strict=True):

        def point(arm: str, task: str = task) -> tuple[float, float]:
            cells = study.cells(task, arm)
            return fmean(row["parameters"] for row in cells), fmean(row["loss"] for row in cells)

        lora = [point(arm) for arm in ranks[task]]
        axes.plot(*zip(*lora, strict=True), "k-o", label="LoRA at its best rate", markersize=4)
        for at, style in zip(AT, ("C0-s", "C1-^", "C2-D"), strict=True):
            cuts = [point(f"keep {s:g} at {at:g}") for s in SHARES if study.cells(task, f"keep {s:g} at {at:g}")]
            if cuts:
                when = "at the end" if at == 1 else f"at {100 * at:g} % of the steps"
                axes.plot(*zip(*cuts, strict=True), style, label=f"cut {when}", markersize=5)
        axes.set(title=task, xscale="log", xlabel="parameters", ylabel="test loss")
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
        axes.xaxis.set_minor_formatter(NullFormatter())
    panels[0].legend(fontsize=8)
    return picture


def sections(rows: Sequence[Row]) -> dict[str, str]:
    """Sections of the page."""
    study = Study(rows)
    parts = [f"### {task}\n\n{arms_table(study, task)}" for task in study.tasks]
    return {"arms": "\n".join(parts), "gate": gate_table(study), "rules": rules_table(study)}


def report(path: Path) -> None:
    """Store the rows beside the study's page, in a checkout, and fill it."""
    rows = read_rows(path)
    stored = STUDY.with_suffix(".jsonl")
    if path.resolve() != stored.resolve():
        write_whole(stored, path.read_text(encoding="utf-8"))
    page = STUDY.read_text(encoding="utf-8")
    for name, content in sections(rows).items():
        page = with_section(page, name, content)
    write_whole(STUDY, page)
    with replacing(PICTURE) as partial:
        figure(Study(rows)).savefig(partial, format="png", dpi=110)


if __name__ == "__main__":
    report(Path(sys.argv[1]))
