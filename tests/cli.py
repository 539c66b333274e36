"""The command line, in this process."""

from __future__ import annotations

from typer import Typer
from typer.testing import CliRunner, Result

from lrlora.cli import app as lrlora


def run(*arguments: object, typed: str | None = None, app: Typer = lrlora) -> Result:
    """Run a command, with `typed` as its standard input."""
    return CliRunner().invoke(app, [str(argument) for argument in arguments], input=typed, env={"COLUMNS": "300"})


def told(*arguments: object) -> str:
    """What a command says that is refused."""
    result = run(*arguments)
    assert result.exit_code == 1, result.output
    assert isinstance(result.exception, SystemExit)
    assert "This error is unexpected" not in result.output
    return " ".join(result.output.split())
