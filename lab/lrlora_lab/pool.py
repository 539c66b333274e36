"""Runs the missing jobs of a study, several at a time; resumable.

Each job runs in a separate process with an atomic result file. Rerun the same command to resume.
"""

from __future__ import annotations

import multiprocessing
import os
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from importlib import import_module
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any, Protocol

import torch
import transformers

from lrlora.files import write_json

_GPUS = "CUDA_VISIBLE_DEVICES"
Record = dict[str, Any]
Call = tuple[Callable[..., Record], tuple[Any, ...]]


class Named(Protocol):
    """A job."""

    @property
    def name(self) -> str: ...


class Study(Protocol):
    """Jobs with a result file each."""

    @property
    def output(self) -> Path:
        """Folder of the results."""

    def finished(self) -> dict[str, Record]:
        """Records of the finished jobs, by name."""

    def plan(self, finished: dict[str, Record]) -> Sequence[Any]:
        """Jobs that can run; results of the finished ones may add more."""

    def is_alone(self, job: Any) -> bool:
        """Whether no other job may run beside it."""

    def call(self, job: Any) -> Call:
        """Importable function of a job, and its arguments; the last, which is added, is a folder for the job alone."""

    def told(self, job: Any, missing: list[Any], finished: dict[str, Record]) -> str:
        """Progress, and the next job."""


def run_missing(
    study: Study,
    *,
    at_once: int | None = None,
    ray: str | None = None,
    hours: float | None = None,
    announce: Callable[[str], None] = print,
) -> list[Any]:
    """Run missing jobs; returns those left after a timeout or an external error.

    Args:
        study: the study, of whose folder the caller is the only writer.
        at_once: number of jobs at a time; None: one per GPU, or one.
        ray: address of a Ray cluster to run them on, one per GPU or core; None: this machine.
        hours: start no job after this time; None: run all.
        announce: receives progress messages.

    """
    for name in ("jobs", "logs", "runs"):
        (study.output / name).mkdir(parents=True, exist_ok=True)
    pool = _Pool(study, at_once) if ray is None else _Cluster(study, ray)
    try:
        return _run_missing(pool, hours, announce)
    finally:
        pool.close()


def _run_missing(pool: _Pool | _Cluster, hours: float | None, announce: Callable[[str], None]) -> list[Any]:
    started, study = time.monotonic(), pool.study
    given_up: set[str] = set()
    while True:
        finished = study.finished()
        for run in (study.output / "runs").iterdir():
            if run.name in finished:  # also those of killed processes
                shutil.rmtree(run)
        missing = [job for job in study.plan(finished) if job.name not in finished]
        if hours is None or time.monotonic() - started < 3600 * hours:
            begun = given_up | {job.name for job in pool.running.values()}
            for job in [job for job in missing if job.name not in begun]:
                running = [*pool.running.values()]
                if len(running) == pool.size or (running and any(map(study.is_alone, [job, *running]))):
                    continue
                announce(study.told(job, missing, finished))
                pool.start(job)
        if not pool.running:
            return missing
        for job, problem in pool.wait():
            if problem:
                given_up.add(job.name)
                announce(f"Not done; the next call tries again: {problem}")


class _Pool:
    """Runs jobs, each in a process of its own with one GPU: with more, the Trainer would use larger batches.

    Processes are forks of one with all imports done; where there is a GPU, which a fork could not use, new ones.

    Attributes:
        size: number of jobs at a time.
        running: process → job.

    """

    def __init__(self, study: Study, at_once: int | None) -> None:
        self.study = study
        has_gpu = torch.cuda.is_available()
        self._visible = os.environ.get(_GPUS)
        self._gpus = gpus(torch.cuda.device_count()) if has_gpu else []
        self.size = at_once or len(self._gpus) or 1
        self._context: Any = multiprocessing.get_context("spawn" if has_gpu else "forkserver")
        self._context.set_forkserver_preload(["lrlora_lab.worker"])
        self._threads = max(1, torch.get_num_threads() // self.size)
        self.running: dict[Any, Named] = {}
        self._gpu_of: dict[Any, str] = {}

    def start(self, job: Named) -> None:
        """Start a job."""
        arguments = (*self.study.call(job), self.study.output, job.name, self._threads)
        process = self._context.Process(target=work, args=arguments)
        if self._gpus:
            used = [self._gpu_of[other] for other in self.running]
            self._gpu_of[process] = os.environ[_GPUS] = min(self._gpus, key=used.count)
        process.start()
        self.running[process] = job

    def wait(self) -> list[tuple[Named, str | None]]:
        """Wait until jobs end; those that wrote no result are returned with the reason."""
        ended = wait([process.sentinel for process in self.running])
        done = [process for process in self.running if process.sentinel in ended]
        return [(job := self.running.pop(process), self._problem(process, job.name)) for process in done]

    def _problem(self, process: Any, name: str) -> str | None:
        process.join()
        if (self.study.output / "jobs" / f"{name}.json").exists():
            return None
        log = self.study.output / "logs" / f"{name}.log"
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

    def __init__(self, study: Study, address: str) -> None:
        try:
            ray: Any = import_module("ray")
        except ModuleNotFoundError:
            raise ValueError("--ray needs Ray, which is not installed. Run pip install './lab[ray]'.") from None
        self.study, self._ray = study, ray
        ray.init(address, log_to_driver=False)
        resources = ray.cluster_resources()
        with_gpu = resources.get("GPU", 0) >= 1
        self.size = int(resources["GPU" if with_gpu else "CPU"])
        options = {"num_cpus": 1, "num_gpus": int(with_gpu), "max_retries": 2, "max_calls": 1}
        self._work = ray.remote(**options)(work_on_a_node)
        self.running: dict[Any, Named] = {}

    def start(self, job: Named) -> None:
        """Start a job."""
        self.running[self._work.remote(*self.study.call(job), os.getcwd())] = job

    def wait(self) -> list[tuple[Named, str | None]]:
        """Wait until a job ends, and save its result; without one, it is returned with the reason."""
        (reference,), _ = self._ray.wait(list(self.running))
        job = self.running.pop(reference)
        try:
            write_json(self.study.output / "jobs" / f"{job.name}.json", self._ray.get(reference))
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


def work(function: Callable[..., Record], arguments: tuple[Any, ...], output: Path, name: str, threads: int) -> None:
    """Run a job in this process, and write its record.

    Args:
        function: see `Study.call`.
        arguments: all but the last.
        output: folder of the study.
        name: name of the job.
        threads: number of threads on a CPU.

    """
    os.setsid()  # Ctrl+C is for the parent, which stops its jobs by SIGTERM: a second signal would end them at once
    threading.Thread(target=_end_with_parent, daemon=True).start()
    written = os.open(output / "logs" / f"{name}.log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    for descriptor in (1, 2):
        os.dup2(written, descriptor)
    torch.set_num_threads(threads)
    transformers.logging.set_verbosity_error()
    try:
        record = function(*arguments, output / "runs" / name)
    except KeyboardInterrupt:
        print("Interrupted.")
        sys.exit(130)
    write_json(output / "jobs" / f"{name}.json", record)


def work_on_a_node(function: Callable[..., Record], arguments: tuple[Any, ...], folder: str) -> Record:
    """Run a job in a process of a cluster, with paths relative to `folder`; an interrupted one is not resumed."""
    os.chdir(folder)
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    with tempfile.TemporaryDirectory() as scratch:
        return function(*arguments, Path(scratch) / "run")


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
