"""Finding the learning rate of a LoRA by short trainings at several rates: the study `finder.md`.

    python -m lrlora_lab.finder run finder.jsonl german source-code --seeds 0 1 2
    python -m lrlora_lab.finder run finder.jsonl spanish --gate
    python -m lrlora_lab.finder report finder.jsonl

Each rate of a grid by two is trained for several numbers of steps, each with a warm-up and a decay of its own, on the
same examples in the same order: the short trainings are the probes of the long ones. Rows that the output has already
are not computed again.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice, product
from pathlib import Path
from statistics import fmean, stdev
from typing import Any, NamedTuple

import numpy as np
import torch
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter, StrMethodFormatter
from peft import LoraConfig, get_peft_model
from scipy.stats import bootstrap
from torch import Tensor, nn
from transformers import get_cosine_schedule_with_warmup

from lrlora.learned.moments import model_loss

from .capacity import CLIP_NORM, WARMUP_STEPS
from .recipe import load_recipe
from .sections import table
from .study import read_rows, study_parser
from .study_tasks import Data, bytes_task, texts_task

UNIT = 1e-3  # a rate is UNIT times a power of two
HEAD_FACTOR = 16  # of a new head's rate, as in `lrlora train`
GROUPS, GROUP = 32, 4  # held-out examples, as means of groups
PROBES = (5, 10, 25, 50, 100)
FEW, SMALL = "few-reviews", 20  # task of a small set, and its batches


@dataclass(frozen=True)
class Task:
    """A recipe.

    Attributes:
        kind: of data and model.
        load: model and data of a seed.
        scale: α/r.
        exponents: of two, of the rates of all probes.
        steps: numbers of steps, beside `PROBES`, at the best rate of the first seed and its neighbours.
        long: number of steps of one seed and rank, with `--long`.
        tested: number of steps from which the test loss is measured.
        batch: examples of a step.
        is_reduced: whether matrix products are in bfloat16.

    """

    kind: str
    load: Callable[[int], Data]
    scale: float
    exponents: range
    steps: tuple[int, ...]
    long: int = 0
    tested: int = 100
    batch: int = 8
    is_reduced: bool = False


def _again(load: Callable[[int], Data], number: int) -> Callable[[int], Data]:
    """The first batches, again and again, in another order each time."""

    def load_few(seed: int) -> Data:
        data = load(seed)
        few = list(islice(data.batches(), number))
        generator = torch.Generator().manual_seed(seed)

        def batches() -> Iterator[Any]:
            while True:
                for index in torch.randperm(number, generator=generator).tolist():
                    yield few[index]

        return replace(data, batches=batches)

    return load_few


_BYTES, _TEXTS = range(-1, 6), range(-2, 5)
TASKS = {
    **{
        name: Task("bytes", bytes_task(name), 4.0, _BYTES, (400,), 1600)
        for name in ("german", "source-code", "spanish")
    },
    "reviews": Task("texts", texts_task("movie-reviews"), 2.0, _TEXTS, (200,), batch=16, is_reduced=True),
    "topics": Task("texts", texts_task("r8"), 2.0, _TEXTS, (200,), batch=16, is_reduced=True),
    FEW: Task("texts", _again(texts_task("movie-reviews"), SMALL), 2.0, _TEXTS, (), batch=16, is_reduced=True),
    "chats": Task("chats", load_recipe, 2.0, range(-2, 4), (60,), 300, tested=60),
}


def train(task: Task, seed: int, rank: int, rate: float, steps: int) -> dict[str, Any]:
    """Train a LoRA; losses of its steps and of held-out groups, and where it is long enough the test loss."""
    data = task.load(seed)
    torch.manual_seed(seed)
    config = LoraConfig(
        r=rank, lora_alpha=round(task.scale * rank), target_modules=data.targets, modules_to_save=data.kept
    )
    model: Any = get_peft_model(data.model, config)
    parameters = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    heads, adapters = ([p for name, p in parameters if ("lora_" in name) == is_lora] for is_lora in (False, True))
    groups = [{"params": adapters, "lr": rate}, {"params": heads, "lr": HEAD_FACTOR * rate}]
    optimizer = torch.optim.AdamW([group for group in groups if group["params"]], weight_decay=0.0)
    schedule = get_cosine_schedule_with_warmup(optimizer, min(WARMUP_STEPS, steps // 10), steps)
    losses, started = [], time.process_time()
    model.train()
    for batch in islice(data.batches(), steps):
        loss = model(**batch).loss
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_([parameter for _, parameter in parameters], CLIP_NORM)
        optimizer.step()
        schedule.step()
        losses.append(round(loss.item(), 4))
    seconds = time.process_time() - started
    model.eval()
    row = {"losses": losses, "held_out": _held_out(model, data), "seconds": round(seconds, 1)}
    return row | ({"test": data.test(model)} if steps >= task.tested or not steps else {})


@torch.no_grad()
def _held_out(model: Any, data: Data) -> list[float]:
    """Mean loss of each group of held-out examples."""
    losses: list[Tensor] = []
    while sum(map(len, losses)) < GROUPS * GROUP:
        sums, numbers = model_loss(model, data.held_out[len(losses)])
        losses.append(sums / numbers)
    means = torch.cat(losses)[: GROUPS * GROUP].view(GROUPS, GROUP).mean(1)
    return [round(value, 4) for value in means.tolist()]


def best_exponent(rows: Sequence[dict[str, Any]], task: str, rank: int, steps: int) -> int:
    """Exponent with the least test loss of the first seed."""
    losses = {
        row["exponent"]: row["test"]["loss"]
        for row in rows
        if (row["task"], row["rank"], row["steps"], row["seed"]) == (task, rank, steps, 0)
    }
    return min(losses, key=lambda exponent: losses[exponent])


def run(name: str, seed: int, output: Path, ranks: Sequence[int], part: str) -> None:
    """Rows of a task and a seed.

    Args:
        name: of the task.
        seed: of model, data and training.
        output: file of the rows.
        ranks: of the LoRA.
        part: "all"; "gate" for what the chosen procedure needs, with its longest trainings alone; "long" for the long
            training, at rates around the best of the longest other one.

    """
    task = TASKS[name]
    torch.set_float32_matmul_precision("medium" if task.is_reduced else "highest")
    names = ("task", "seed", "rank", "exponent", "steps")
    known: dict[tuple[Any, ...], dict[str, Any]] = {
        tuple(row[name] for name in names): row for row in read_rows(output)
    }

    def add(rank: int, exponent: int, steps: int) -> float:
        """Test loss of a row, NaN where it has none."""
        key = (name, seed, rank, exponent, steps)
        if (row := known.get(key)) is None:
            row = dict[str, Any](zip(names, key, strict=True)) | train(task, seed, rank, UNIT * 2.0**exponent, steps)
            with output.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
            print(key, row.get("test"), f"{row['seconds']} s", flush=True)
            known[key] = row
        return float(row["test"]["loss"]) if "test" in row else float("nan")

    def lowest(rank: int, steps: int, exponents: Sequence[int]) -> None:
        """Full trainings at rates, and further ones until the best has a worse one on either side."""
        losses = {exponent: add(rank, exponent, steps) for exponent in exponents}
        while (best := min(losses, key=lambda exponent: losses[exponent])) in (min(losses), max(losses)):
            beside = best - 1 if best == min(losses) else best + 1
            losses[beside] = add(rank, beside, steps)

    def around(exponent: int) -> range:
        return range(exponent - 1, exponent + 2)

    for rank in ranks:
        if part == "long":
            center = best_exponent(list(known.values()), name, rank, max((task.tested, *task.steps)))
            lowest(rank, task.long, around(center))
            continue
        add(rank, 0, 0)
        if part == "gate":
            steps = max((task.tested, *task.steps))
            for exponent in task.exponents:
                add(rank, exponent, CHOSEN.limit(steps))
            study = Study(list(known.values()))
            lowest(rank, steps, around(CHOSEN.choose(study, Cell(name, rank, steps, seed)).exponent))
            continue
        longest = max((task.tested, *task.steps))
        for steps in (steps for steps in PROBES if steps <= longest / 2):
            for exponent in task.exponents:
                add(rank, exponent, steps)
        if task.tested in PROBES:
            lowest(rank, task.tested, task.exponents)
        for steps in task.steps:
            if seed or task.tested < steps:
                center = best_exponent(list(known.values()), name, rank, steps if seed else task.tested)
            else:
                center = task.exponents[len(task.exponents) // 2]
            lowest(rank, steps, around(center))


class Cell(NamedTuple):
    """A training whose rate is looked for."""

    task: str
    rank: int
    steps: int
    seed: int


# Cells that chose the procedure.
CHOSE = {
    Cell(task, 16, steps, 0)
    for task, lengths in (
        ("german", (100, 400)),
        ("source-code", (100, 400)),
        ("topics", (100, 200)),
        ("reviews", (100, 200)),
    )
    for steps in lengths
}
Runs = dict[int, dict[str, Any]]  # exponent → row


class Study:
    """Rows of the study.

    Attributes:
        runs: cell → its runs by exponent, of any number of steps.
        regrets: cell of a full training → exponent → share of the best rate's gain that it lacks, in %.

    """

    def __init__(self, rows: Sequence[dict[str, Any]]) -> None:
        self.runs: dict[Cell, Runs] = {}
        for row in rows:
            cell = Cell(row["task"], row["rank"], row["steps"], row["seed"])
            self.runs.setdefault(cell, {})[row["exponent"]] = row
        self.regrets: dict[Cell, dict[int, float]] = {}
        for cell, runs in self.runs.items():
            losses = {exponent: row["test"]["loss"] for exponent, row in runs.items() if "test" in row}
            if cell.steps and len(losses) > 2:
                best = min(losses.values())
                gain = self.runs[cell._replace(steps=0)][0]["test"]["loss"] - best
                self.regrets[cell] = {exponent: 100 * (loss - best) / gain for exponent, loss in losses.items()}

    def best(self, cell: Cell) -> int:
        """Exponent of the best rate of a full training."""
        return min(self.regrets[cell], key=lambda exponent: self.regrets[cell][exponent])

    def regret(self, cell: Cell, exponent: int) -> float:
        """Regret of a rate; beyond the rates that were trained, of the nearest: at least so much."""
        known = self.regrets[cell]
        return known[min(known, key=lambda other: abs(other - exponent))]

    def has_probes(self, cell: Cell, steps: int) -> bool:
        return len(self.runs.get(cell._replace(steps=steps), {})) > 4


class Choice(NamedTuple):
    """Exponent that a procedure chooses, and its cost in training steps."""

    exponent: int
    cost: float


@dataclass(frozen=True)
class Procedure:
    """Probes, and a choice from their losses.

    Attributes:
        steps: at most, of a probe.
        share: of the training, at most.
        groups: of held-out examples; 0 for the training losses of the last half of the steps.
        errors: standard errors above the best that a lower rate may be.
        first: steps of a first rung, of which the best three go on.
        below: factors of two by which the chosen rate is lowered.

    """

    steps: int = 25
    share: float = 0.25
    groups: int = 16
    errors: float = 1.0
    first: int = 0
    below: int = 0

    def __str__(self) -> str:
        score = f"{self.groups * GROUP} held-out examples" if self.groups else "training loss"
        rule = f"lowest within {self.errors:g} s.e." if self.errors else "best"
        rung = f"{self.first}, then " if self.first else ""
        lower = f", divided by {2**self.below}" if self.below else ""
        return f"{rung}{self.steps} steps, {score}, {rule}{lower}"

    def limit(self, steps: int) -> int:
        """Number of steps of a probe of a training, at most."""
        return min(self.steps, int(self.share * steps))

    def length(self, study: Study, cell: Cell) -> int:
        """Number of steps of a probe, of those that were trained."""
        limit = self.limit(cell.steps)
        lengths = [steps for steps in range(1, limit + 1) if study.has_probes(cell, steps)]
        return max(lengths, default=PROBES[0])

    def choose(self, study: Study, cell: Cell) -> Choice:
        """Search from three rates upwards or downwards until the best has a worse one on either side."""
        first = self.first or self.length(study, cell)
        scores = self._scores(study, cell, first)
        visited = [0, 1, 2]
        while (best := min(visited, key=lambda exponent: fmean(scores[exponent]))) in (visited[0], visited[-1]):
            beside = best - 1 if best == visited[0] else best + 1
            if beside not in scores:
                break
            visited = sorted([*visited, beside])
        cost = len(visited) * self._cost(cell, first)
        if self.first:
            second = self.length(study, cell)
            visited = sorted(sorted(visited, key=lambda exponent: fmean(scores[exponent]))[:3])
            scores = self._scores(study, cell, second)
            cost += len(visited) * self._cost(cell, second)
            best = min(visited, key=lambda exponent: fmean(scores[exponent]))
        for exponent in visited:
            differences = [loss - other for loss, other in zip(scores[exponent], scores[best], strict=True)]
            error = stdev(differences) / len(differences) ** 0.5
            if fmean(differences) <= self.errors * error:
                return Choice(exponent - self.below, cost)
        raise AssertionError  # the best is no worse than itself

    def _scores(self, study: Study, cell: Cell, steps: int) -> dict[int, list[float]]:
        runs = study.runs[cell._replace(steps=steps)]
        return {
            exponent: row["held_out"][: self.groups] if self.groups else row["losses"][steps // 2 :]
            for exponent, row in runs.items()
        }

    def _cost(self, cell: Cell, steps: int) -> float:
        return steps + 0.5 * self.groups * GROUP / TASKS[cell.task].batch


CHOSEN = Procedure(groups=0, errors=0.0, below=1)
PROCEDURES = [
    *(Procedure(steps=steps) for steps in (5, 10, 25, 50, 100)),
    *(Procedure(errors=errors) for errors in (0.0, 2.0)),
    Procedure(groups=4),
    Procedure(groups=32),
    *(Procedure(groups=0, errors=errors) for errors in (0.0, 1.0, 2.0)),
    *(Procedure(steps=steps, errors=0.0, below=1) for steps in (5, 10, 25, 50)),
    *(Procedure(steps=steps, groups=0, errors=0.0, below=1) for steps in (5, 10, 25, 50)),
    *(Procedure(groups=groups, errors=0.0, below=2) for groups in (0, 16)),
    Procedure(first=5),
    Procedure(steps=50, first=10),
]


def constant(study: Study, cell: Cell, *, is_alike: bool, by_rank: bool) -> int:
    """Exponent of the least mean regret on the other tasks, of the same kind where there are any, of the first seed."""
    others = [other for other in study.regrets if other.task != cell.task and other.seed == 0]
    if is_alike:
        others = [other for other in others if TASKS[other.task].kind == TASKS[cell.task].kind] or others
    if by_rank:
        others = [other for other in others if other.rank == cell.rank] or others
    exponents = range(-2, 6)
    return min(exponents, key=lambda e: fmean(study.regret(other, e) for other in others)) if others else 1


def _constant_choice(study: Study, cell: Cell, *, is_alike: bool, by_rank: bool) -> Choice:
    return Choice(constant(study, cell, is_alike=is_alike, by_rank=by_rank), 0)


def grids(study: Study) -> str:
    """Table: regret by rate, and the best rate of the probes, of each full training."""
    exponents = sorted({exponent for known in study.regrets.values() for exponent in known})
    lines = []
    for cell in sorted(study.regrets):
        known = study.regrets[cell]
        bests = []
        for steps in PROBES:
            if study.has_probes(cell, steps) and steps < cell.steps:
                runs = study.runs[cell._replace(steps=steps)]
                best = min(runs, key=lambda exponent: fmean(runs[exponent]["held_out"]))
                bests.append(f"{UNIT * 2.0**best:g}")
            else:
                bests.append("")
        cells = [f"{known[exponent]:.1f}" if exponent in known else "" for exponent in exponents]
        lines.append([cell.task, str(cell.rank), str(cell.steps), str(cell.seed), *cells, *bests])
    head = [*(f"{UNIT * 2.0**exponent:g}" for exponent in exponents), *(f"probe of {steps}" for steps in PROBES)]
    return table(["task", "r", "steps", "seed", *head], lines)


FINDER, LOW = "find_learning_rate", "2.5e-4"
ANY, ALIKE = "constant of the other tasks", "constant of the other tasks of this kind"
HARDEST = f"{ALIKE}, by rank"


def _rules(study: Study, procedures: Sequence[Procedure]) -> dict[str, Callable[[Cell], Choice]]:
    """Name → choice: constants of the other tasks, a low one, and procedures."""
    rules: dict[str, Callable[[Cell], Choice]] = {}
    for (is_alike, name), by_rank in product(((False, ANY), (True, ALIKE)), (False, True)):
        choose = partial(_constant_choice, study, is_alike=is_alike, by_rank=by_rank)
        rules[f"{name}, by rank" if by_rank else name] = choose
    rules[LOW] = lambda cell: Choice(-2, 0)
    return rules | {str(each): partial(each.choose, study) for each in procedures}


def procedures(study: Study, *, is_gate: bool, are_seen_once: bool = False) -> str:
    """Table: regrets, and costs, of procedures and rivals, on the cells of the gate or on those that chose.

    `are_seen_once` leaves out the small set that is seen several times. The last column is the mean regret above that
    of the chosen procedure, with the 95 % interval of a paired bootstrap.
    """
    cells = [cell for cell in study.regrets if is_gate != (cell in CHOSE)]
    if are_seen_once:
        cells = [cell for cell in cells if cell.task != FEW]
    rivals = _rules(study, [CHOSEN] if is_gate else PROCEDURES)
    choices = {name: [choose(cell) for cell in cells] for name, choose in rivals.items()}
    regrets = {
        name: np.array([study.regret(cell, each.exponent) for cell, each in zip(cells, chosen, strict=True)])
        for name, chosen in choices.items()
    }
    lines = []
    for name, values in regrets.items():
        above = values - regrets[str(CHOSEN)]
        interval = bootstrap((above,), np.mean, method="percentile", rng=0).confidence_interval
        difference = f"{above.mean():.1f} ({interval.low:.1f} to {interval.high:.1f})" if above.any() else "0"
        worse = int((values > regrets[HARDEST] + 3).sum())
        cost = f"{fmean(choice.cost for choice in choices[name]):.0f}"
        lines.append([name, f"{values.mean():.1f}", f"{values.max():.1f}", str(worse), cost, difference])
    head = ["mean regret, %", "largest", "worse than the constant by 3 %", "cost in steps", "above the chosen"]
    return table([f"{len(cells)} cells", *head], lines)


def figure(study: Study) -> Figure:
    """Regret by the length of the training, of the chosen procedure and its rivals, on the cells of the gate."""
    cells = [cell for cell in study.regrets if cell not in CHOSE]
    rules = _rules(study, [CHOSEN])
    shown = {FINDER: str(CHOSEN), ANY: ANY, ALIKE: ALIKE, LOW: LOW}
    picture = Figure(figsize=(7.5, 4.2), layout="constrained")
    axes = picture.subplots()
    for place, ((label, name), style) in enumerate(zip(shown.items(), ("C0o", "C1^", "C2s", "C7x"), strict=True)):
        aside = 1.05 ** (place - (len(shown) - 1) / 2)  # so that no point hides another
        regrets = [study.regret(cell, rules[name](cell).exponent) for cell in cells]
        axes.plot([cell.steps * aside for cell in cells], regrets, style, label=label, markersize=6, alpha=0.8)
    lengths = sorted({cell.steps for cell in cells})
    axes.set_xscale("log")
    axes.set_xticks(lengths, [str(length) for length in lengths])
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_yscale("symlog", linthresh=1)
    axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axes.set(xlabel="steps of the training", ylabel="gain lost to the best rate, %", ylim=(-0.1, 400))
    picture.legend(loc="outside upper center", ncols=2, fontsize=8)
    return picture


def main(arguments: list[str]) -> None:
    """Run tasks and seeds, or report."""
    parser, run_parser = study_parser("finder")
    run_parser.add_argument("tasks", choices=[*TASKS], nargs="+")
    run_parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    run_parser.add_argument("--ranks", type=int, nargs="+", default=[16, 4])
    for part in ("gate", "long"):
        run_parser.add_argument(f"--{part}", action="store_const", const=part, dest="part", default="all")
    settings = parser.parse_args(arguments)
    if settings.command == "report":
        study = Study(read_rows(settings.file))
        print(grids(study), procedures(study, is_gate=False), procedures(study, is_gate=True), sep="\n")
        print(procedures(study, is_gate=True, are_seen_once=True))
        return
    for seed in settings.seeds:
        for name in settings.tasks:
            run(name, seed, settings.file, settings.ranks, settings.part)


if __name__ == "__main__":
    main(sys.argv[1:])
