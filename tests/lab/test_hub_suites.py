"""The suites, by the commands that a user types where there is a hub, against the stand-in for it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from lrlora_lab.cli import app
from lrlora_lab.jobs import read_records
from lrlora_lab.methods import ABLATIONS
from lrlora_lab.suite import load_suite

from ..train.small import save_decoder

SHORT = ("--steps", 2, "--seeds", 1, "--rates", 1e-3)
slow = pytest.mark.slow


def lrlora(hub: dict[str, str], folder: Path, *arguments: object) -> str:
    command = [sys.executable, "-m", "lrlora_lab", *map(str, arguments)]
    environment = {**os.environ, **hub, "COLUMNS": "300", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, cwd=folder, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "failed" not in done.stdout
    assert "Not done" not in done.stdout
    return " ".join(done.stdout.split())


def test_the_suite_of_llama_tells_what_it_needs_and_is_tested_on_all_eight_sets(
    hub: dict[str, str], tmp_path: Path
) -> None:
    told = lrlora(hub, tmp_path, "compare", "llama-3-8b", "--dry-run")
    assert "14 jobs" in told
    assert "commonsense │ LoRA" in told
    assert not list(tmp_path.iterdir())
    told = lrlora(hub, tmp_path, "compare", "llama-3-8b", *SHORT, "--output", "out")
    records = {record["method"]: record for record in read_records(tmp_path / "out").values() if record["seed"] == 1}
    assert set(records) == {"lora", "lr-lora"}
    for record in records.values():
        by_set = [
            record["test"][f"accuracy of {name}"] for name in load_suite("llama-3-8b").tasks["commonsense"].test_data
        ]
        assert len(by_set) == 8
        assert record["test"]["accuracy"] == pytest.approx(sum(by_set) / 8)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name in ("sharing", "targets") else slow) for name in ABLATIONS]
)
def test_an_ablation_is_a_list_of_methods_that_can_be_laid_out(tmp_path: Path, name: str) -> None:
    asked = ("compare", "llama-3-8b", "--model", save_decoder(tmp_path / "model"), "--dry-run")
    told = CliRunner().invoke(app, [*asked, "--ablation", name], env={"COLUMNS": "300"})
    assert told.exit_code == 0, told.output
    rows = [line for line in told.output.splitlines() if line.startswith("│ commonsense")]
    assert len(rows) == len(set(rows)) >= 3
    assert all(int(row.split("│")[3]) > 0 for row in rows)  # jobs


@pytest.mark.refused
@pytest.mark.parametrize(
    ("asked", "said"),
    [
        (("compare", "offline-nl"), "Did you mean offline-nlu?"),
        (("compare", "offline-nlu", "--ablation", "gains"), "Did you mean gain?"),
        (("compare", "offline-nlu", "--ablation", "gain", "--methods", "lora"), "Remove --methods"),
    ],
)
def test_what_makes_no_sense_is_refused(asked: tuple[str, ...], said: str) -> None:
    told = CliRunner().invoke(app, list(asked), env={"COLUMNS": "300"})
    assert told.exit_code == 1
    assert said in " ".join(told.output.split())
