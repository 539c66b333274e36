"""Moments of a cut from A's gradient, instead of hooks on activations: the study `gradient.md`.

    python -m lrlora_lab.gradient_moments run gradient.jsonl german 0 1 2
    python -m lrlora_lab.gradient_moments report gradient.jsonl

With P at the bottleneck of ΔW = s·B P A, D = ∂L/∂P = A.grad Aᵀ is an r × r matrix that every optimizer step holds. With
the ridged inverses H of BᵀB and Z of AAᵀ, a step adds

    M_z += Dᵀ H D,     M_h += D Z Dᵀ,     T += tr(H D Z Dᵀ)

which for a single token are the moments of the hooks (`lrlora.learned.moments`).
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import fmean, stdev
from typing import Any, NamedTuple

import torch
from scipy.stats import t
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from lrlora.adapters import Factors
from lrlora.learned import LearnedRanks, LossCurve
from lrlora.learned.directions import directions, energy_curve
from lrlora.learned.moments import Moments
from lrlora.learned.window import Window
from lrlora.lora.factors import Layout
from lrlora.lora.live import lora_factors, lora_layers, lora_weights, put
from lrlora.train.models import model_source

from .front import TASKS as FRONT
from .front import WIDE, Course, Data, Rows, Task, bytes_task, read_rows, texts_task
from .inputs import load_chats
from .recipe import HELD_OUT, LENGTH, TRAINED, losses
from .sections import table

AT_END = (2, 4)  # sizes, as ranks of LoRA
# Number of the last steps, of those done.
WINDOWS: dict[str, Callable[[int], int]] = {
    "32": lambda done: 32,
    "half": lambda done: done // 2,
    "all": lambda done: done,
}
WINDOW = "half"  # chosen on German at the end, seed 0


def _chats(seed: int) -> Data:
    """SmolLM2 and chats, as in `recipe`, without dropout."""
    source, data = model_source("embedded:smollm2"), load_chats()
    tokenizer, rows = AutoTokenizer.from_pretrained(source), data["train"].shuffle(seed=seed)
    texts = [
        tokenizer.apply_chat_template(messages, tokenize=False)
        for messages in rows.select(range(TRAINED + HELD_OUT))["messages"]
    ]
    generator = torch.Generator().manual_seed(seed)

    def batch(chosen: list[int]) -> Any:
        options = {"truncation": True, "max_length": LENGTH, "padding": True, "add_special_tokens": False}
        encoded = dict(tokenizer([texts[row] for row in chosen], return_tensors="pt", **options))
        return {**encoded, "labels": encoded["input_ids"].masked_fill(encoded["attention_mask"] == 0, -100)}

    def batches() -> Iterator[Any]:
        while True:
            for chosen in torch.randperm(TRAINED, generator=generator)[: TRAINED // 8 * 8].split(8):
                yield batch(chosen.tolist())

    held_out = [batch(list(range(first, first + 4))) for first in range(TRAINED, TRAINED + HELD_OUT, 4)]
    model = AutoModelForCausalLM.from_pretrained(source)
    modules = r".*\.(\w+_proj)"
    return Data(
        model, modules, batches, held_out, lambda model: {"loss": losses(model, tokenizer, data["test"])["all"]}
    )


TASKS = {
    **{name: FRONT[name] for name in ("german", "source-code")},
    **{
        name: replace(FRONT[name], load=texts_task(data, size=8))
        for name, data in (("reviews", "movie-reviews"), ("topics", "r8"))
    },
    "german-64": replace(FRONT["german"], load=bytes_task("german", size=64), steps=120),
    "reviews-64": replace(FRONT["reviews"], load=texts_task("movie-reviews", size=64), steps=120),
    "chats": Task(_chats, 8e-4, 2.0, 60),
}
WHILE_TRAINING = ("german", "source-code", "reviews", "chats")


class Step(NamedTuple):
    """D of a step by module, the metrics, and C of the change A_new ≈ C A, all (k, k); `drift` is its relative size."""

    d: dict[str, Tensor]
    h_metric: dict[str, Tensor]
    z_metric: dict[str, Tensor]
    change: dict[str, Tensor]
    drift: float


class Recorder:
    """Records D of every step of a course."""

    def __init__(self, course: Course) -> None:
        self.layers, self.steps = lora_layers(course.model, "default"), list[Step]()
        self._before: dict[str, Tensor] = {}
        course.optimizer.register_step_pre_hook(self._read)
        course.optimizer.register_step_post_hook(self._follow)

    @torch.no_grad()
    def _read(self, *_: Any) -> None:
        step = Step({}, {}, {}, {}, 0.0)
        for path, layer in self.layers.items():
            A, B = (weight.double() for weight in lora_weights(layer, "default"))
            gradient = lora_weights(layer, "default")[0].grad
            assert gradient is not None
            step.d[path] = gradient.double() @ A.T
            if B.any():
                scaled = layer.scaling["default"] * B
                moments = Moments.zeros(Factors(path, A, scaled, len(A), 1.0, Layout(), 1.0, 1.0, 1.0))
                step.h_metric[path], step.z_metric[path] = moments.h_metric, moments.z_metric
            self._before[path] = A.clone()
        self.steps.append(step)

    @torch.no_grad()
    def _follow(self, *_: Any) -> None:
        step, drift = self.steps[-1], []
        for path, layer in self.layers.items():
            before, now = self._before[path], lora_weights(layer, "default")[0].double()
            # After a cut, rows of A are zero.
            step.change[path] = now @ before.T @ torch.linalg.pinv(before @ before.T, hermitian=True)
            drift.append(((now - before).norm() / before.norm()).item())
        self.steps[-1] = step._replace(drift=fmean(drift))

    def curve(self, whole: list[Factors], kind: str, window: str) -> LossCurve:
        """Directions by the D of the last steps: `D`, less its `mean`, or with sums `carried` along."""
        steps = self.steps[-WINDOWS[window](len(self.steps)) :]
        return LossCurve([directions(part, self._moments(part, steps, kind), 1) for part in whole])

    def _moments(self, part: Factors, steps: list[Step], kind: str) -> Moments | None:
        path, known = part.module, [step for step in steps if part.module in step.h_metric]
        if not known or not part.energy:
            return None
        mean = torch.stack([step.d[path] for step in known]).mean(0) if kind == "mean" else 0.0
        M_z, M_h, T = torch.zeros(WIDE, WIDE).double(), torch.zeros(WIDE, WIDE).double(), torch.zeros(()).double()
        for step in known:
            D, H, Z = step.d[path] - mean, step.h_metric[path], step.z_metric[path]
            M_z, M_h, T = M_z + D.T @ H @ D, M_h + D @ Z @ D.T, T + (H @ D @ Z @ D.T).trace()
            if kind == "carried":
                C = step.change[path]
                inverse = torch.linalg.inv(C)
                M_z, M_h = C @ M_z @ C.T, inverse.T @ M_h @ inverse
        zero = Moments.zeros(part)
        return zero._replace(sums=torch.cat([M_z.flatten(), M_h.flatten(), T[None], torch.ones(1).double()]))


NAMES = {"D": "D", "mean": "D less its mean", "carried": "D, sums carried"}
KINDS = tuple(NAMES)


class ByGradient(LearnedRanks):
    """Learned ranks whose directions are those of a recorder."""

    recorder: Recorder
    kind: str

    def _choose(self, curve: LossCurve) -> list[Factors] | None:
        return super()._choose(self.recorder.curve([of.whole for of in curve.modules], self.kind, WINDOW))


def _cut(course: Course, at: float, recorder: Recorder, kind: str, **asked: Any) -> dict[str, Any]:
    """Cut while training by hooks, or by D."""
    if "keep" in asked:
        asked["held_out"] = course.data.held_out
    cls = LearnedRanks if kind == "hooks" else ByGradient
    learned = cls(course.model, course.optimizer, steps=course.task.steps, at=at, **asked)
    if isinstance(learned, ByGradient):
        learned.recorder, learned.kind = recorder, kind
    learned.load_state_dict({**learned.state_dict(), "done": course.done})
    course.run(course.task.steps)
    return course.row(told=learned.summary if learned.shrunk is None else str(learned.shrunk))


def _at_end(course: Course, recorder: Recorder, rows: Rows, window: Window, windows: list[str]) -> None:
    """Rows of one course, cut at its end to sizes."""
    course.model.eval()
    whole = lora_factors(course.model, "default")
    per_rank = sum(part.parameters_per_rank for part in whole)
    drift = fmean(step.drift for step in recorder.steps)
    hooks = LossCurve([directions(part, window.moments.get(part.module), 1) for part in whole])
    energy = energy_curve(whole)
    curves: dict[str, Callable[[], LossCurve]] = {"hooks": lambda: hooks, "energy": lambda: energy}
    for name in windows:
        curves |= {f"{kind}, {name}": partial(recorder.curve, whole, kind, name) for kind in KINDS}
    for arm, curve in curves.items():
        for rank in AT_END:
            rows.add(f"end r{rank}: {arm}", partial(_measured, course, curve, rank * per_rank, drift))


def _measured(course: Course, curve: Callable[[], LossCurve], size: int, drift: float) -> dict[str, Any]:
    put(course.model, "default", curve().within(size))
    return {**course.data.test(course.model), "drift": drift}


def run(name: str, seed: int, output: Path, windows: list[str], arms: str = ".*") -> None:
    """Rows of a task and a seed."""
    task = TASKS[name]
    rows = Rows(output, name, seed, arms)

    def none() -> dict[str, Any]:
        data = task.load(seed)
        return data.test(data.model.eval())

    rows.add("none", none)
    course = Course(task, seed, WIDE, task.rate)
    recorder = Recorder(course)
    cuts: list[tuple[float, dict[str, Any]]] = [(0.3, {"size": "r4"}), (0.6, {"keep": 0.99})]
    if name in WHILE_TRAINING:
        for at, asked in cuts if name != "chats" else cuts[1:]:
            cut = round(at * task.steps)
            course.run(cut - min(34, (cut + 1) // 2 + 1))
            for kind in ("hooks", *KINDS):
                arm = f"{'r4' if 'size' in asked else '99 %'} at {at:g}: {kind}"
                rows.add(arm, partial(_cut, course, at, recorder, kind, **asked))
    window = Window(course.model, "default", task.steps, None)
    course.run(course.done + 1)
    window.end_first_step(is_deepspeed=False)
    course.run(task.steps - window.length)
    window.open()
    course.optimizer.register_step_post_hook(lambda *_: window.end_step())
    course.run(task.steps)
    moments = dict(window.moments)
    window.close()
    window.moments = moments
    rows.add("whole", course.row)
    _at_end(course, recorder, rows, window, windows)


class Cell(NamedTuple):
    """A cut of a task: by seed and arm, the loss above that of hooks in % of the gain, and parameters over theirs."""

    rises: dict[str, list[float]]
    ratios: dict[str, list[float]]
    seeds: int


def cells(rows: Sequence[dict[str, Any]]) -> dict[tuple[str, str], Cell]:
    """Task and cut → its cell; of the seeds that have LoRA uncut, no adapter and the hooks."""
    known = {(row["task"], row["seed"], row["arm"]): row for row in rows}
    found: dict[tuple[str, str], Cell] = {}
    for (task, seed, arm), hooks in known.items():
        cut, _, kind = arm.partition(": ")
        none, whole = (known.get((task, seed, each)) for each in ("none", "whole"))
        if kind != "hooks" or none is None or whole is None:
            continue
        cell = found.get((task, cut), Cell({}, {}, 0))
        found[task, cut] = cell._replace(seeds=cell.seeds + 1)
        for (other_task, other_seed, other), row in known.items():
            if (other_task, other_seed) == (task, seed) and other.startswith(f"{cut}: "):
                kind = other.partition(": ")[2]
                rise = 100 * (row["loss"] - hooks["loss"]) / (none["loss"] - whole["loss"])
                cell.rises.setdefault(kind, []).append(rise)
                if cut.startswith("99"):
                    cell.ratios.setdefault(kind, []).append(row["parameters"] / hooks["parameters"])
    return found


def gate(rows: Sequence[dict[str, Any]]) -> str:
    """Table: the loss of each arm above that of hooks, by cell, at the window that German chose."""
    lines, pooled = [], {kind: list[float]() for kind in KINDS}
    for (task, cut), cell in cells(rows).items():
        shown = []
        for kind in KINDS:
            rises = cell.rises.get(kind) or cell.rises.get(f"{kind}, {WINDOW}", [])
            pooled[kind] += rises
            ratios = cell.ratios.get(kind)
            shown.append((f"{fmean(rises):+.2f}" if rises else "") + (f" ({fmean(ratios):.2f})" if ratios else ""))
        energy = cell.rises.get("energy")
        lines.append([task, cut, str(cell.seeds), *shown, f"{fmean(energy):+.2f}" if energy else ""])
    means = [f"{fmean(rises):+.2f}, at most {_upper(rises):+.2f}" for rises in pooled.values()]
    lines.append(["all", "", str(len(pooled["D"])), *means, ""])
    return table(["task", "cut", "seeds", *NAMES.values(), "singular values"], lines)


def windows(rows: Sequence[dict[str, Any]]) -> str:
    """Table: the windows of D on German at the end, seed 0."""
    lines = []
    german = [row for row in rows if row["task"] == "german" and row["seed"] == 0]
    for (_, cut), cell in cells(german).items():
        if cut.startswith("end"):
            for kind in KINDS:
                shown = [cell.rises.get(f"{kind}, {window}") for window in WINDOWS]
                lines.append([cut, NAMES[kind], *(f"{fmean(rises):+.2f}" if rises else "" for rises in shown)])
    return table(["cut", "arm", *(f"last {window}" for window in WINDOWS)], lines)


def _upper(values: list[float]) -> float:
    """Upper end of the 95 % interval of the mean."""
    return fmean(values) + t.ppf(0.975, len(values) - 1) * stdev(values) / len(values) ** 0.5


def main(arguments: list[str]) -> None:
    """Run a task and seeds, or report."""
    parser = argparse.ArgumentParser(prog="python -m lrlora_lab.gradient_moments")
    commands = parser.add_subparsers(dest="command", required=True)
    for name in ("run", "report"):
        commands.add_parser(name).add_argument("file", type=Path)
    command = commands.choices["run"]
    command.add_argument("task", choices=[*TASKS])
    command.add_argument("seeds", type=int, nargs="+")
    command.add_argument("--windows", nargs="+", choices=[*WINDOWS], default=[WINDOW])
    command.add_argument("--arms", default=".*")
    given = parser.parse_args(arguments)
    if given.command == "report":
        rows = read_rows(given.file)
        print(windows(rows), gate(rows), sep="\n")
        return
    for seed in given.seeds:
        run(given.task, seed, given.file, given.windows, given.arms)


if __name__ == "__main__":
    main(sys.argv[1:])
