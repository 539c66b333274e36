"""The documentation: the site builds without a warning, its commands exist, its code runs, its notebook too."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import nbformat
import pytest
import torch
import typer
from nbclient import NotebookClient
from peft import LoraConfig, get_peft_model

from lrlora import LrLoraConfig
from lrlora.cli import app

from .conftest import TinyModel

ROOT = Path(__file__).parents[1]
PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").glob("*.md")])


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)


@pytest.mark.integration
def test_the_site_builds_without_a_warning(tmp_path: Path) -> None:
    result = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
    )
    assert result.returncode == 0, result.stderr
    start = (tmp_path / "index.html").read_text(encoding="utf-8")
    assert "LoRA gives every layer the same rank; lrlora learns it" in start
    for page in tmp_path.rglob("*.html"):
        for target in re.findall(r'href="([^"#:]+?)(?:#[^"]*)?"', page.read_text(encoding="utf-8")):
            assert page.name == "404.html" or (page.parent / target).exists(), f"{page}: {target}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_commands_are_those_of_the_command_line(page: Path) -> None:
    command: Any = typer.main.get_command(app)
    for block in blocks(page, "sh"):
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            if words[:1] == ["lrlora"] and len(words) > 1:
                # Parses the options without running anything.
                command.commands[words[1]].make_context(words[1], words[2:])


def test_recipes_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    inputs = torch.randn(4, 16)
    names: dict[str, Any] = {
        "mixture": TinyModel("mixtral").build(),
        "vision_transformer": TinyModel("vit").build(),
        "images": torch.randn(2, 3, 32, 32),
        "network": TinyModel("mlp").build(),
        "regression": TinyModel("mlp").build(),
        "inputs": inputs,
        "batches": [(inputs, torch.randn(4, 8))] * 3,
    }
    for recipe in blocks(ROOT / "docs" / "cookbook.md", "python"):
        exec(recipe, names)
    said = capsys.readouterr().out
    assert re.search(r"experts\.gate_up_proj\.3 8 0", said)
    assert float(said.splitlines()[-1]) >= 1


@pytest.mark.real
@pytest.mark.integration
def test_the_notebook_runs(tmp_path: Path) -> None:
    notebook = nbformat.read(ROOT / "docs" / "quickstart.ipynb", as_version=4)
    NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(tmp_path)}}).execute()
    assert (tmp_path / "quickstart" / "plain-lora" / "adapter_config.json").exists()
    assert (tmp_path / "quickstart" / "report.html").stat().st_size > 1e6


def test_the_page_on_reports_runs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    tiny = TinyModel("llama")
    for name, config in (("lr-lora", LrLoraConfig(r=2, **tiny.targets)), ("lora", LoraConfig(r=2, **tiny.targets))):
        model = get_peft_model(tiny.build(), config)
        tiny.train(model, 2)
        model.save_pretrained(f"lrlora-demo/{name}")
    (example,) = blocks(ROOT / "docs" / "report.md", "python")
    exec(example, {})
    assert "lrlora-demo: lr-lora" in (tmp_path / "demo.html").read_text(encoding="utf-8")
    assert (tmp_path / "ranks.svg").stat().st_size > 1e4


def test_messages_that_are_explained_are_those_that_are_given() -> None:
    code = "\n".join(path.read_text(encoding="utf-8") for path in (ROOT / "src").rglob("*.py"))
    code = re.sub(r'"\s*\n\s*f?"', "", code)  # one literal over several lines
    text = (ROOT / "docs" / "faq.md").read_text(encoding="utf-8")
    of_others = ("KeyError", "size mismatch", "The version of PEFT")  # of PEFT, torch and transformers
    messages = [each for each in re.findall(r"^### `(.+?)`", text, re.MULTILINE) if not each.startswith(of_others)]
    assert len(messages) > 5
    for message in messages:
        for part in message.split("…"):
            assert part.strip() in code, message
