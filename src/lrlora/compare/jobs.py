"""A comparison as jobs: which there are, which come next, and running them so that nothing is ever lost or done twice.

Every job trains one method on one task at one learning rate with one seed, in a process of its own. Its result is one
file, which appears whole or not at all. The same command goes on where it was stopped, and may run several times at
once: processes share the jobs through locks.
"""

from __future__ import annotations

import functools
import json
import math
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from ..training.config import require_known
from .methods import METHODS, find_method
from .suites import Suite, load_suite

TUNING_SEED = 0
SETTINGS_FILE = "comparison.json"
_GRID_STEPS = 2  # times that the grid of rates may grow by a factor of 2 on either side
Record = dict[str, Any]


@dataclass(frozen=True)
class Job:
    """One training run."""

    task: str
    method: str
    learning_rate: float
    seed: int

    @property
    def is_tuning(self) -> bool:
        return self.seed == TUNING_SEED

    @property
    def name(self) -> str:
        """The name of its files."""
        return f"{self.task}--{self.method}--{self.learning_rate:g}--{self.seed}"


@dataclass(frozen=True)
class Comparison:
    """What is compared.

    Args:
        suite: a key of `SUITES`, or a YAML file with a suite.
        methods: keys as `find_method` takes them; what others are compared with is "lora", or else the first.
        seeds: final runs of each method on each task, at the rate that one more seed has chosen.
        rank: r.
        tasks: of the suite; default: all.
        rates: learning rates to try for every method, and no others; default: each method's own, and beyond them.

    Raises:
        ValueError: a name is unknown, or a number out of range.

    """

    suite: str
    methods: tuple[str, ...] = ("lora", "lora-2r", "sine", "dora", "adalora", "lr-lora")
    seeds: int = 3
    rank: int = 4
    tasks: tuple[str, ...] = ()
    rates: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        for method in self.methods:
            find_method(method)
        for task in self.tasks:
            require_known(f"a task of {self.suite}", task, self.definition.tasks)
        if not self.methods:
            raise ValueError(f"There must be a method to compare. Known: {', '.join(METHODS)}.")
        if not all(0 < rate < math.inf for rate in self.rates):
            raise ValueError(f"rates must be numbers > 0, and are {', '.join(map(str, self.rates))}.")
        for name, value in (("seeds", self.seeds), ("rank", self.rank)):
            if value < 1:
                raise ValueError(f"{name} must be a whole number ≥ 1, and is {value}.")

    @functools.cached_property
    def definition(self) -> Suite:
        return load_suite(self.suite)

    @property
    def task_names(self) -> tuple[str, ...]:
        return self.tasks or tuple(self.definition.tasks)

    @property
    def reference(self) -> str:
        return "lora" if "lora" in self.methods else self.methods[0]

    def plan(self, finished: dict[str, Record]) -> list[Job]:
        """All jobs that are known to be wanted, task by task; more may follow from their results.

        Every rate on the tuning seed first, the grid growing while the best rate is at its edge; then the seeds at the
        best rate, which alone read the test data.
        """
        return [job for task in self.task_names for method in self.methods for job in self._of(task, method, finished)]

    def _of(self, task: str, method: str, finished: dict[str, Record]) -> list[Job]:
        grid = sorted(self.rates or find_method(method).rates)
        growth = 1 if self.rates else 2**_GRID_STEPS
        rates = list(grid)
        while True:
            trials = [Job(task, method, rate, TUNING_SEED) for rate in rates]
            if not all(trial.name in finished for trial in trials):
                return trials
            best = best_rate([finished[trial.name] for trial in trials])
            if best is None:
                return trials  # all have failed
            if best == rates[0] and best > grid[0] / growth:
                rates.insert(0, best / 2)
            elif best == rates[-1] and best < grid[-1] * growth:
                rates.append(best * 2)
            else:
                return trials + [Job(task, method, best, seed) for seed in range(1, self.seeds + 1)]


def best_rate(trials: list[Record]) -> float | None:
    """The rate with the lowest validation loss, a steadier guide than accuracy; None if every trial failed."""
    good = [trial for trial in trials if trial.get("validation") and math.isfinite(trial["validation"]["loss"])]
    return min(good, key=lambda trial: trial["validation"]["loss"])["learning_rate"] if good else None


