"""Files that were made to do harm: they end in one clear error that names them, and not in a hang or a crash."""

from __future__ import annotations

import json
import os
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModel

from lrlora.train.run import train
from lrlora.train.settings import TrainConfig

from .cli import SECONDS, call
from .processes import Process
from .train.small import reviews, save_encoder

SIZES = (10_000, 20_000, 40_000)  # which the adapter, a page of its optimizer and all of that are longer than


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a base model, an adapter on it, and a finished run."""
    folder = tmp_path_factory.mktemp("made")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        save_encoder(Path("base"))
        model = get_peft_model(AutoModel.from_pretrained("./base"), LoraConfig(r=2, target_modules=["query", "value"]))
        for key, weight in model.named_parameters():
            if "_B." in key:
                torch.nn.init.normal_(weight)
        model.save_pretrained("lora")
        reviews(32).rename(columns={"review": "text", "verdict": "label"}).to_csv("data.csv", index=False)
        training = {"max_steps": 1, "per_device_train_batch_size": 4}
        train(
            TrainConfig(
                "./base", "data.csv", "classify", method="lr-lora", output="run", adapter={"r": 2}, training=training
            )
        )
    return folder


@pytest.fixture
def here(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of it, which is the current folder."""
    subprocess.run(["cp", "-r", made, tmp_path / "here"], check=True)
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "here"


def require_refused(command: str, *words: str) -> None:
    result = call(command)
    assert isinstance(result.exception, SystemExit), result.exception
    assert result.exit_code == 1
    (error,) = re.findall("(?m)^Error: (.+)", result.output)
    for word in words:
        assert word in error


def change(adapter: str, **fields: Any) -> None:
    path = Path(adapter, "adapter_config.json")
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


# All commands read an adapter by the same way: every field for one, and one for the others.
COMMANDS = (
    "ranks lora --base ./base",
    "export lora --energy 1 --output out",
    "report lora --output out.html",
)


@pytest.mark.parametrize(
    ("command", "field", "value"),
    [
        *((COMMANDS[0], *wrong) for wrong in (("base_model_name_or_path", 3), ("alpha_pattern", {"query": "8"}))),
        *((command, "r", "8") for command in COMMANDS),
    ],
)
def test_fields_of_the_wrong_type(here: Path, command: str, field: str, value: Any) -> None:
    change("lora", **{field: value})
    require_refused(command, "lora", f"{field} in its adapter_config.json", "must be")


@pytest.mark.parametrize(
    ("file", "end"), [("adapter_model.safetensors", 40), ("adapter_model.safetensors", -1), ("adapter_config.json", 40)]
)
def test_training_does_not_start_from_a_damaged_adapter(here: Path, file: str, end: int) -> None:
    path = Path("run", file)
    path.write_bytes(path.read_bytes()[:end])
    require_refused("train --start-from run --output out", "run", "damaged")
    assert not Path("out").exists()


@pytest.mark.parametrize(
    ("command", "value"),
    [(COMMANDS[0], float("nan")), (COMMANDS[0], float("inf")), *((command, 1e300) for command in COMMANDS)],
)
def test_numbers_that_float32_has_not(here: Path, command: str, value: float) -> None:
    change("lora", lora_alpha=value)
    require_refused(command, "lora", "lora_alpha in its adapter_config.json must be finite in float32")
    change("lora", lora_alpha=2, alpha_pattern={"query": value})
    require_refused(command, "lora", "alpha_pattern in its adapter_config.json must be finite in float32")


@pytest.mark.parametrize(
    ("command", "fields"),
    [
        *(("ranks lora", fields) for fields in ({"r": -1}, {"r": 0}, {"rank_pattern": {"value": 10**30}})),
        *((command, {"r": 4}) for command in ("ranks lora", "export lora --energy 1 --output out", "report lora")),
    ],
)
def test_ranks_that_are_not_those_of_the_factors(here: Path, command: str, fields: dict[str, Any]) -> None:
    """α is divided by them: what is read would be too large or too small, and nothing else would tell."""
    change("lora", **fields)
    wrong = next(iter(fields.get("rank_pattern", {"": fields.get("r")}).values()))
    require_refused(command, "lora", "have rank 2", f"adapter_config.json has {wrong}")


def test_a_run_whose_settings_are_none(here: Path) -> None:
    record = json.loads(Path("run/run.json").read_text())
    Path("run/run.json").write_text(json.dumps({**record, "config": {**record["config"], "training": "fast"}}))
    require_refused("report run --output out.html", "run/run.json", "config['training'] must map names to values")


def test_an_adapter_without_the_name_of_its_base_model(here: Path) -> None:
    change("lora", base_model_name_or_path=None, task_type="SEQ_CLS")
    require_refused("predict lora --text film", "lora does not name its base model. Pass it: --base MODEL")


# In a process of its own: here, what pytest writes would have no room either.
FULL_DISK = """
import resource, sys
size = int(sys.argv.pop(1))
resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
from lrlora.cli import app
app()
"""


def require_full_disk_told(command: str, *words: str, size: int = 2000) -> None:
    """No file may get longer than some bytes, which the system says of a full disk too."""
    process = Process(FULL_DISK, size, *command.split(), env={**os.environ, "COLUMNS": "500"})
    said = process.communicate(timeout=10 * SECONDS)
    assert process.returncode == 1, said
    (error,) = re.findall("(?m)^Error: (.+)", said)
    assert all(word in error for word in words), error


def test_a_full_disk_is_said_and_nothing_left(here: Path) -> None:
    before = sorted(os.listdir())
    command = "export lora --energy 1 --no-check --output out"
    require_full_disk_told(command, str(here / "out"), "could not be written")
    assert sorted(os.listdir()) == before


@pytest.mark.parametrize("size", SIZES)
def test_a_full_disk_is_said_of_a_checkpoint(here: Path, size: int) -> None:
    command = "train --model ./base --data data.csv --task classify --method lr-lora --steps 1 --rank 2 --output out"
    require_full_disk_told(command, str(here / "out"), "could not be written. Is the disk full?", size=size)


def test_a_full_disk_is_said_of_a_single_file(here: Path) -> None:
    tensors = load_file("lora/adapter_model.safetensors")
    save_file({key.removeprefix("base_model.model."): value for key, value in tensors.items()}, "one.safetensors")
    require_full_disk_told("export one.safetensors --energy 1 --output two.safetensors", "two.safetensors could not be")
