"""Checks the local data of a comparison and runs its missing jobs; resumable and concurrent.

Each job runs in a separate process with an atomic result file. Rerun the same command to resume, or run it several
times at once: processes share the jobs through locks.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path
from statistics import fmean
from typing import Any

from filelock import FileLock, Timeout

from lrlora.files import write_json
from lrlora.train.data import load_examples, load_splits, load_task_data, require_data_path, sampled
from lrlora.train.tasks import KINDS

from .jobs import DIVERGED, FAILED, Comparison, Job, Record, prepare, read_records, train_config
from .methods import find_method
from .suite import Suite, Task


def run_comparison(
    comparison: Comparison, output: Path, *, hours: float | None = None, announce: Callable[[str], None] = print
) -> list[Job]:
    """Run missing jobs; returns those left after a timeout or an external error.

    Args:
        comparison: the comparison.
        output: folder of the results.
        hours: start no job after this time; None: run all.
        announce: receives progress messages.

    Raises:
        FileExistsError: the folder holds something else.
        ValueError: an option of a method or setting of a task is invalid.

    """
    for note in check_data(comparison):
        announce(note)
    prepare(comparison, output)
    for name, record in read_records(output).items():
        if record.get("failure") and not record.get("diverged", True):  # which the user may have mended
            (output / "jobs" / f"{name}.json").unlink(missing_ok=True)
    with closing(_Worker(comparison.definition)) as worker:
        return _run_missing(worker, comparison, output, hours, announce)


def _run_missing(
    worker: _Worker, comparison: Comparison, output: Path, hours: float | None, announce: Callable[[str], None]
) -> list[Job]:
    started = time.monotonic()
    given_up: set[str] = set()
    while True:
        finished = read_records(output)
        _remove_runs(output, finished)
        missing = [job for job in comparison.plan(finished) if job.name not in finished]
        is_over = hours is not None and time.monotonic() - started >= 3600 * hours
        if is_over or all(job.name in given_up for job in missing):
            return missing
        for job in missing:
            if job.name in given_up:
                continue
            with _claimed(output, job) as is_mine:
                if not is_mine or (output / "jobs" / f"{job.name}.json").exists():
                    continue
                announce(f"{_progress(comparison, missing, finished)} · {_told(job)}")
                problem = _run(worker, job, comparison, output)
                if problem:
                    given_up.add(job.name)
                    announce(f"Not done; the next call tries again: {problem}")
                break
        else:
            time.sleep(5)  # other processes run all missing jobs, whose results may add more


def _told(job: Job) -> str:
    scale = "" if job.scale == 1 else f", scale {job.scale:g}"
    return f"{job.task}, {job.method}, rate {job.learning_rate:g}{scale}, seed {job.seed}"


def _remove_runs(output: Path, finished: dict[str, Record]) -> None:
    """Remove folders of runs with saved results, including those of killed processes."""
    for run in (output / "runs").iterdir():
        if run.name in finished:
            shutil.rmtree(run, ignore_errors=True)  # another process may be removing it


@contextmanager
def _claimed(output: Path, job: Job) -> Iterator[bool]:
    lock = FileLock(output / "locks" / f"{job.name}.lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        yield False
        return
    try:
        yield True
    finally:
        lock.release()


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
    return f"{text}, about {timedelta(minutes=round(total / 60))} (h:mm:ss) for one process"


# Prefixes of the variables by which `accelerate launch` marks distributed processes.
_OF_LAUNCHERS = ("RANK", "LOCAL_", "WORLD_SIZE", "GROUP_", "ROLE_", "MASTER_", "TORCHELASTIC_", "ACCELERATE_")


def _environment() -> dict[str, str]:
    """Environment of a job, with one GPU: with more, the Trainer would use larger batches than the task's."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(_OF_LAUNCHERS)}
    rank, visible = int(os.environ.get("LOCAL_RANK", 0)), os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible != "":  # empty hides all GPUs
        environment["CUDA_VISIBLE_DEVICES"] = visible.split(",")[rank] if visible else str(rank)
    return environment


