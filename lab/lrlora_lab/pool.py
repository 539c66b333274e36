"""Checks the local data of a comparison and runs its missing jobs, several at a time; resumable.

Each job runs in a separate process with an atomic result file. Rerun the same command to resume.
"""

from __future__ import annotations

import multiprocessing
import os
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from datetime import timedelta
from importlib import import_module
from multiprocessing.connection import wait
from pathlib import Path
from statistics import fmean
from typing import Any

import torch

from lrlora.files import write_json
from lrlora.locks import only_writer
from lrlora.train.data import load_examples, load_splits, load_task_data, require_data_path, sampled
from lrlora.train.tasks import KINDS

from .jobs import Comparison, Job, Record, prepare, read_records, train_config
from .methods import find_method
from .suite import Task
from .worker import work, work_on_a_node

_GPUS = "CUDA_VISIBLE_DEVICES"


def run_comparison(
    comparison: Comparison,
    output: Path,
    *,
    at_once: int | None = None,
    ray: str | None = None,
    hours: float | None = None,
    announce: Callable[[str], None] = print,
) -> list[Job]:
    """Run missing jobs; returns those left after a timeout or an external error.

    Args:
        comparison: the comparison.
        output: folder of the results.
        at_once: number of jobs at a time; None: one per GPU, or one.
        ray: address of a Ray cluster to run them on, one per GPU or core; None: this machine.
        hours: start no job after this time; None: run all.
        announce: receives progress messages.

    Raises:
        BlockingIOError: another process runs it.
        FileExistsError: the folder holds something else.
        ValueError: an option of a method or setting of a task is invalid.

    """
    for note in check_data(comparison):
        announce(note)
    with only_writer(output):
        prepare(comparison, output)
        for name, record in read_records(output).items():
            if record.get("failure") and not record.get("diverged", True):  # which the user may have mended
                (output / "jobs" / f"{name}.json").unlink(missing_ok=True)
        pool = _Pool(comparison, output, at_once) if ray is None else _Cluster(comparison, output, ray)
        try:
            return _run_missing(pool, hours, announce)
        finally:
            pool.close()


def _run_missing(pool: _Pool | _Cluster, hours: float | None, announce: Callable[[str], None]) -> list[Job]:
    started = time.monotonic()
    given_up: set[str] = set()
    while True:
        finished = read_records(pool.output)
        _remove_runs(pool.output, finished)
        missing = [job for job in pool.comparison.plan(finished) if job.name not in finished]
        if hours is None or time.monotonic() - started < 3600 * hours:
            begun = given_up | {job.name for job in pool.running.values()}
            for job in [job for job in missing if job.name not in begun][: pool.size - len(pool.running)]:
                announce(f"{_progress(pool.comparison, missing, finished)} · {_told(job)}")
                pool.start(job)
        if not pool.running:
            return missing
        for job, problem in pool.wait():
            if problem:
                given_up.add(job.name)
                announce(f"Not done; the next call tries again: {problem}")


def _told(job: Job) -> str:
    scale = "" if job.scale == 1 else f", scale {job.scale:g}"
    return f"{job.task}, {job.method}, rate {job.learning_rate:g}{scale}, seed {job.seed}"


def _remove_runs(output: Path, finished: dict[str, Record]) -> None:
    """Remove folders of runs with saved results, including those of killed processes."""
    for run in (output / "runs").iterdir():
        if run.name in finished:
            shutil.rmtree(run)


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


