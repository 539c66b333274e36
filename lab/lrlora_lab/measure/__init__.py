"""Measurements behind pages of the documentation.

The records of their jobs are stored beside the page, and fill its sections, each between a pair of markers. To add one,
add a file here with a `MEASUREMENT`, its name in `NAMES`, and a page.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from fnmatch import fnmatch
from importlib import import_module
from pathlib import Path
from statistics import fmean
from time import monotonic
from typing import Any

from lrlora.files import read_json, write_whole
from lrlora.locks import only_writer

from ..pool import Call, Record, run_missing
from ..sections import with_section

NAMES = ("speed", "gpu", "export", "compress")
Records = dict[str, Record]


@dataclass(frozen=True)
class Job:
    """A part of a measurement.

    Args:
        run: importable function that takes the folder that all jobs share, and returns what it measured.
        needs: jobs whose files in that folder it reads.
        is_timed: whether no other job may run beside it.

    """

    run: Callable[[Path], Record]
    needs: tuple[str, ...] = ()
    is_timed: bool = False


@dataclass(frozen=True)
class Measurement:
    """Jobs, and the tables of a page.

    Args:
        page: page to fill, in a checkout.
        jobs: by name.
        sections: records of the jobs that no other job needs → sections of the page, by marker.
        is_trial: whether the jobs only show that they run, and fill no page.

    """

    page: str
    jobs: dict[str, Job]
    sections: Callable[[Records], dict[str, str]]
    is_trial: bool = False

    @property
    def reported(self) -> list[str]:
        """Jobs that no other job needs."""
        needed = {name for job in self.jobs.values() for name in job.needs}
        return [name for name in self.jobs if name not in needed]

    def with_needed(self, names: list[str]) -> list[str]:
        """Add the jobs that these need."""
        needed = {name: None for job in names for name in self.with_needed(list(self.jobs[job].needs))}
        return list(dict.fromkeys([*needed, *names]))


def measurement(name: str) -> Measurement:
    """A measurement of `NAMES`."""
    return import_module(f".{name}", __name__).MEASUREMENT


def run_measurement(
    name: str,
    output: Path,
    only: str = "*",
    *,
    at_once: int | None = None,
    hours: float | None = None,
    announce: Callable[[str], None] = print,
) -> list[str]:
    """Run missing jobs and write the page; returns the jobs left after a timeout or an error.

    Args:
        name: one of `NAMES`.
        output: folder of the results.
        only: pattern of the jobs, such as `exports`; those that they need run too.
        at_once: number of jobs at a time; None: one per GPU, or one.
        hours: start no job after this time; None: run all.
        announce: receives progress messages.

    Raises:
        BlockingIOError: another process runs it.
        FileNotFoundError: the page is missing.
        ValueError: no job has such a name.

    """
    measured = measurement(name)
    chosen = [job for job in measured.reported if fnmatch(job, only)]
    if not chosen:
        raise ValueError(f"--only {only} matches no job. Jobs: {', '.join(measured.reported)}.")
    if not measured.is_trial:
        _require(measured.page)
    with only_writer(output):
        study = _Measuring(measured, output, measured.with_needed(chosen))
        run_missing(study, at_once=at_once, hours=hours, announce=announce)
        finished = study.finished()
        if not measured.is_trial:
            write_page(name, finished)
    return [job for job in study.wanted if job not in finished]


def stored_records(page: Path) -> Records:
    """Stored records of a measurement, by job."""
    path = page.with_suffix(".jsonl")
    rows = map(json.loads, path.read_text(encoding="utf-8").splitlines() if path.exists() else [])
    return {row.pop("job"): row for row in rows}


def write_page(name: str, new: Records) -> Path:
    """Store records of finished jobs beside those of other machines, and write the tables of all to the page.

    Raises:
        FileNotFoundError: the page is missing.

    """
    measured = measurement(name)
    page = _require(measured.page)
    records = stored_records(page) | {job: new[job] for job in measured.reported if job in new}
    text = updated(measured, page.read_text(encoding="utf-8"), records)
    rows = [{"job": job} | record for job, record in records.items()]
    write_whole(page.with_suffix(".jsonl"), "".join(json.dumps(row) + "\n" for row in rows))
    write_whole(page, text)
    return page


def updated(measured: Measurement, page: str, records: Records) -> str:
    """A page with its sections."""
    for marker, text in measured.sections(records).items():
        page = with_section(page, marker, text)
    return page


def _require(page: str) -> Path:
    if not Path(page).exists():
        raise FileNotFoundError(f"{page} does not exist. Run the command in a checkout of lrlora.")
    return Path(page)


def timed(run: Callable[[Path], Record], files: Path, _: Path) -> Record:
    """Record of a job, with its seconds; the last argument is a folder for the job alone, which it does not use."""
    start = monotonic()
    files.mkdir(exist_ok=True)
    return run(files) | {"wall": monotonic() - start}


@dataclass(frozen=True)
class _Named:
    name: str


@dataclass(frozen=True)
class _Measuring:
    """A measurement as a study."""

    measurement: Measurement
    output: Path
    wanted: list[str]

    def finished(self) -> Records:
        remedy = "Remove it, and run the same command to repeat the job."
        return {path.stem: read_json(path, dict[str, Any], remedy) for path in self.output.glob("jobs/*.json")}

    def plan(self, finished: Records) -> list[_Named]:
        jobs = self.measurement.jobs
        return [_Named(name) for name in self.wanted if finished.keys() >= {*jobs[name].needs}]

    def is_alone(self, job: _Named) -> bool:
        return self.measurement.jobs[job.name].is_timed

    def call(self, job: _Named) -> Call:
        return timed, (self.measurement.jobs[job.name].run, self.output / "files")

    def told(self, job: _Named, missing: list[_Named], finished: Records) -> str:
        left = [name for name in self.wanted if name not in finished]
        known = [finished[name]["wall"] for name in self.wanted if name in finished]
        about = f", about {timedelta(minutes=round(fmean(known) * len(left) / 60))} (h:mm:ss)" if known else ""
        return f"{len(known)} of {len(self.wanted)} jobs done{about} · {job.name}"
