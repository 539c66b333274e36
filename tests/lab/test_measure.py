"""Measurements of the documentation: jobs that need each other, the records, and the page."""

from __future__ import annotations

import json
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from lrlora_lab import measure
from lrlora_lab.cli import app
from lrlora_lab.measure import Job, Measurement, run_measurement, stored_records

PAGE = "# Squares\n\n<!-- squares -->\n<!-- /squares -->\n"


def write_number(number: int, files: Path) -> dict[str, Any]:
    (files / f"{number}.txt").write_text(str(number))
    return {"said": "not in the page"}


def square(number: int, files: Path) -> dict[str, Any]:
    return {"square": int((files / f"{number}.txt").read_text()) ** 2}


def fail(files: Path) -> dict[str, Any]:
    raise RuntimeError("the disk is full")


def nap(files: Path) -> dict[str, Any]:
    start = time.monotonic()
    time.sleep(1)
    return {"square": 0, "start": start, "end": time.monotonic()}


def table(records: dict[str, Any]) -> dict[str, str]:
    return {"squares": "".join(f"{job}: {record['square']}\n" for job, record in records.items())}


@pytest.fixture
def squares(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Job]:
    """Jobs of a measurement in a checkout; tests may replace them."""
    jobs = {}
    for number in (2, 3):
        jobs[f"write--{number}"] = Job(partial(write_number, number))
        jobs[f"square--{number}"] = Job(partial(square, number), (f"write--{number}",))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "speed.md").write_text(PAGE)
    monkeypatch.setattr(measure, "measurement", lambda name: Measurement(f"docs/{name}.md", jobs, table))
    return jobs


def test_jobs_run_after_those_that_they_need_and_fill_the_page(squares: dict[str, Job], tmp_path: Path) -> None:
    said: list[str] = []
    assert run_measurement("speed", tmp_path / "out", "square--3", announce=said.append) == []
    assert [line.split(" · ")[-1] for line in said] == ["write--3", "square--3"]
    assert "square--3: 9\n" in (tmp_path / "docs" / "speed.md").read_text()
    squares["square--2"], mended = Job(fail, ("write--2",)), squares["square--2"]
    assert run_measurement("speed", tmp_path / "out", announce=said.append) == ["square--2"]
    assert "the disk is full" in said[-1]
    squares["square--2"] = mended
    result = CliRunner().invoke(app, ["measure", "speed"])
    assert result.exit_code == 0, result.output
    assert "3 of 4 jobs done" in result.output
    page = (tmp_path / "docs" / "speed.md").read_text()
    assert page == PAGE.replace("<!-- /", "square--3: 9\nsquare--2: 4\n<!-- /")
    assert list(stored_records(Path("docs/speed.md"))) == ["square--3", "square--2"]


def test_a_timed_job_runs_alone(squares: dict[str, Job], tmp_path: Path) -> None:
    squares.clear()
    squares.update({name: Job(nap, is_timed=name == "timed") for name in ("first", "timed", "last")})
    assert run_measurement("speed", tmp_path / "out", at_once=3, announce=lambda line: None) == []
    when = {job: (record["start"], record["end"]) for job, record in stored_records(Path("docs/speed.md")).items()}
    start, end = when.pop("timed")
    assert all(other_end <= start or end <= other_start for other_start, other_end in when.values())


@pytest.mark.usefixtures("squares")
def test_stored_records_are_kept_and_shown(tmp_path: Path) -> None:
    rows = [{"job": "square--2", "square": 5}, {"job": "of another machine", "square": 6}]
    (tmp_path / "docs" / "speed.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    result = CliRunner().invoke(app, ["measure", "speed", "--report"])
    assert result.exit_code == 0, result.output
    assert (tmp_path / "docs" / "speed.md").read_text() == PAGE.replace(
        "<!-- /", "square--2: 5\nof another machine: 6\n<!-- /"
    )


@pytest.mark.refused
@pytest.mark.usefixtures("squares")
def test_what_cannot_be_measured_is_one_clear_error() -> None:
    for arguments, message in (
        (["speed", "--only", "cubes"], "--only cubes matches no job. Jobs: square--2, square--3."),
        (["export"], "docs/export.md does not exist. Run the command in a checkout of lrlora."),
        (["lengths"], "Unknown measurement 'lengths'. Known: speed, gpu"),
    ):
        result = CliRunner().invoke(app, ["measure", *arguments], env={"COLUMNS": "200"})
        assert result.exit_code == 1, result.output
        assert message in " ".join(result.output.split()), result.output