class _Worker:
    """Runs jobs, each in a fork of a process with all imports done."""

    def __init__(self, suite: Suite) -> None:
        self._command = [sys.executable, "-m", "lrlora_lab.worker", json.dumps(asdict(suite))]
        self._process: subprocess.Popen[str] | None = None

    def run(self, request: dict[str, Any], folder: Path, result: Path, log: Path) -> int:
        """Run a job that trains in `folder`, writes to `result` and logs to `log`; returns its exit status."""
        paths = {"folder": str(folder), "result": str(result), "log": str(log)}
        order = json.dumps({"request": request, **paths}) + "\n"
        is_new = self._process is None
        process = self._process or self._start(log)
        assert process.stdin is not None
        assert process.stdout is not None
        with suppress(BrokenPipeError):
            process.stdin.write(order)
            process.stdin.flush()
        said = process.stdout.readline()
        if said:
            return int(said)
        self.close()
        # After its last job, a worker may already have exited, as on a GPU.
        return process.returncode if is_new else self.run(request, folder, result, log)

    def _start(self, log: Path) -> subprocess.Popen[str]:
        with log.open("w", encoding="utf-8") as written:
            # The worker ends when its pipe closes: with this process, however that ends.
            pipe = subprocess.PIPE
            self._process = subprocess.Popen(
                self._command, stdin=pipe, stdout=pipe, stderr=written, text=True, env=_environment()
            )
        return self._process

    def close(self) -> None:
        """End the process."""
        if self._process is not None:
            with suppress(BrokenPipeError), self._process:
                self._process.communicate()
            self._process = None


def _run(worker: _Worker, job: Job, comparison: Comparison, output: Path) -> str | None:
    """Run a job in a separate process and save its result; external errors are returned and not saved."""
    request = {**asdict(job), "rank": comparison.r}
    log, folder = output / "logs" / f"{job.name}.log", output / "runs" / job.name
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as scratch:
        result = Path(scratch) / "result.json"
        status = worker.run(request, folder, result, log)
        if status == 0:
            record = json.loads(result.read_text(encoding="utf-8"))
        else:
            lines = log.read_text(encoding="utf-8").strip().splitlines()
            said = lines[-1] if lines else "no message"
            if status not in (FAILED, DIVERGED):
                return f"{job.name} ended with status {status} ({said}); see {log}"
            record = {**request, "failure": said, "diverged": status == DIVERGED}
    write_json(output / "jobs" / f"{job.name}.json", record | {"wall": time.monotonic() - started})
    return None


def check_data(comparison: Comparison) -> Iterator[str]:
    """Read the files and folders of all tasks; yield the number of examples of each, and warnings.

    Data of the hub and embedded data are left to the jobs.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: the data of a task cannot be used; the message names the task.

    """
    for name in comparison.task_names:
        task = comparison.definition.training_tasks.get(name)
        if task is None:
            continue
        try:
            for data in (task.data, *(other for other, _ in task.tests)):
                require_data_path(data)
            if not Path(task.data).exists():
                continue
            yield from _checked(comparison, name, task)
        except (ValueError, FileNotFoundError) as error:
            raise type(error)(f"Task {name}: {error}") from None


def _checked(comparison: Comparison, name: str, task: Task) -> Iterator[str]:
    config = train_config(comparison.definition, name, find_method("lora"), 1.0, 1, comparison.r, Path())
    kind = KINDS[task.task]
    if not task.test_data and task.test not in (there := load_splits(task.data, config)):
        raise ValueError(
            f"{task.data} has no split {task.test}. Available splits: {', '.join(there)}. Select one with test: "
            "SPLIT, or pass a file with test_data: FILE."
        )
    data = load_task_data(config, kind)
    counts = [f"{len(data.splits['train']):,} training", f"{len(data.splits['validation']):,} validation"]
    for source, split in task.tests:
        if Path(source).exists():
            test, _ = load_examples(config, kind, source, split, data.labels, with_label=True)
            counts.append(f"{len(sampled(test, task.test_examples)):,} test")
    yield f"Data of {name}: {', '.join(counts)} examples."
    yield from data.notes