class _Pool:
    """Runs jobs, each in a process of its own with one GPU: with more, the Trainer would use larger batches.

    Processes are forks of one with all imports done; where there is a GPU, which a fork could not use, new ones.

    Attributes:
        size: number of jobs at a time.
        running: process → job.

    """

    def __init__(self, comparison: Comparison, output: Path, at_once: int | None) -> None:
        self.comparison, self.output = comparison, output
        has_gpu = torch.cuda.is_available()
        self._visible = os.environ.get(_GPUS)
        self._gpus = gpus(torch.cuda.device_count()) if has_gpu else []
        self.size = at_once or len(self._gpus) or 1
        self._context: Any = multiprocessing.get_context("spawn" if has_gpu else "forkserver")
        self._context.set_forkserver_preload(["lrlora_lab.worker"])
        self._threads = max(1, torch.get_num_threads() // self.size)
        self.running: dict[Any, Job] = {}
        self._gpu_of: dict[Any, str] = {}

    def start(self, job: Job) -> None:
        """Start a job."""
        request = {**asdict(job), "rank": self.comparison.r}
        arguments = (asdict(self.comparison.definition), request, self.output, job.name, self._threads)
        process = self._context.Process(target=work, args=arguments)
        if self._gpus:
            used = [self._gpu_of[other] for other in self.running]
            self._gpu_of[process] = os.environ[_GPUS] = min(self._gpus, key=used.count)
        process.start()
        self.running[process] = job

    def wait(self) -> list[tuple[Job, str | None]]:
        """Wait until jobs end; those that wrote no result are returned with the reason."""
        ended = wait([process.sentinel for process in self.running])
        done = [process for process in self.running if process.sentinel in ended]
        return [(job := self.running.pop(process), self._problem(process, job.name)) for process in done]

    def _problem(self, process: Any, name: str) -> str | None:
        process.join()
        if (self.output / "jobs" / f"{name}.json").exists():
            return None
        log = self.output / "logs" / f"{name}.log"
        lines = log.read_text(encoding="utf-8").strip().splitlines() if log.exists() else []
        said = lines[-1] if lines else "no message"
        return f"{name} ended with status {process.exitcode} ({said}); see {log}"

    def close(self) -> None:
        """Stop the jobs that still run; long ones save a checkpoint."""
        for process in self.running:
            process.terminate()
        for process in self.running:
            process.join()
        os.environ.pop(_GPUS, None)
        if self._visible is not None:
            os.environ[_GPUS] = self._visible


class _Cluster:
    """Runs jobs on the nodes of a Ray cluster, each with a GPU or a core; twice again if its node is lost.

    Files must have the same paths on all nodes.

    Attributes:
        size: number of jobs at a time.
        running: reference to a result → job.

    """

    def __init__(self, comparison: Comparison, output: Path, address: str) -> None:
        try:
            ray: Any = import_module("ray")
        except ModuleNotFoundError:
            raise ValueError("--ray needs Ray, which is not installed. Run pip install './lab[ray]'.") from None
        self.comparison, self.output, self._ray = comparison, output, ray
        ray.init(address, log_to_driver=False)
        there = ray.cluster_resources()
        with_gpu = there.get("GPU", 0) >= 1
        self.size = int(there["GPU" if with_gpu else "CPU"])
        options = {"num_cpus": 1, "num_gpus": int(with_gpu), "max_retries": 2, "max_calls": 1}
        self._work = ray.remote(**options)(work_on_a_node)
        self.running: dict[Any, Job] = {}

    def start(self, job: Job) -> None:
        """Start a job."""
        request = {**asdict(job), "rank": self.comparison.r}
        self.running[self._work.remote(asdict(self.comparison.definition), request, os.getcwd())] = job

    def wait(self) -> list[tuple[Job, str | None]]:
        """Wait until a job ends, and save its result; without one, it is returned with the reason."""
        (reference,), _ = self._ray.wait(list(self.running))
        job = self.running.pop(reference)
        try:
            write_json(self.output / "jobs" / f"{job.name}.json", self._ray.get(reference))
        except self._ray.exceptions.RayError as error:
            return [(job, f"{job.name}: {str(error).strip().splitlines()[-1]}")]
        return [(job, None)]

    def close(self) -> None:
        """Stop the jobs that still run, and leave the cluster."""
        for reference in self.running:
            self._ray.cancel(reference, force=True)
        self._ray.shutdown()


def gpus(count: int) -> list[str]:
    """GPUs that are visible, by the names that CUDA_VISIBLE_DEVICES takes."""
    return os.environ[_GPUS].split(",") if os.environ.get(_GPUS) else [str(index) for index in range(count)]


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
