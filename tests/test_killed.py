"""Killed at any moment and started again, or started several times at once.

Nothing is lost, half there or left about, and the result is that of a run left alone.
"""

from __future__ import annotations

import json
import random
import subprocess
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import yaml
from safetensors import safe_open

from .processes import LAB, LRLORA, Process
from .train.small import reviews, save_encoder

COMMANDS = {
    "train": "train run.yaml",
    "export": "export trained --energy 0.9 --output out",
    "predict": "predict trained --data data/test.csv --output out.csv",
    "report": "report trained --output out",
    "compare": "compare suite.yaml --methods lora,lr-lora --rates 1e-2 --seeds 1 --rank 2 --output out",
}
OUTPUTS = {name: command.split("--output ")[1] for name, command in COMMANDS.items() if "--output" in command}
OUTPUTS |= {"train": "out"}
KILLS = {"train": 24, "export": 8, "predict": 8, "report": 4, "compare": 10}
NOW = [("train", 0)]
CASES = [
    pytest.param(name, seed, marks=[] if (name, seed) in NOW else pytest.mark.slow)
    for name, count in KILLS.items()
    for seed in range(count)
]
AT_ONCE = [
    pytest.param(name, count, marks=[] if (name, count) == ("train", 2) else pytest.mark.slow)
    for name in COMMANDS
    for count in (2, 8)
]
TOLD = ("is writing to out", "already exists", "exists already", "is not empty")  # the last three: it had ended by then
Alone = tuple[Path, float | None]  # the folder of a command that was left alone, and how long it took


def started(command: str, folder: Path) -> Process:
    return Process(LAB if command.startswith("compare") else LRLORA, *command.split(), cwd=folder)


def run(command: str, folder: Path, after: float | None = None) -> float | None:
    """Run a command in a process that is killed after so many seconds; how long it took, if it was not."""
    process, began = started(command, folder), time.monotonic()
    try:
        output = process.communicate(timeout=after)
    except subprocess.TimeoutExpired:
        process.kill()  # it alone: what it has started must end by itself
        process.communicate()
        return None
    assert process.returncode == 0, output
    return time.monotonic() - began


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Alone]:
    """A command's folder and time if it is left alone; run when it is first asked for."""
    columns = {"text": "review", "label": "verdict"}
    training = {"max_steps": 12, "per_device_train_batch_size": 4, "save_steps": 2, "eval_steps": 2, "logging_steps": 1}
    content = {"model": "./base", "data": "data", "task": "classify", "columns": columns, "output": "out"}
    content |= {"rank_every": 2, "adapter": {"r": 2}, "training": {**training, "learning_rate": 0.05}}
    task = {"data": "data", "task": "classify", "metric": "accuracy", "steps": 12, "batch_size": 4, "columns": columns}

    @cache
    def inputs() -> Path:
        folder = tmp_path_factory.mktemp("inputs")
        save_encoder(folder / "base")
        (folder / "data").mkdir()
        for split, seed in (("train", 0), ("test", 1)):
            reviews(80, seed).to_csv(folder / "data" / f"{split}.csv", index=False)
        (folder / "run.yaml").write_text(yaml.safe_dump(content))
        (folder / "suite.yaml").write_text(yaml.safe_dump({"model": "./base", "tasks": {"reviews": task}}))
        return folder

    @cache
    def run_alone(name: str) -> Alone:
        folder = tmp_path_factory.mktemp(name)
        for path in inputs().iterdir():
            (folder / path.name).symlink_to(path)
        if name not in ("train", "compare"):
            (folder / "trained").symlink_to(run_alone("train")[0] / "out")
        return folder, run(COMMANDS[name], folder)

    return run_alone


