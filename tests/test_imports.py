"""What is imported with what: the method without charts and laboratory, a command without what it does not need."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from peft import LoraConfig, PeftConfig, get_peft_model

from lrlora import LrLoraConfig

from .conftest import TinyModel

CHARTS = ("altair", "matplotlib", "vl_convert")


def test_no_charts_are_imported() -> None:
    absent = (*CHARTS, "pandas", "datasets", "lrlora.train")
    check = f"import lrlora, sys; assert not (there := set({absent!r}) & set(sys.modules)), there"
    subprocess.run([sys.executable, "-c", check], check=True)


def lrlora(*arguments: str | Path, then: str = "") -> subprocess.CompletedProcess[str]:
    """The command `lrlora` as it is installed, in a process of its own, which runs a line of Python at its end."""
    script = f"import sys; from lrlora_cli import app\ntry: app()\nfinally: {then or 'pass'}"
    command = [sys.executable, "-c", script, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--help",), "compare"),
        (("export", "--help"), "energy"),
        (("train", "--help"), "Fine-tune your model"),
        (("compare", "--help"), "Compare methods"),
        (("train", "--rnak", "3"), "No such option"),
    ],
)
def test_help_does_not_wait_for_torch(arguments: tuple[str, ...], said: str) -> None:
    result = lrlora(*arguments, then="assert not {'torch', 'peft', 'transformers', 'datasets'} & set(sys.modules)")
    assert "AssertionError" not in result.stderr, result.stderr
    assert said in " ".join((result.stdout + result.stderr).split())


@pytest.mark.parametrize(
    "config",
    [
        pytest.param(LoraConfig(target_modules=["query"]), marks=pytest.mark.slow),
        LrLoraConfig(target_modules=["query"]),
    ],
)
def test_the_installed_command_reads_adapters_without_a_model_s_code(config: PeftConfig, tmp_path: Path) -> None:
    get_peft_model(TinyModel("bert").build(), config).save_pretrained(tmp_path)
    no_models = "assert not [name for name in sys.modules if name.startswith('transformers.models.bert')]"
    result = lrlora("ranks", tmp_path, then=no_models)
    assert result.returncode == 0, result.stderr
    assert "attention.self.query" in result.stdout


def test_the_module_has_the_commands_of_the_script() -> None:
    run = subprocess.run([sys.executable, "-m", "lrlora", "--help"], capture_output=True, text=True)
    assert all(command in run.stdout for command in ("train", "export", "compare", "demo")), run.stderr
