"""Finding the learning rate of a LoRA by short trainings at several rates: the study `finder.md`.

    python -m lrlora_lab.finder run finder.jsonl german source-code --seeds 0 1 2

Each rate of a grid by two is trained for several numbers of steps, each with a warm-up and a decay of its own, on the
same examples in the same order: the short trainings are the probes of the long ones. Rows that the output has already
are not computed again.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import get_cosine_schedule_with_warmup

from lrlora.learned.moments import model_loss

from .capacity import CLIP_NORM, WARMUP_STEPS
from .front import Data, bytes_task, read_rows, texts_task
from .gradient_moments import TASKS as OTHERS

UNIT = 1e-3  # a rate is UNIT times a power of two
HEAD_FACTOR = 16  # of a new head's rate, as in `lrlora train`
GROUPS, GROUP = 32, 4  # held-out examples, as means of groups
PROBES = (5, 10, 25, 50, 100)
SMALL = 20  # batches of the small set


@dataclass(frozen=True)
class Task:
    """A recipe.

    Attributes:
        load: model and data of a seed.
        scale: α/r.
        exponents: of two, of the rates of all probes.
        steps: numbers of steps, beside `PROBES`, at the best rate of the first seed and its neighbours.
        tested: number of steps from which the test loss is measured.
        is_reduced: whether matrix products are in bfloat16.

    """

    load: Callable[[int], Data]
    scale: float
    exponents: range
    steps: tuple[int, ...]
    tested: int = 100
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
    **{name: Task(bytes_task(name), 4.0, _BYTES, (400,)) for name in ("german", "source-code", "spanish")},
    "reviews": Task(texts_task("movie-reviews"), 2.0, _TEXTS, (200,), is_reduced=True),
    "topics": Task(texts_task("r8"), 2.0, _TEXTS, (200,), is_reduced=True),
    "few-reviews": Task(_again(texts_task("movie-reviews"), SMALL), 2.0, _TEXTS, (), is_reduced=True),
    "chats": Task(OTHERS["chats"].load, 2.0, range(-2, 4), (60,), tested=60),
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


def run(name: str, seed: int, output: Path, ranks: Sequence[int]) -> None:
    """Rows of a task and a seed."""
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

    for rank in ranks:
        add(rank, 0, 0)
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
            lowest(rank, steps, range(center - 1, center + 2))


def main(arguments: list[str]) -> None:
    """Run tasks and seeds."""
    parser = argparse.ArgumentParser(prog="python -m lrlora_lab.finder")
    run_parser = parser.add_subparsers(dest="command", required=True).add_parser("run")
    run_parser.add_argument("file", type=Path)
    run_parser.add_argument("tasks", choices=[*TASKS], nargs="+")
    run_parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    run_parser.add_argument("--ranks", type=int, nargs="+", default=[16, 4])
    settings = parser.parse_args(arguments)
    for seed in settings.seeds:
        for name in settings.tasks:
            run(name, seed, settings.file, settings.ranks)


if __name__ == "__main__":
    main(sys.argv[1:])