def read_records(output: Path) -> dict[str, Record]:
    """The finished jobs in a folder, by name."""
    return {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in sorted(output.glob("jobs/*.json"))}


def prepare(comparison: Comparison, output: Path) -> None:
    """Make a folder for the results, or check that those in it are of the same suite and rank.

    Raises:
        FileExistsError: the folder holds something else.

    """
    settings = json.loads(json.dumps({"rank": comparison.rank, "suite": asdict(comparison.definition)}))
    path = output / SETTINGS_FILE
    if path.exists():
        if json.loads(path.read_text(encoding="utf-8")) != settings:
            raise FileExistsError(
                f"The folder {output} holds another comparison: another suite, rank or settings of its tasks. Give "
                "another --output."
            )
    elif output.exists() and any(output.iterdir()):
        raise FileExistsError(f"The folder {output} is not empty, and no comparison. Give another --output.")
    else:
        output.mkdir(parents=True, exist_ok=True)
        _write(path, settings)
    for name in ("jobs", "locks", "logs"):
        (output / name).mkdir(exist_ok=True)


def run_comparison(
    comparison: Comparison, output: Path, *, hours: float | None = None, announce: Callable[[str], None] = print
) -> list[Job]:
    """Run what is missing; returns what is left when the time is up.

    Args:
        comparison: what is compared.
        output: folder of the results.
        hours: start no job after so long; None: run all.
        announce: is told what is being done.

    Raises:
        FileExistsError: the folder holds something else.
        RuntimeError: a job was killed from outside.

    """
    prepare(comparison, output)
    started = time.monotonic()
    while True:
        finished = read_records(output)
        missing = [job for job in comparison.plan(finished) if job.name not in finished]
        is_over = hours is not None and time.monotonic() - started >= 3600 * hours
        if not missing or is_over:
            return missing
        for job in missing:
            with _claimed(output, job) as is_mine:
                if not is_mine or (output / "jobs" / f"{job.name}.json").exists():
                    continue
                announce(f"{_progress(missing, finished)} · {job.name.replace('--', ' · ')}")
                _run(job, comparison, output)
                break
        else:
            time.sleep(5)  # others are at work on all that is missing; more may follow from it


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


def _progress(missing: list[Job], finished: dict[str, Record]) -> str:
    text = f"{len(finished)} jobs done, {len(missing)} known to be left"
    seconds = [record["seconds"] for record in finished.values() if record.get("seconds")]
    if not seconds:
        return text
    by_kind: dict[tuple[str, str], list[float]] = {}
    for record in finished.values():
        if record.get("seconds"):
            by_kind.setdefault((record["task"], record["method"]), []).append(record["seconds"])
    mean = sum(seconds) / len(seconds)
    left = 0.0
    for job in missing:
        known = by_kind.get((job.task, job.method), [mean])
        left += sum(known) / len(known)
    return f"{text}, about {left / 3600:.1f} hours"


def _run(job: Job, comparison: Comparison, output: Path) -> None:
    """Run a job in a process of its own and file its result; what the task cannot do is filed as a failure."""
    request = {**asdict(job), "rank": comparison.rank}
    log = output / "logs" / f"{job.name}.log"
    with tempfile.TemporaryDirectory(dir=output / "locks") as scratch, log.open("w", encoding="utf-8") as written:
        result = Path(scratch) / "result.json"
        suite = json.dumps(asdict(comparison.definition))
        command = [sys.executable, "-m", "lrlora.compare.worker", suite, json.dumps(request), str(result)]
        process = subprocess.run(command, stdout=written, stderr=subprocess.STDOUT, check=False)
        if process.returncode == 0:
            record = json.loads(result.read_text(encoding="utf-8"))
        elif process.returncode == 1:
            lines = log.read_text(encoding="utf-8").strip().splitlines()
            record = {**request, "failure": lines[-1] if lines else "no message"}
        else:
            raise RuntimeError(
                f"The job {job.name} was stopped from outside (exit status {process.returncode}); what it said is in "
                f"{log}. Run the same command again to go on."
            )
    _write(output / "jobs" / f"{job.name}.json", record)


def _write(path: Path, content: Any) -> None:
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(content, indent=1), encoding="utf-8")
    partial.replace(path)
