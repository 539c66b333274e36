"""Command line and rows of an open study: `run FILE …` adds rows to a file, `report FILE` prints its tables."""

from __future__ import annotations

import json
from argparse import ArgumentParser
from pathlib import Path
from typing import Any


def study_parser(name: str) -> tuple[ArgumentParser, ArgumentParser]:
    """Parser of a study, by the name of its module, and that of its command `run`."""
    parser = ArgumentParser(prog=f"python -m lrlora_lab.{name}")
    commands = parser.add_subparsers(dest="command", required=True)
    for command in ("run", "report"):
        commands.add_parser(command).add_argument("file", type=Path)
    return parser, commands.choices["run"]


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Rows of a file, if it exists."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
