"""A run goes on with what it began with, and with nothing else."""

from __future__ import annotations

import re
import shutil
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from lrlora.ranks import RankReport
from lrlora.train.run import Interrupted, train
from lrlora.train.settings import TrainConfig, read_run

from ..cli import run
from .small import reviews, save_decoder, save_encoder

TRAINING = {"max_steps": 4, "eval_steps": 1, "save_steps": 1, "logging_steps": 1, "per_device_train_batch_size": 4}
CONFIG: dict[str, Any] = {"model": "./base", "data": "./data", "rank_every": 1, "adapter": {"r": 2}}
CONFIG |= {"training": {**TRAINING, "learning_rate": 0.05}}


def begin(output: str, **settings: Any) -> None:
    """A run that is interrupted after its second step."""

    def stop(line: str) -> None:
        if line.startswith("Step 2:"):
            signal.raise_signal(signal.SIGINT)

    with pytest.raises(Interrupted):
        train(TrainConfig.from_dict(CONFIG | {"output": output} | settings), announce=stop)


@pytest.fixture(scope="module")
def begun(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with runs that were interrupted, what they are made from, and one that was left alone."""
    folder = tmp_path_factory.mktemp("begun")
    save_encoder(folder / "base")
    save_decoder(folder / "decoder")
    (folder / "data").mkdir()
    for split, seed in (("train", 0), ("validation", 1)):
        table = reviews(32, seed).rename(columns={"review": "text", "verdict": "label"})
        table.to_csv(folder / "data" / f"{split}.csv", index=False)
        table = table.rename(columns={"text": "prompt", "label": "completion"})
        (folder / "chats").mkdir(exist_ok=True)
        table.to_csv(folder / "chats" / f"{split}.csv", index=False)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        train(TrainConfig.from_dict(CONFIG | {"task": "classify", "output": "alone"}), announce=lambda line: None)
        begin("cut", task="classify")
        begin("talk", task="causal-lm", model="./decoder", data="./chats")
    return folder


@pytest.fixture
def here(begun: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of it, which is the current folder."""
    shutil.copytree(begun, tmp_path, dirs_exist_ok=True)
    for state in tmp_path.glob("*/checkpoint-*/trainer_state.json"):  # it names the best of them
        state.write_text(state.read_text().replace(str(begun), str(tmp_path)))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def edit(path: str, old: str, new: str) -> None:
    content = Path(path).read_text(encoding="utf-8")
    assert old in content
    Path(path).write_text(content.replace(old, new, 1), encoding="utf-8")


def flip_a_label() -> None:
    path = Path("data/train.csv")
    header, first, *rest = path.read_text().splitlines()
    text, label = first.split(",")
    path.write_text("\n".join([header, f"{text},{'rotten' if label == 'fresh' else 'fresh'}", *rest, ""]))


def cut_a_row() -> None:
    path = Path("data/train.csv")
    path.write_text("\n".join([*path.read_text().splitlines()[:-1], ""]))


def add_a_row() -> None:
    with Path("data/train.csv").open("a") as file:
        file.write("a splendid film,fresh\n")


CHANGES: dict[str, tuple[Callable[[], None], str]] = {
    "a label": (flip_a_label, "the training data"),
    "a row less": (cut_a_row, "the training data"),
    "a row more": (add_a_row, "the training data"),
    "a text": (lambda: edit("data/train.csv", " film", " plot"), "the training data"),
    "validation": (lambda: edit("data/validation.csv", " film", " plot"), "the validation data"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_run_does_not_go_on_with_something_else(here: Path, name: str) -> None:
    change, said = CHANGES[name]
    change()
    result = run("train", "--resume", "cut")
    assert result.exit_code == 1, result.output
    assert "Error: " in result.output
    assert said in result.output
    others = {words for _, words in CHANGES.values()} - {said}
    assert not [words for words in others if words in result.output]
    assert not Path("cut/metrics.json").exists()


def test_a_run_does_not_go_on_with_other_settings(here: Path) -> None:
    with pytest.raises(ValueError, match=r"seed \(0 before, 1 now\)"):
        train(replace(read_run(Path("cut"))[0], seed=1), resume=True)
    assert not Path("cut/metrics.json").exists()


def test_a_run_that_nothing_was_done_to_goes_on_as_if_it_had_been_left_alone(here: Path) -> None:
    for output in ("cut", "talk"):
        result = run("train", "--resume", output)
        assert result.exit_code == 0, result.output
    for file in ("adapter_model.safetensors", "metrics.json", "rank_history.jsonl"):
        assert (here / "cut" / file).read_bytes() == (here / "alone" / file).read_bytes()
    # The command has measured what the loss asks for, too.
    reports = [RankReport.from_json(here / name / "ranks.json").with_loss_ranks({}) for name in ("cut", "alone")]
    assert reports[0] == reports[1]


def test_a_run_is_not_deleted_where_it_should_go_on(here: Path) -> None:
    before = sorted(path.relative_to(here) for path in Path(here, "cut").rglob("*"))
    result = run("train", "--resume", "cut", "--overwrite")
    assert result.exit_code == 1
    assert re.search(r"--resume .*\bcut, .*--overwrite", result.output)
    with pytest.raises(ValueError, match=r"--resume .*\bcut, .*--overwrite"):
        train(read_run(Path("cut"))[0], resume=True, overwrite=True)
    assert sorted(path.relative_to(here) for path in Path(here, "cut").rglob("*")) == before
    assert run("train", "--resume", "cut", "--dry-run").exit_code == 0
    assert run("train", "--resume", "cut").exit_code == 0
