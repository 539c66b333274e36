"""Checks the data of a comparison, and runs its jobs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from statistics import fmean
from typing import Any

from lrlora.locks import only_writer
from lrlora.train.data import load_examples, load_splits, load_task_data, require_data_path, sampled
from lrlora.train.tasks import TASKS

from .inputs import is_input, located
from .jobs import Comparison, Job, Record, prepare, read_records, train_config
from .methods import find_method
from .pool import Call, run_missing
from .suite import Task
from .worker import record_of


def run_comparison(
    comparison: Comparison, output: Path, *, announce: Callable[[str], None] = print, **how: Any
) -> list[Job]:
    """Run missing jobs; returns those left after a timeout or an external error.

    Args:
        comparison: the comparison.
        output: folder of the results.
        announce: receives progress messages.
        **how: see `run_missing`.

    Raises:
        BlockingIOError: another process runs it.
        FileExistsError: the folder holds something else.
        FileNotFoundError: a data set is neither on the hub nor in a folder.
        ValueError: an option of a method or setting of a task is invalid.

    """
    for note in check_data(comparison):
        announce(note)
    for task in comparison.chosen_tasks.values():
        for data in task.sources:
            located(data)
    with only_writer(output):
        prepare(comparison, output)
        for name, record in read_records(output).items():
            if record.get("failure") and not record.get("diverged", True):  # which the user may have mended
                (output / "jobs" / f"{name}.json").unlink(missing_ok=True)
        return run_missing(_Comparing(comparison, output), announce=announce, **how)


@dataclass(frozen=True)
class _Comparing:
    """The comparison as a study."""

    comparison: Comparison
    output: Path

    def finished(self) -> dict[str, Record]:
        return read_records(self.output)

    def plan(self, finished: dict[str, Record]) -> list[Job]:
        return self.comparison.plan(finished)

    def is_alone(self, job: Job) -> bool:
        return False

    def call(self, job: Job) -> Call:
        request = {**asdict(job), "rank": self.comparison.r, **self.comparison.facts(job.task, job.method)}
        return record_of, (asdict(self.comparison.definition), request)

    def told(self, job: Job, missing: list[Job], finished: dict[str, Record]) -> str:
        scale = "" if job.scale == 1 else f", scale {job.scale:g}"
        next_one = f"{job.task}, {job.method}, rate {job.learning_rate:g}{scale}, seed {job.seed}"
        return f"{_progress(self.comparison, missing, finished)} · {next_one}"


def _progress(comparison: Comparison, left: list[Job], finished: dict[str, Record]) -> str:
    done, cells = comparison.select(finished), comparison.cells_left(left)
    text = f"{len(done)} {'job' if len(done) == 1 else 'jobs'} done, at least {len(cells)} left"
    seconds: dict[tuple[str, ...], list[float]] = {}
    for record in finished.values():
        cell = (record["task"], record["method"])
        for key in (cell, cell[:1], ()):
            seconds.setdefault(key, []).append(record["wall"])
    if not seconds:
        return text
    total = sum(fmean(seconds.get(cell) or seconds.get(cell[:1]) or seconds[()]) for cell in cells)
    return f"{text}, about {timedelta(minutes=round(total / 60))} (h:mm:ss), one at a time"


def check_data(comparison: Comparison) -> Iterator[str]:
    """Read the files and folders of all tasks; yield the number of examples of each, and warnings.

    Data of the hub and of packages is left to the jobs.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: the data of a task cannot be used; the message names the task.

    """
    for name, task in comparison.chosen_tasks.items():
        try:
            for data in task.sources:
                if not is_input(data):
                    require_data_path(data)
            if not Path(task.data).exists():
                continue
            yield from _checked(comparison, name, task)
        except (ValueError, FileNotFoundError) as error:
            kind = FileNotFoundError if isinstance(error, FileNotFoundError) else ValueError
            raise kind(f"Task {name}: {error}") from None


def _checked(comparison: Comparison, name: str, task: Task) -> Iterator[str]:
    config = train_config(comparison.definition, name, find_method("lora"), 1.0, 1, comparison.r, Path())
    kind = TASKS[task.task]
    if not task.test_data and task.test not in (splits := load_splits(task.data, config)):
        raise ValueError(
            f"{task.data} has no split {task.test}. Available splits: {', '.join(splits)}. Select one with test: "
            "SPLIT, or pass a file with test_data: FILE."
        )
    data = load_task_data(config, kind)
    counts = [f"{len(data.splits['train']):,} training", f"{len(data.splits['validation']):,} validation"]
    for source, split in task.tests:
        if Path(source).exists():
            test, *_ = load_examples(config, kind, source, split, data.labels, with_label=True)
            counts.append(f"{len(sampled(test, task.test_examples)):,} test")
    yield f"Data of {name}: {', '.join(counts)} examples."
    yield from data.notes
