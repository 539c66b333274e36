"""Does a cut tell that its training is far from its end? The study `early_cuts.md`.

    python -m lrlora_lab.early_cuts run early_cuts.jsonl german source-code spanish reviews topics
    python -m lrlora_lab.early_cuts report early_cuts.jsonl

A LoRA r = 16 is cut at 60 % of its steps to 99 % of its gain so far, in trainings that are long or short, at a good
rate and at far too low ones. Its signs, all known at the cut, are compared with the share of the uncut training's gain
that it has at the end.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

from sklearn.metrics import roc_auc_score, roc_curve
from torch import Tensor

from lrlora.learned import LearnedRanks
from lrlora.lora.factors import Factors
from lrlora.lora.live import lora_factors

from .front import TASKS, WIDE, Course, Rows, read_rows
from .sections import table
from .study import study_parser

KEEP, HALF, AT = 0.99, 0.3, 0.6
FAILED = 0.98  # of the uncut training's gain
SHORT = 60  # steps
LONG = {"reviews": 200, "topics": 200}  # 240 on bytes
# Factors of the task's rate, and whether the training is short.
RUNS = ((1.0, True), (1.0, False), (1 / 4, True), (1 / 16, True), (1 / 16, False), (1 / 64, True))
CHOSE = ("german", "reviews")  # tasks that choose the threshold of each sign


def run(name: str, seed: int, output: Path) -> None:
    """Rows of the trainings of a task and a seed."""
    for rate, is_short in RUNS:
        steps = SHORT if is_short else LONG.get(name, 240)
        task = replace(TASKS[name], rate=rate * TASKS[name].rate, steps=steps)
        rows = Rows(output, f"{name} {rate:g} {steps}", seed, ".*")
        if {"none", "cut", "signs", "whole"} <= rows.known:
            continue
        course, losses = Course(task, seed, WIDE, task.rate), list[float]()
        rows.add("none", partial(course.data.test, course.model.eval()))
        course.model.train()
        recorder = course.model.register_forward_hook(lambda *call, losses=losses: losses.append(call[-1].loss.item()))
        start = [part.A.clone() for part in lora_factors(course.model, "default")]
        course.run(round(HALF * steps))
        half = _copies(course)
        rows.add("cut", partial(_cut, course, recorder))
        course.run(round(AT * steps))
        recorder.remove()
        rows.add("signs", partial(_signs, start, half, _copies(course), losses[:]))
        rows.add("whole", course.row)


def _cut(course: Course, recorder: Any) -> dict[str, Any]:
    """Cut while training, without the recorder of the losses."""
    recorder.remove()
    learned = LearnedRanks(
        course.model, course.optimizer, steps=course.task.steps, at=AT, keep=KEEP, held_out=course.data.held_out
    )
    learned.load_state_dict({**learned.state_dict(), "done": course.done})
    row = course.row()
    assert learned.shrunk is not None
    kept = learned.shrunk.kept
    return row | {"kept": kept and kept.share, "base": learned.shrunk.base, "gain": learned.shrunk.gain}


def _copies(course: Course) -> list[Factors]:
    return [replace(part, A=part.A.clone(), B=part.B.clone()) for part in lora_factors(course.model, "default")]


def _inner(parts: Iterable[Factors], others: Iterable[Factors]) -> float:
    """⟨ΔW, ΔW′⟩ over all modules; s is the same."""
    return sum(
        (((part.B.T @ other.B) * (part.A @ other.A.T)).sum().item() for part, other in zip(parts, others, strict=True))
    )


def _signs(start: list[Tensor], half: list[Factors], now: list[Factors], losses: Sequence[float]) -> dict[str, Any]:
    """Signs at the cut: of the update, of A, and the training losses so far."""
    norm, before = _inner(now, now) ** 0.5, _inner(half, half) ** 0.5
    moved = sum(((part.A - A).square().sum().item() for part, A in zip(now, start, strict=True))) ** 0.5
    return {
        "cosine": _inner(now, half) / (norm * before),
        "growth": norm / before,
        "moved": moved / sum(A.square().sum().item() for A in start) ** 0.5,
        "losses": [round(loss, 4) for loss in losses],
    }


def _fall(row: dict[str, Any]) -> float:
    """Fall of the mean training loss from the last quarter but one before the cut to the last, per gain."""
    losses, quarter = row["losses"], len(row["losses"]) // 4
    return (fmean(losses[-2 * quarter : -quarter]) - fmean(losses[-quarter:])) / row["gain"]


# Sign → its value from the rows of a run, larger where the training seems far from its end.
SIGNS: dict[str, Callable[[dict[str, Any]], float]] = {
    "growth of ‖ΔW‖ since 30 %": lambda row: row["growth"],
    "turn of ΔW since 30 %": lambda row: 1 - row["cosine"],
    "A near its start": lambda row: -row["moved"],
    "fall of the training loss": _fall,
    "small size": lambda row: -row["parameters"],
    "small gain": lambda row: -row["gain"] / row["base"],
    "share printed": lambda row: -row["kept"],
}


def trainings(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """A row for each training with a cut: its signs, and the share of the uncut training's gain at the end."""
    arms: dict[tuple[str, int], dict[str, dict[str, Any]]] = {}
    for row in rows:
        arms.setdefault((row["task"], row["seed"]), {})[row["arm"]] = row
    runs = []
    for known in arms.values():
        if {"none", "signs", "cut", "whole"} <= known.keys() and known["cut"]["kept"] is not None:
            none = known["none"]["loss"]
            share = (none - known["cut"]["loss"]) / (none - known["whole"]["loss"])
            runs.append(known["signs"] | known["cut"] | {"share": share})
    return runs


