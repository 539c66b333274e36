"""Names from a stranger's file are shown as text: a terminal does not obey them, and Markdown makes nothing of them."""

from __future__ import annotations

import io
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
import yaml
from peft import LoraConfig
from rich.console import Console
from safetensors.torch import save_file

from lrlora.adapters import factorize, read_updates, save_as_lora
from lrlora.checks import in_markdown, printable
from lrlora.ranks import rank_report
from lrlora.views.model_card import ranks_card
from lrlora.views.runs import Run
from lrlora.views.tables import factors_table, rank_table, shortened
from lrlora_lab.tables import failure_line, markdown

NASTY = "a\x1b[31mred \u202eabc\nError: |[b](c)|`<i>`"


def test_what_a_terminal_obeys_is_shown() -> None:
    assert printable("a\x1b[31m\x9b1m\r\n\u202e\u2066\u2028\x7f\ud800\tb é 漢 👩‍🚀") == (
        r"a\x1b[31m\x9b1m\r\n\u202e\u2066\u2028\x7f\ud800" + "\tb é 漢 👩‍🚀"
    )


@pytest.fixture
def nasty(tmp_path: Path) -> Path:
    """An adapter of modules with such names."""
    config = LoraConfig(r=2, target_modules=["x"], base_model_name_or_path=NASTY)
    config.save_pretrained(str(tmp_path))
    names = ("a\x1b[31mred", "b[/bold]", "c\u202eabc")
    tensors = {f"base_model.model.{n}.lora_{part}.weight": torch.eye(2) for n in names for part in "AB"}
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    return tmp_path


@pytest.mark.parametrize(
    "table",
    [
        lambda updates, title: rank_table(rank_report(updates), title),
        lambda updates, title: factors_table(factorize(updates, energy=1.0), title),
    ],
)
def test_tables_show_names_as_text(nasty: Path, table: Callable[..., Any]) -> None:
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(table(read_updates(nasty), "Of x\x1b[32m"))
    text = console.export_text()
    for shown in (r"Of x\x1b[32m", r"a\x1b[31mred", "b[/bold]", r"c\u202eabc"):
        assert shown in text
    assert not set("\x1b\u202e") & set(text)


def test_the_card_of_an_export_is_valid_with_any_name(nasty: Path) -> None:
    save_as_lora(factorize(read_updates(nasty), energy=1.0), nasty, nasty / "out")
    _, header, _ = (nasty / "out" / "README.md").read_text().split("---\n", 2)
    tags = ["lora", "lrlora", "transformers", f"base_model:adapter:{NASTY}"]
    assert yaml.safe_load(header) == {"base_model": NASTY, "library_name": "peft", "tags": tags}


def test_the_card_of_a_run_shows_names_as_text(nasty: Path) -> None:
    report = rank_report(read_updates(nasty))
    card = "\n\n".join(ranks_card(Run("x\n# Verified", report, {"method": "LoRA", "data": NASTY})))
    assert r"- data: a\\x1b\[31mred \\u202eabc\\nError: \|\[b\](c)\|\`\<i>\`" in card.splitlines()
    assert "# Verified" not in card.splitlines()


def test_a_report_shows_names_as_text() -> None:
    assert markdown(pd.DataFrame({"task": ["a|b\n[c](d)"], "of_1": [0.5]})) == (
        "| task | of_1 |\n| --- | --- |\n" + r"| a\|b\\n\[c\](d) | 0.5 |"
    )
    failed = {"task": "<b>", "method": "lora", "learning_rate": 0.1, "failure": "one\ntwo"}
    assert failure_line(failed) == r"- \<b>, lora, 0.1: one\\ntwo"
    assert in_markdown("offline_nlu __init__") == r"offline_nlu \_\_init\_\_"


def test_what_just_fits_is_not_shortened() -> None:
    assert [shortened("layer.bb.cc", room) for room in (11, 10, 7, 6, 1)] == [
        "layer.bb.cc",
        "… bb.cc",
        "… bb.cc",
        "… cc",
        "… cc",
    ]


def test_long_names_leave_the_numbers_whole(nasty: Path) -> None:
    part = factorize(read_updates(nasty), energy=1.0)[0]
    factors = [replace(part, module=f"{'path.' * 9}{i}") for i in range(3)]
    console = Console(width=70, record=True, file=io.StringIO())
    console.print(factors_table(factors, "title", width=70))
    assert re.search(r"… (path\.)+2 +2 +2\.0 +2 +100\.00 +8 *$", console.export_text(), re.MULTILINE)
