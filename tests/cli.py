"""The command line, in this process."""

from __future__ import annotations

import resource
import shlex
import signal
from typing import Any

import psutil
import pytest
from typer import Typer
from typer.testing import CliRunner, Result

from lrlora.cli import app as lrlora

SECONDS, MEMORY = 60, 2**30  # that one command may take, whatever the machine


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


def call(command: str, app: Typer = lrlora) -> Result:
    """Run a command with bounds on time, also within a regular expression or Python's open, and on memory."""

    def stop(*_: Any) -> None:
        pytest.fail(f"{command} takes more than {SECONDS} seconds")

    before, limits = signal.signal(signal.SIGALRM, stop), resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (psutil.Process().memory_info().vms + MEMORY, limits[1]))
    signal.alarm(SECONDS)
    try:
        return run(*shlex.split(command), app=app)
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
        resource.setrlimit(resource.RLIMIT_AS, limits)
