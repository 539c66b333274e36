"""docs/contract.md names what lrlora offers, and nothing else; tests/contract.json names a test of each promise."""

from __future__ import annotations

import ast
import json
import re
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import typer

import lrlora
from lrlora import LrLoraConfig
from lrlora.adapters.servers import SERVERS
from lrlora.cli import app
from lrlora.train.chat import FORMATS
from lrlora.train.methods import METHODS
from lrlora.train.settings import TrainConfig
from lrlora.train.tasks import TASKS
from lrlora_lab.methods import OTHER_METHODS

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "contract.md").read_text(encoding="utf-8")
SECTIONS = [part.partition("\n") for part in PAGE.split("\n## ")[1:]]
PROMISES = [line.removeprefix("- ") for line in PAGE.splitlines() if line.startswith("- ")]
TESTS: dict[str, list[str]] = json.loads((ROOT / "tests" / "contract.json").read_text(encoding="utf-8"))
MOST_WORDS = 2_500
GROUP: Any = typer.main.get_command(app)
COMMANDS = {"lrlora": GROUP} | {f"lrlora {name}": command for name, command in GROUP.commands.items()}


def in_backticks(text: str) -> set[str]:
    return set(re.findall(r"`([^`]+)`", text))


def options_in(text: str) -> set[str]:
    return {word for code in in_backticks(text) for word in code.split() if re.fullmatch(r"--?[a-z][a-z-]*", word)}


def options_of(command: Any) -> set[str]:
    """Options of a command besides --help."""
    return {name for each in command.params for name in (*each.opts, *each.secondary_opts) if name.startswith("-")}


@pytest.mark.parametrize("command", COMMANDS)
def test_the_sections_of_a_command_name_its_options(command: str) -> None:
    about = "\n".join(text for title, _, text in SECTIONS if command in in_backticks(title))
    assert options_of(COMMANDS[command]) - options_in(about) == set(), f"not in docs/contract.md, section of {command}"


def test_what_is_offered_is_named() -> None:
    names = [
        *(f"lrlora.{name}" for name in lrlora.__all__ if not name.startswith("_")),
        *COMMANDS,
        *SERVERS,
        *TASKS,
        *(METHODS.keys() - OTHER_METHODS),
        *(each.name for each in FORMATS),
        *(field.name for field in fields(LrLoraConfig) if field.name in LrLoraConfig.__annotations__),
    ]
    assert set(names) - in_backticks(PAGE) == set(), "not in docs/contract.md"


def test_what_is_offered_is_described_where_it_is_asked_for() -> None:
    for page, names in (("train", TASKS), ("servers", SERVERS)):
        text = (ROOT / "docs" / f"{page}.md").read_text(encoding="utf-8")
        assert [name for name in names if f"`{name}`" not in text and f"`--for {name}`" not in text] == []
    about = {field.name: field.metadata["help"] for field in fields(TrainConfig)}
    assert [name for name in TASKS if name not in about["task"]] == []
    roles = {role for task in TASKS.values() for role in (*task.roles, *task.optional_roles)}
    assert [role for role in roles if not re.search(rf"\b{role}\b", about["columns"])] == []
    (told,) = [option.help for option in COMMANDS["lrlora export"].params if "--for" in option.opts]
    assert [name for name in SERVERS if name not in told] == []


def test_what_is_named_is_offered() -> None:
    known = set().union({"--help", "-h"}, *map(options_of, COMMANDS.values()))
    assert options_in(PAGE) - known == set(), "in docs/contract.md, and no option"
    commands = {" ".join(code.split()[:2]) for code in in_backticks(PAGE) if code.startswith("lrlora ")}
    assert commands - COMMANDS.keys() == set(), "in docs/contract.md, and no command"


def test_each_promise_has_a_test_that_exists() -> None:
    assert list(TESTS) == PROMISES
    found: dict[str, set[str]] = {}
    for name in {name for names in TESTS.values() for name in names}:
        path, *_, test = name.split("::")
        if path not in found:
            tree = ast.walk(ast.parse((ROOT / path).read_text(encoding="utf-8")))
            found[path] = {node.name for node in tree if isinstance(node, ast.FunctionDef) and node.name[:5] == "test_"}
        assert test in found[path], name
    assert [promise for promise, names in TESTS.items() if not names] == []


def test_the_page_is_read_in_ten_minutes() -> None:
    assert sum(len(line.removeprefix("- ").split()) for line in PAGE.splitlines()) < MOST_WORDS


def test_the_api_has_every_public_name() -> None:
    names = re.findall(r"^::: (lrlora\.\w+)$", (ROOT / "docs" / "api.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert {f"lrlora.{name}" for name in lrlora.__all__ if not name.startswith("_")} == set(names)
