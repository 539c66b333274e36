"""Why small LoRAs are ahead on news topics: rank, rate, the head's rate, or overfitting? The study `topics.md`.

    python -m lrlora_lab.topics run topics.jsonl --seeds 0
    python -m lrlora_lab.topics report topics.jsonl

LoRAs of three ranks at rates by two until the best has a worse one on either side, with the head at the adapter's rate
and at 16 times it; with weight decay, and stopped at the lowest held-out loss; and the widest one, cut while training.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Sequence
from functools import partial
from itertools import product
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from transformers import get_cosine_schedule_with_warmup

from lrlora.learned import LearnedRanks
from lrlora.learned.moments import model_loss

from .capacity import WARMUP_STEPS
from .finder import HEAD_FACTOR
from .front import TASKS, WIDE, Course, Rows, read_rows
from .sections import table
from .study import study_parser

TASK, RANKS, FACTORS, DECAY = TASKS["topics"], (WIDE, 4, 2), (1, HEAD_FACTOR), 0.1
EVERY = 40  # steps between evaluations on held-out data


def make_course(seed: int, rank: int, exponent: int, factor: int, decay: float = 0.0) -> Course:
    """Course at the task's rate times 2^exponent, with the head at a factor of it."""
    rate = TASK.rate * 2.0**exponent
    course = Course(TASK, seed, rank, rate)
    parameters = [(name, value) for name, value in course.model.named_parameters() if value.requires_grad]
    heads, adapters = ([p for name, p in parameters if ("lora_" in name) == is_lora] for is_lora in (False, True))
    groups = [{"params": adapters, "lr": rate}, {"params": heads, "lr": factor * rate}]
    course.optimizer = torch.optim.AdamW(groups, weight_decay=decay)
    course.schedule = get_cosine_schedule_with_warmup(course.optimizer, min(WARMUP_STEPS, TASK.steps // 10), TASK.steps)
    return course


def _train(*settings: Any) -> dict[str, Any]:
    """Test loss at the end, and of the weights with the lowest held-out loss."""
    course = make_course(*settings)
    losses: dict[int, float] = {}
    best: dict[str, Any] = {}
    for step in range(EVERY, TASK.steps + 1, EVERY):
        course.run(step)
        losses[step] = _held_out(course)
        if losses[step] == min(losses.values()):
            best = copy.deepcopy(course.model.state_dict())
    row = course.row(held_out=losses)
    course.model.load_state_dict(best)
    return row | {"stopped": min(losses, key=lambda step: losses[step]), "at_stop": course.data.test(course.model)}


@torch.no_grad()
def _held_out(course: Course) -> float:
    course.model.eval()
    means = [
        (sums / numbers).mean().item() for sums, numbers in map(partial(model_loss, course.model), course.data.held_out)
    ]
    course.model.train()
    return round(fmean(means), 4)


def _cut(*settings: Any) -> dict[str, Any]:
    course = make_course(*settings)
    options: dict[str, Any] = {"at": 0.6, "keep": 0.99, "held_out": course.data.held_out}
    learned = LearnedRanks(course.model, course.optimizer, steps=TASK.steps, **options)
    row = course.row()
    return row | {"told": str(learned.shrunk)}


def run(seed: int, output: Path) -> None:
    """Rows of a seed."""
    rows = Rows(output, "topics", seed, ".*")

    def add(rank: int, exponent: int, factor: int, decay: float = 0.0) -> float:
        """Test loss of a training."""
        name = f"r{rank} at {TASK.rate * 2.0**exponent:g}, head {factor}, decay {decay:g}"
        rows.add(name, partial(_train, seed, rank, exponent, factor, decay))
        return next(row["loss"] for row in read_rows(output) if (row["arm"], row["seed"]) == (name, seed))

    for factor, rank in product(reversed(FACTORS), RANKS):
        losses = {exponent: add(rank, exponent, factor) for exponent in (0, 1)}
        while (best := min(losses, key=lambda exponent: losses[exponent])) in (min(losses), max(losses)):
            beside = best - 1 if best == min(losses) else best + 1
            losses[beside] = add(rank, beside, factor)
        if rank == WIDE:
            rows.add(f"cut, head {factor}", partial(_cut, seed, rank, best, factor))
            add(rank, best, factor, DECAY)


def topics_table(rows: Sequence[dict[str, Any]]) -> str:
    """Table of all trainings: test loss and accuracy, at the end and where it would have been stopped."""
    lines = []
    for arm in dict.fromkeys(row["arm"] for row in rows):
        runs = [row for row in rows if row["arm"] == arm]
        cells = [arm, str(len(runs)), *(f"{fmean(run[name] for run in runs):.4f}" for name in ("loss", "accuracy"))]
        cells += [f"{fmean(run['parameters'] for run in runs):,.0f}"]
        if "stopped" in runs[0]:
            cells += [", ".join(str(run["stopped"]) for run in runs)]
            cells += [f"{fmean(run['at_stop']['loss'] for run in runs):.4f}"]
        lines.append(cells + [""] * (7 - len(cells)))
    return table(["arm", "seeds", "loss", "accuracy", "parameters", "lowest held-out loss at step", "its loss"], lines)


def main(arguments: list[str]) -> None:
    """Run seeds, or report."""
    parser, run_parser = study_parser("topics")
    run_parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    settings = parser.parse_args(arguments)
    if settings.command == "report":
        print(topics_table(read_rows(settings.file)))
        return
    torch.set_float32_matmul_precision("medium")
    for seed in settings.seeds:
        run(seed, settings.file)


if __name__ == "__main__":
    main(sys.argv[1:])
