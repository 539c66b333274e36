"""Command line of an open study: `run FILE …` adds rows to a file, `report FILE` prints its tables."""

from __future__ import annotations

from argparse import ArgumentParser
from pathlib import Path


def study_parser(name: str, *others: str) -> tuple[ArgumentParser, ArgumentParser]:
    """Parser of a study, and that of its command `run`.

    Args:
        name: module of the study.
        others: commands besides `run` and `report`, with a file as well.

    """
    parser = ArgumentParser(prog=f"python -m lrlora_lab.{name}")
    commands = parser.add_subparsers(dest="command", required=True)
    for command in ("run", "report", *others):
        commands.add_parser(command).add_argument("file", type=Path)
    return parser, commands.choices["run"]
