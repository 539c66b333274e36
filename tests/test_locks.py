"""An output that another process writes is left alone, whatever command is given."""

from __future__ import annotations

import os
import re
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from lrlora.locks import only_writer
from lrlora.train.run import Interrupted, train
from lrlora.train.settings import TrainConfig

from .cli import run, told
from .processes import Process
from .train.small import reviews, save_encoder

HOLDER = """
import sys
from lrlora.locks import only_writer
with only_writer(sys.argv[1]):
    print("held", flush=True)
    input()
"""
TRAIN = "train --model ./base --data ./data --task classify --steps 2"


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The current folder, with a run that is finished and one that is not."""
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("inputs")
        patch.chdir(folder)
        save_encoder(folder / "base")
        Path("data").mkdir()
        reviews(32).rename(columns={"review": "text", "verdict": "label"}).to_csv("data/train.csv", index=False)
        training = {"max_steps": 3, "eval_steps": 1, "save_steps": 1, "per_device_train_batch_size": 4}
        training["load_best_model_at_end"] = False  # the last step, which has an update
        config = {"model": "./base", "data": "./data", "task": "classify", "adapter": {"r": 2}, "training": training}
        train(TrainConfig.from_dict(config | {"output": "run"}))
        with pytest.raises(Interrupted):
            train(
                TrainConfig.from_dict(config | {"output": "cut"}),
                announce=lambda line: signal.raise_signal(signal.SIGINT) if line.startswith("Step 1:") else None,
            )
        yield folder


def hold(output: str) -> Process:
    """A process that writes an output."""
    process = Process(HOLDER, output)
    assert process.stdout.readline() == "held\n"
    return process


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    ("output", "command"),
    [
        ("new", f"{TRAIN} --output new"),
        ("cut", "train --resume cut"),
        ("new", "export run --energy 0.9 --output new"),
        *(
            pytest.param(output, command, marks=pytest.mark.slow)
            for output, command in (
                ("run", f"{TRAIN} --output ./run --overwrite"),
                ("new.jsonl", "predict run --data ./data --output new.jsonl"),
                ("new.html", "report run --output new.html"),
                ("new", "demo --output new"),
            )
        ),
    ],
)
def test_a_second_writer_is_told_and_touches_nothing(inputs: Path, output: str, command: str) -> None:
    before = contents(inputs)
    process = hold(output)
    try:
        result = run(*command.split())
    finally:
        process.communicate("\n")
    assert result.exit_code == 1
    assert re.search(rf"Another process is writing to (./)?{output}\.", result.output)
    assert contents(inputs) == before


@pytest.mark.refused
@pytest.mark.parametrize("output", ["file/out", "file/deep/out", os.devnull + "/out"])
@pytest.mark.parametrize(
    "command",
    [
        "train --model no/model --data no/data --task classify",
        "train --model no/model --data no/data --task classify --dry-run",
        "export no/adapter --energy 1",
        "demo",
    ],
)
def test_an_output_that_would_be_in_a_file_is_refused_before_any_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: str, output: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("file").write_text("mine")
    said = told(*command.split(), "--output", output)
    nearest = os.devnull if output.startswith(os.devnull) else tmp_path / "file"
    assert f"The output {output} cannot be in {nearest}, which is no folder." in said
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_what_a_killed_writer_holds_is_free(inputs: Path) -> None:
    process = hold("after.jsonl")
    process.kill()
    process.communicate()
    assert Path(".after.jsonl.lock").exists()
    result = run("predict", "run", "--data", "./data", "--output", "after.jsonl")
    assert result.exit_code == 0, result.output
    assert [path.name for path in inputs.glob("*after*")] == ["after.jsonl"]


def test_one_process_may_hold_an_output_several_times_over(tmp_path: Path) -> None:
    with only_writer(tmp_path / "made" / "out"):
        with only_writer(tmp_path / "made" / "out"):
            pass
        assert (tmp_path / "made" / ".out.lock").exists()
    assert list((tmp_path / "made").iterdir()) == []


def test_the_lock_is_in_a_folder_that_alone_can_be_written(inputs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Path("volume").mkdir()
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != inputs)
    with only_writer("volume"):
        assert [path.name for path in Path("volume").iterdir()] == [".volume.lock"]
    assert run(*TRAIN.split(), "--output", "volume").exit_code == 0
    assert not list(Path("volume").glob(".*"))


def test_what_is_renamed_when_it_is_whole_needs_the_folder_around_it(
    inputs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mount = inputs / "mount-for-export"
    mount.mkdir()
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != inputs)
    result = run("export", "run", "--output", mount)
    assert result.exit_code == 1
    assert f"{mount} is written through a temporary folder in {inputs}, which is not writable" in result.output
    assert list(mount.iterdir()) == []
    (mount / "mine").write_text("")
    assert "is not empty" in run("export", "run", "--output", mount).output


def test_in_a_mounted_folder_there_may_be_an_export(inputs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Path("mount").mkdir()
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != inputs)
    result = run("export", "run", "--energy", 1, "--no-check", "--output", "mount/small")
    assert result.exit_code == 0, result.output
    assert (Path("mount") / "small" / "adapter_model.safetensors").exists()


def test_told_to_end_an_export_leaves_nothing(inputs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def end(*sources: str) -> None:  # called when the weights have been written
        assert list(inputs.glob(".ended-*/adapter_model.safetensors"))
        signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr("lrlora.adapters.export.load_processor", end)
    result = run("export", "run", "--energy", 1, "--output", "ended")
    assert result.exit_code == 130, result.output
    assert "Nothing was written" in result.output
    assert not list(inputs.glob("*ended*"))
