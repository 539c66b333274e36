"""What a file brings along is not run: no pickle is loaded, and no code of a model's or of data's own."""

from __future__ import annotations

import json
import pickle
import re
import signal
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from lrlora.cli import app
from lrlora.train.run import Interrupted, train
from lrlora.train.settings import TrainConfig

from .train.small import reviews, save_encoder

CODE = "open('it-ran', 'w').close()\n"


class Evil:
    """Writes a file when it is unpickled."""

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return exec, (CODE,)


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> TrainConfig:
    """Of a run in the current folder."""
    monkeypatch.chdir(tmp_path)
    save_encoder(tmp_path / "base")
    Path("data").mkdir()
    reviews(32).rename(columns={"review": "text", "verdict": "label"}).to_csv("data/train.csv", index=False)
    training = {"max_steps": 3, "eval_steps": 1, "save_steps": 1, "per_device_train_batch_size": 4}
    return TrainConfig(
        "./base", "./data", "classify", method="lr-lora", output="run", adapter={"r": 2}, training=training
    )


TRAIN = "train --model ./base --data ./data --task classify --steps 1 --output out"


def require_refused(command: str, *words: str) -> None:
    result = CliRunner().invoke(app, command.split(), env={"COLUMNS": "300"})
    assert result.exit_code == 1, result.output
    assert len(re.findall("(?m)^Error: ", result.output)) == 1
    for word in words:
        assert word in result.output
    assert not Path("it-ran").exists()


def test_the_code_would_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    pickle.loads(pickle.dumps(Evil()))
    assert Path("it-ran").exists()


def test_pickled_adapters_and_models(config: TrainConfig) -> None:
    train(config)
    Path("run/adapter_model.safetensors").unlink()
    torch.save({"weight": Evil()}, "run/adapter_model.bin")
    for command in ("ranks run", "export run --energy 1 --output out", "evaluate run --data ./data"):
        require_refused(command, "run")
    Path("base/model.safetensors").unlink()
    torch.save({"weight": Evil()}, "base/pytorch_model.bin")
    require_refused(TRAIN, "base")


@pytest.mark.parametrize("file", ["optimizer.pt", "scheduler.pt", "rng_state.pth"])
def test_pickles_in_a_checkpoint(config: TrainConfig, file: str) -> None:
    with pytest.raises(Interrupted):
        train(config, announce=lambda line: signal.raise_signal(signal.SIGINT) if line.startswith("Step 1:") else None)
    torch.save(Evil(), f"run/checkpoint-2/{file}")
    require_refused("train --resume run", "checkpoint-2")


def test_code_beside_a_model_or_data(config: TrainConfig) -> None:
    train(config)
    content = json.loads(Path("base/config.json").read_text()) | {"model_type": "evil"}
    content["auto_map"] = {"AutoConfig": "evil.Config", "AutoModelForSequenceClassification": "evil.Model"}
    Path("data/data.py").write_text(CODE)
    require_refused(TRAIN, "data")
    Path("data/data.py").unlink()
    Path("base/config.json").write_text(json.dumps(content))
    Path("base/evil.py").write_text(CODE)
    require_refused(TRAIN, "requires custom code, which is not run")
    result = CliRunner().invoke(app, ["ranks", "run", "--base", "base"])  # reads its tensors alone
    assert result.exit_code == 0, result.output
    assert not Path("it-ran").exists()
    require_refused("export run --energy 1 --output out", "custom code")
