"""What is imported with what: the method without charts and laboratory, a command without what it does not need."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from peft import LoraConfig, PeftConfig, get_peft_model

from lrlora import LrLoraConfig

from .conftest import TinyModel

CHARTS = ("altair", "vl_convert")


def python(script: str, *arguments: str | Path) -> str:
    """What a process of its own prints."""
    command = [sys.executable, "-c", script, *map(str, arguments)]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_help_does_not_wait_for_torch() -> None:
    script = """
import sys
from lrlora_cli import app
from typer.testing import CliRunner
for command in ("--help", "export --help", "train --help", "train --rnak 3"):
    print(CliRunner().invoke(app, command.split()).output)
assert not (there := {"torch", "peft", "transformers", "datasets"} & set(sys.modules)), there
"""
    shown = " ".join(python(script).split())
    for text in ("energy", "Fine-tune your model", "No such option"):
        assert text in shown


@pytest.mark.parametrize(
    "config",
    [
        pytest.param(LoraConfig(target_modules=["query"]), marks=pytest.mark.slow),
        LrLoraConfig(target_modules=["query"]),
    ],
)
def test_no_charts_and_no_model_s_code_are_imported_to_read_an_adapter(config: PeftConfig, tmp_path: Path) -> None:
    get_peft_model(TinyModel("bert").build(), config).save_pretrained(tmp_path)
    absent = (*CHARTS, "pandas", "datasets", "lrlora.train")
    script = f"""
import lrlora, runpy, sys
assert not (there := set({absent!r}) & set(sys.modules)), there
try:
    runpy.run_module("lrlora", run_name="__main__", alter_sys=True)
finally:
    assert not (there := set({CHARTS!r}) & set(sys.modules)), there
    assert not [name for name in sys.modules if name.startswith("transformers.models.bert")]
"""
    assert "attention.self.query" in python(script, "ranks", tmp_path)


def test_fitted_ranks_load_no_adapter_files_and_no_servers() -> None:
    """Besides LR-LoRA, which `import lrlora` registers with PEFT."""
    script = """
import sys
from lrlora import FittedRanksCallback
print(*[name for name in sys.modules if name.split(".")[0] == "lrlora"])
"""
    loaded = {name for name in python(script).split() if name.split(".")[1:2] not in (["tuner"], ["ops"])}
    assert {"lrlora.learned.callback", "lrlora.lora.live"} < loaded
    assert len(loaded) <= 25, sorted(loaded)
    assert not [name for name in loaded if name.startswith(("lrlora.adapters", "lrlora.train", "lrlora.views"))]


def test_an_output_in_use_is_refused_without_torch(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    script = f"""
import sys
from lrlora_cli import app
from typer.testing import CliRunner
options = "--model m --data d --task classify --rank 4 --output {tmp_path}"
print(CliRunner().invoke(app, ["train", *options.split()]).output)
assert not (there := {{"torch", "peft", "transformers", "datasets"}} & set(sys.modules)), there
"""
    assert f"{tmp_path} exists " in " ".join(python(script).split())