def trainings_table(runs: Sequence[dict[str, Any]]) -> str:
    """Table: share at the end, and the signs, of each training."""
    lines = [
        [run["task"], str(run["seed"]), f"{run['kept']:.1%}", f"{run['share']:.1%}"]
        + [f"{sign(run):,.3g}" for sign in SIGNS.values()]
        for run in runs
    ]
    return table(["task, rate, steps", "seed", "printed", "at the end", *SIGNS], lines)


def signs_table(runs: Sequence[dict[str, Any]]) -> str:
    """Table: area under the ROC of each sign, and what its threshold does on trainings that did not choose it."""
    chose, others = (
        [run for run in runs if (run["task"].split()[0] in CHOSE) == is_chosen] for is_chosen in (True, False)
    )
    have_failed = [run["share"] < FAILED for run in others]
    lines = []
    for name, sign in SIGNS.items():
        areas = [
            roc_auc_score([run["share"] < FAILED for run in part], [sign(run) for run in part])
            for part in (chose, others)
        ]
        false, true, thresholds = roc_curve([run["share"] < FAILED for run in chose], [sign(run) for run in chose])
        threshold = thresholds[(true - false).argmax()]
        warned = [sign(run) >= threshold for run in others]
        caught = sum(is_warned and has_failed for is_warned, has_failed in zip(warned, have_failed, strict=True))
        wrong = sum(is_warned and not has_failed for is_warned, has_failed in zip(warned, have_failed, strict=True))
        counts = [f"{caught} of {sum(have_failed)}", f"{wrong} of {len(others) - sum(have_failed)}"]
        lines.append([name, *(f"{area:.2f}" for area in areas), *counts])
    head = ["sign", "area, tasks that chose", "area, others", "failures seen, others", "false alarms, others"]
    return table(head, lines)


def main(arguments: list[str]) -> None:
    """Run tasks, or report."""
    parser, run_parser = study_parser("early_cuts")
    run_parser.add_argument("tasks", choices=[*TASKS], nargs="+")
    run_parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    settings = parser.parse_args(arguments)
    if settings.command == "report":
        runs = trainings(read_rows(settings.file))
        print(trainings_table(runs), signs_table(runs), sep="\n")
        return
    for seed in settings.seeds:
        for name in settings.tasks:
            run(name, seed, settings.file)


if __name__ == "__main__":
    main(sys.argv[1:])
