"""The paper's claims on language understanding and commonsense reasoning: scores, losses and ranks of each method.

Rates are chosen for each kind of task, on held-out parts of the training data, with a seed of their own: a grid by two,
until the best is inside. Each run is a row of `rows.jsonl` in the folder of the study, which resumes from it.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from lrlora.files import parse_json
from lrlora.train.progress import DivergedError

from .commonsense import TESTS, TRAINED_ON, train_questions
from .hub_data import load_hub_data
from .inputs import located
from .jobs import TUNING_SEED, Job
from .methods import find_method
from .pool import Call, Record
from .study import read_rows
from .suite import load_suite
from .worker import run_job

RANK = 8
ROWS = "rows.jsonl"


@dataclass(frozen=True)
class Part:
    """Methods that run one after another on tasks of one kind.

    Args:
        methods: keys of `find_method`.
        tasks: those of the runs at the chosen rate.
        tuned_on: tasks that choose the rate of each method, by their mean held-out loss.
        seeds: number of runs at the chosen rate.
        minutes: of a run, in the mean of all, on one core.

    """

    methods: tuple[str, ...]
    tasks: tuple[str, ...] = ("cola", "mrpc", "stsb", "sst2", "rte")
    tuned_on: tuple[str, ...] = ("cola", "mrpc")
    seeds: int = 5
    minutes: float = 6.0


def _commonsense(*methods: str) -> Part:
    return Part(methods, (TRAINED_ON,), (TRAINED_ON,), seeds=3, minutes=25.0)


# The most important first: the time may not suffice for all. Parts with the same methods share their trials.
PARTS = (
    Part(("lora", "lr-lora"), tasks=("cola", "mrpc")),
    Part(("lora+r=1", "lr-lora+r=1"), tasks=("cola", "mrpc")),
    Part(("lora", "lr-lora", "lora+r=1", "lr-lora+r=1"), tasks=("stsb", "sst2", "rte")),
    _commonsense("lora", "lr-lora"),
    Part(("expansion+lora_alpha=32", "dora")),
    _commonsense("lora+r=1", "lr-lora+r=1"),
    Part(("adalora", "peanut"), tasks=("cola", "mrpc")),
    Part(("expansion+r=1+lora_alpha=4", "dora+r=1")),
    _commonsense("expansion+lora_alpha=32", "dora"),
)
FIRST_RATES = (5e-4, 1e-3, 2e-3)
EXPECTED_RATES = 4  # that a grid needs


def tune(part: Part, method: str, finished: dict[str, Record]) -> tuple[list[Job], float | None]:
    """Trials of a method known to be needed, and the rate of the lowest mean loss, once its neighbors were tried."""
    rates = [*FIRST_RATES]
    while True:
        trials = {rate: [Job(task, method, rate, TUNING_SEED) for task in part.tuned_on] for rate in rates}
        jobs = [job for several in trials.values() for job in several]
        if any(job.name not in finished for job in jobs):
            return jobs, None
        losses = {
            rate: fmean(finished[job.name].get("criterion", math.inf) for job in several)
            for rate, several in trials.items()
        }
        best = min(losses, key=lambda rate: losses[rate])
        new = [rate for rate in (best / 2, best * 2) if rate not in rates]
        if not new:
            return jobs, best
        rates += new


@dataclass(frozen=True)
class Paper:
    """The study, as the pool runs it."""

    output: Path

    def finished(self) -> dict[str, Record]:
        """Rows by the name of their job; results of jobs become rows first."""
        rows = {_job(row).name: row for row in read_rows(self.output / ROWS)}
        for path in sorted(self.output.glob("jobs/*.json")):
            if path.stem not in rows:
                rows[path.stem] = parse_json(path)
                with (self.output / ROWS).open("a", encoding="utf-8") as file:
                    file.write(json.dumps(rows[path.stem]) + "\n")
            path.unlink()
        return rows

    def plan(self, finished: dict[str, Record]) -> list[Job]:
        """Jobs known to be needed, part by part: trials, then tasks with all seeds; results of trials add more."""
        jobs: dict[str, Job] = {}
        for part in PARTS:
            chosen: dict[str, float] = {}
            for method in part.methods:
                trials, rate = tune(part, method, finished)
                jobs |= {job.name: job for job in trials}
                if rate is not None:
                    chosen[method] = rate
            for task in part.tasks if len(chosen) == len(part.methods) else ():
                for seed in range(1, part.seeds + 1):
                    several = [Job(task, method, rate, seed) for method, rate in chosen.items()]
                    jobs |= {job.name: job for job in several}
        return [*jobs.values()]

    def is_alone(self, job: Job) -> bool:
        return False

    def call(self, job: Job) -> Call:
        return row_of, (asdict(job),)

    def told(self, job: Job, missing: list[Job], finished: dict[str, Record]) -> str:
        return f"{len(finished)} runs done, at least {len(missing)} left · {job.name}"

    def estimate(self) -> Iterator[str]:
        """A line for each part: runs done and expected, and hours of one core for those that are left."""
        finished, total, tuned = self.finished(), 0.0, set[tuple[str, str]]()
        for part in PARTS:
            trials = {(task, method) for task in part.tuned_on for method in part.methods} - tuned
            cells = {(task, method) for task in part.tasks for method in part.methods}
            tuned |= trials
            expected = EXPECTED_RATES * len(trials) + part.seeds * len(cells)
            done = sum(
                (row["task"], row["method"]) in (trials if row["seed"] == TUNING_SEED else cells)
                for row in finished.values()
            )
            hours = max(0, expected - done) * part.minutes / 60
            total += hours
            methods = ", ".join(find_method(method).name for method in part.methods)
            yield f"{methods} on {', '.join(part.tasks)}: {done} of about {expected} runs, {hours:.1f} hours left."
        yield f"Together {total:.1f} hours of one core, unshared."


def _job(row: Record) -> Job:
    return Job(row["task"], row["method"], row["learning_rate"], row["seed"])


def load_data() -> None:
    """Prepare all data sets once, before several processes do."""
    for task in load_suite("glue").training_tasks.values():
        located(task.data)
    for name in (TRAINED_ON, *TESTS):
        load_hub_data(f"commonsense:{name}")


def row_of(request: dict[str, Any], folder: Path) -> Record:
    """Run a job: its row, or why it has none."""
    started, job = time.monotonic(), Job(**request)
    try:
        measured = _questions(job) if job.task == TRAINED_ON else _texts(job, folder)
    except DivergedError as error:
        measured = {"failure": str(error)}
    return {**request, **measured, "wall": round(time.monotonic() - started)}


def _texts(job: Job, folder: Path) -> Record:
    suite = load_suite("glue")
    task = suite.training_tasks[job.task]
    record = run_job(suite, {**asdict(job), "rank": RANK}, folder)
    kept = {name: record[name] for name in ("criterion", "seconds", "trainable")}
    test = record["test"]
    if test is not None:
        score = {"score": test[task.metric], "guess": test[f"guess_{task.metric}"], "loss": test[task.criterion]}
        kept["test"] = {job.task: score}
    return {**kept, "ranks": _packed(record["ranks"])}


def _questions(job: Job) -> Record:
    tests = () if job.seed == TUNING_SEED else TESTS
    record = train_questions(find_method(job.method), RANK, job.learning_rate, job.seed, tests=tests)
    return {**record, "ranks": _packed(record["ranks"])}


def _packed(ranks: Sequence[dict[str, Any]] | None) -> dict[str, list[float]] | None:
    """Module → stable and effective rank."""
    if ranks is None:
        return None
    return {row["module"]: [round(row["stable_rank"], 3), round(row["effective_rank"], 3)] for row in ranks}