def is_finished(path: Path) -> bool:
    """Whether a path is no temporary name, and no checkpoint that the Trainer has not ended with its state."""
    if path.name.startswith("checkpoint-"):
        try:
            json.loads((path / "trainer_state.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return False
    return path.suffix != ".partial"


def files(folder: Path) -> dict[str, Path]:
    """The files with final names, by path."""
    found = (path for path in sorted([folder, *folder.rglob("*")]) if path.is_file())
    return {
        str(path.relative_to(folder)): path
        for path in found
        if all(is_finished(part) for part in (path, *path.parents) if part.is_relative_to(folder))
    }


def require_whole(folder: Path) -> None:
    for path in files(folder).values():
        if path.suffix == ".json":
            json.loads(path.read_text(encoding="utf-8"))
        elif path.suffix == ".jsonl":
            # What follows the last end of a line was being written, and readers know it.
            for line in path.read_text(encoding="utf-8").split("\n")[:-1]:
                json.loads(line)
        elif path.suffix == ".safetensors":
            with safe_open(path, "pt"):
                pass


def results(folder: Path) -> dict[str, Any]:
    """What a command has made, less the times it took."""
    found: dict[str, Any] = {}
    for name, path in files(folder).items():
        if name == "results.csv":
            found[name] = pd.read_csv(path).drop(columns=["time", "memory"]).to_csv()
        elif name == "log_history.json":
            entries = json.loads(path.read_text(encoding="utf-8"))
            # A run that was killed after its last step has no entry of the whole training.
            times = ("_runtime", "_per_second", "_preparation_time")
            found[name] = [
                {k: v for k, v in e.items() if not k.endswith(times)} for e in entries if "train_runtime" not in e
            ]
        elif name == "run.json":
            found[name] = json.loads(path.read_text(encoding="utf-8"))
        elif name.startswith(("jobs", "logs", "peft", "report.md")):
            found[name] = None  # it is there; the table is made of it
        elif not name.startswith("checkpoint-"):  # one may be left if a run was killed as it removed them
            found[name] = path.read_bytes()
    return found


def link_inputs(folder: Path, other: Path) -> None:
    for path in folder.iterdir():
        if path.name not in OUTPUTS.values():
            (other / path.name).symlink_to(path)


def go_on(name: str, folder: Path) -> None:
    """Start a command again, unless it was killed when all was done; it leaves nothing about."""
    out = folder / OUTPUTS[name]
    require_whole(out)
    is_done = (out / "metrics.json").exists() if name == "train" else out.exists() and name != "compare"
    if not is_done:
        run("train --resume out" if (out / "run.json").exists() else COMMANDS[name], folder)
        assert name == "compare" or left_about(folder) == []


def left_about(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.suffix in (".partial", ".lock")]


@pytest.mark.parametrize(("name", "seed"), CASES)
def test_killed_and_started_again(alone: Callable[[str], Alone], tmp_path: Path, name: str, seed: int) -> None:
    folder, seconds = alone(name)
    link_inputs(folder, tmp_path)
    assert seconds
    if run(COMMANDS[name], tmp_path, random.Random(f"{name} {seed}").uniform(0, seconds)) is None:
        go_on(name, tmp_path)
    assert results(tmp_path / OUTPUTS[name]) == results(folder / OUTPUTS[name])


def start_at_once(name: str, count: int, folder: Path) -> list[Process]:
    return [started(COMMANDS[name], folder) for _ in range(count)]


@pytest.mark.parametrize(("name", "count"), AT_ONCE)
def test_several_at_once(alone: Callable[[str], Alone], tmp_path: Path, name: str, count: int) -> None:
    folder, _ = alone(name)
    link_inputs(folder, tmp_path)
    processes = start_at_once(name, count, tmp_path)
    said = [process.communicate() for process in processes]
    assert sorted(process.returncode or 0 for process in processes) == [0, *[1] * (count - 1)], said
    for process, text in zip(processes, said, strict=True):
        told = " ".join(text.split())
        assert process.returncode == 0 or any(word in told for word in TOLD), text
    assert results(tmp_path / OUTPUTS[name]) == results(folder / OUTPUTS[name])
    assert left_about(tmp_path) == []


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("name", dict.fromkeys(case.values[0] for case in AT_ONCE))
def test_some_of_several_are_killed(alone: Callable[[str], Alone], tmp_path: Path, name: str, seed: int) -> None:
    folder, seconds = alone(name)
    link_inputs(folder, tmp_path)
    assert seconds
    chance = random.Random(f"{name} {seed}")
    processes = start_at_once(name, 4, tmp_path)
    for process in chance.sample(processes, 3):
        time.sleep(chance.uniform(0, seconds / 3))
        process.kill()
    for process in processes:
        process.communicate()
    go_on(name, tmp_path)
    assert results(tmp_path / OUTPUTS[name]) == results(folder / OUTPUTS[name])
