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
        (("--help",), "Usage"),
        (("export", "--help"), "energy"),
        (("train", "--task", "clasify", "--model", "m", "--data", "d"), "Did you mean classify?"),
        (("train", "--task", "classify", "--model", "m", "--data", "none.csv"), "There is no file or folder none.csv"),
        (("train", "--resume", "nowhere"), "holds no run"),
        (("predict", "nowhere", "--data", "d", "--output", "out.jsonl"), "holds no run"),
        (("ranks", "./nowhere"), "there is no such folder"),
        (("merge", "adapter", "--output", str(Path(__file__).parent)), "is not empty"),
        (("export", "adapter", "--output", "lora", "--energy", "2"), "energy must be a share"),
        (("compare", "offline-nlp"), "Did you mean offline-nlu?"),
    ],
)
def test_what_needs_no_model_does_not_wait_for_torch(arguments: tuple[str, ...], said: str) -> None:
    result = lrlora(*arguments, then="assert not {'torch', 'peft', 'transformers', 'datasets'} & set(sys.modules)")
    assert "AssertionError" not in result.stderr, result.stderr
    assert said in " ".join((result.stdout + result.stderr).split())


def test_names_are_those_of_what_they_name() -> None:
    from lrlora.train.methods import METHODS
    from lrlora.train.names import ABLATION_NAMES, METHOD_NAMES, PRESET_NAMES, ROLES, SUITE_NAMES, TASKS_WITHOUT_HEAD
    from lrlora.train.tasks import KINDS
    from lrlora_lab.methods import ABLATIONS
    from lrlora_lab.suites import PRESETS, SUITES

    assert tuple(METHODS) == METHOD_NAMES
    assert set(SUITES) == set(SUITE_NAMES)
    assert (set(PRESETS), set(ABLATIONS)) == (set(PRESET_NAMES), set(ABLATION_NAMES))
    assert tuple(KINDS) == tuple(ROLES)
    assert tuple(name for name, kind in KINDS.items() if not kind.has_head) == TASKS_WITHOUT_HEAD


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
