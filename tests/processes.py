"""New processes that need not import torch: forked from one that has imported it, and has done nothing else."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Sequence
from multiprocessing.reduction import DupFd
from pathlib import Path
from typing import Any, TextIO

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(
    [
        "lrlora.cli",
        "lrlora_lab.cli",
        "lrlora.train.run",
        "lrlora.train.inference",
        "lrlora.train.compression",
        "lrlora_lab.worker",
        "lrlora_lab.report",
        "lrlora.views.page",
    ]
)
LRLORA = "from lrlora.cli import app; app()"
LAB = "from lrlora_lab.cli import app; app()"


class _End:
    """An end of a pipe, which pickling gives to another process."""

    def __init__(self, fd: int) -> None:
        self.fd = fd

    def __reduce__(self) -> Any:
        return _end_of, (DupFd(self.fd),)


def _end_of(given: Any) -> _End:
    return _End(given.detach())


def _run(
    code: str,
    arguments: Sequence[str],
    folder: str,
    environment: dict[str, str],
    source: _End,
    target: _End,
    errors: _End | None,
) -> None:
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    os.dup2(source.fd, 0)
    os.dup2(target.fd, 1)
    os.dup2((errors or target).fd, 2)
    for end in filter(None, (source, target, errors)):
        os.close(end.fd)
    sys.stdin, sys.stdout, sys.stderr = os.fdopen(0), os.fdopen(1, "w", 1), os.fdopen(2, "w", 1)
    sys.argv, sys.path[0:0] = ["-c", *arguments], [""]
    # As in a process that a shell starts in the foreground, wherever pytest was started.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    exec(compile(code, "<string>", "exec"), {"__name__": "__main__"})


class Process:
    """`python -c CODE ARGUMENTS`, with what tests use of `subprocess.Popen`.

    Args:
        code, *arguments: of Python.
        cwd, env: current folder and environment; None: those of this process.
        stderr: a file; None: where stdout goes.

    """

    def __init__(
        self,
        code: str,
        *arguments: object,
        cwd: Path | str | None = None,
        env: dict[str, str] | None = None,
        stderr: TextIO | None = None,
    ) -> None:
        source, into = os.pipe()
        out_of, target = os.pipe()
        given = (code, [str(each) for each in arguments], str(cwd or Path.cwd()), dict(env or os.environ))
        errors = _End(stderr.fileno()) if stderr else None
        self._process = _CONTEXT.Process(target=_run, args=(*given, _End(source), _End(target), errors))
        self._process.start()
        os.close(source)
        os.close(target)
        self.stdin: TextIO = os.fdopen(into, "w")
        self.stdout: TextIO = os.fdopen(out_of)

    @property
    def pid(self) -> int:
        pid = self._process.pid
        assert pid is not None
        return pid

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    def poll(self) -> int | None:
        return self._process.exitcode

    def kill(self) -> None:
        self._process.kill()

    def send_signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def communicate(self, said: str = "", timeout: float | None = None) -> str:
        """Say something, and wait for the end; returns all it printed.

        Raises:
            subprocess.TimeoutExpired: it goes on; call again to wait longer.

        """
        if not self.stdin.closed:
            try:
                self.stdin.write(said)
                self.stdin.close()
            except BrokenPipeError:
                pass
            self._read: list[str] = []
            self._reader = threading.Thread(target=lambda: self._read.append(self.stdout.read()), daemon=True)
            self._reader.start()
        self._reader.join(timeout)
        if self._reader.is_alive():
            raise subprocess.TimeoutExpired(self._process.name, timeout or 0)
        self._process.join()
        self.stdout.close()
        return self._read[0]


def run(code: str, *arguments: object, cwd: Path | str | None = None, env: dict[str, str] | None = None) -> str:
    """All that a process printed, which must end well."""
    process = Process(code, *arguments, cwd=cwd, env=env)
    said = process.communicate()
    assert process.returncode == 0, said
    return said
