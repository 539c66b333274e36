"""Libraries that are compiled on the user's machine, and kept for that user alone.

To load a library is to run it. So it is loaded only from a folder and a file that belong to this user and that nobody
else may write to, as ssh does with its keys, and only if its content is that which was compiled: a part of one would
end the process (SIGBUS). What is not as it should be in the folder is compiled anew.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from ..files import cache_folder, flush

_COMPILER_SECONDS = 120
# Far longer than a compiler may take: the machines that share a folder may not agree on the time.
_SCRATCH_SECONDS = 3600
_SCRATCH = "compiling-"


def load_library(source: Path, command: Sequence[str], functions: Sequence[str]) -> ctypes.CDLL:
    """Load what a compiler makes of a source: as it was kept, or compiled now.

    Args:
        source: the file to compile.
        command: the compiler and its options, without source and output.
        functions: that the library must have.

    Raises:
        OSError: it cannot be compiled, loaded or kept, or the folder to keep it in is not this user's alone.
        RuntimeError: there is no home folder.

    """
    recipe = _digest(source.read_bytes() + " ".join((sys.platform, platform.machine(), *command)).encode())
    with _own_folder() as folder:
        _remove_leftovers(folder)
        for kept in folder.glob(f"kernels-{recipe}-*.so"):
            try:
                _require_own(kept, kept.lstat())
                if kept.name != _name(recipe, kept):
                    raise OSError(f"{kept} is damaged")
                return _open(kept, functions)
            except OSError:
                kept.unlink(missing_ok=True)
        with tempfile.TemporaryDirectory(prefix=_SCRATCH, dir=folder) as scratch:
            compiled = Path(scratch) / "compiled.so"
            _run([*command, str(source), "-o", str(compiled)])
            compiled.chmod(0o700)  # the compiler leaves it as open as the umask is
            library = _open(compiled, functions)  # before it is kept, so that only what works is
            flush(compiled)
            compiled.replace(folder / _name(recipe, compiled))
    return library


def _name(recipe: str, library: Path) -> str:
    """What a library is kept as: it tells what was to be compiled, and what came of it."""
    return f"kernels-{recipe}-{_digest(library.read_bytes())}.so"


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]


def _open(path: Path, functions: Sequence[str]) -> ctypes.CDLL:
    library = ctypes.CDLL(str(path))
    for function in functions:
        if not hasattr(library, function):
            raise OSError(f"{path} has no function {function}")
    return library


@contextmanager
def _own_folder() -> Iterator[Path]:
    """The folder of this user's libraries, made if need be.

    It is made with mode 0700, whatever the umask: the cache folder around it may be shared, or open to a group of one
    (umask 002), and stays as it is. One that was opened to others since is refused, not closed: the user is to know.
    """
    if os.name != "posix":  # there, lists say who may write, which Python does not read
        folder = cache_folder() / "kernels"
        folder.mkdir(parents=True, exist_ok=True)
        yield folder
        return
    folder = cache_folder() / f"kernels-{os.geteuid()}"
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    opened = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    # Who may write to the folder above can give the name to another folder after the check. Linux has a path to the
    # opened one, whatever its name; not by way of "self", which the compiler is not.
    same = Path("/proc/self/fd").resolve() / str(opened)
    try:
        _require_own(folder, os.fstat(opened))
        yield same if os.path.isdir(same) else folder
    except OSError as error:
        raise OSError(str(error).replace(str(same), str(folder))) from error
    finally:
        os.close(opened)


def _require_own(path: Path, status: os.stat_result) -> None:
    """Raise PermissionError unless a file or folder is this user's, and nobody else may write to it."""
    if os.name != "posix":
        return
    if status.st_uid != os.geteuid():
        raise PermissionError(
            f"{path} belongs to another user (uid {status.st_uid}), whose code would run as yours. Set LRLORA_CACHE to "
            "another folder."
        )
    if status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise PermissionError(
            f"others may write to {path} (mode {stat.S_IMODE(status.st_mode):04o}), and their code would run as yours. "
            f"Close it with chmod go-w {path}, or set LRLORA_CACHE to another folder."
        )


def _remove_leftovers(folder: Path) -> None:
    """Remove what processes left that were killed as they compiled.

    By age: that there is no process of some number says nothing, if containers or machines share the folder.
    """
    for scratch in folder.glob(f"{_SCRATCH}*"):
        with suppress(FileNotFoundError):  # another process was faster
            if time.time() - scratch.stat().st_mtime > _SCRATCH_SECONDS:
                shutil.rmtree(scratch, ignore_errors=True)


def _run(command: list[str]) -> None:
    """Run a compiler, for as long as one may take."""
    with subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,
    ) as compiler:
        try:
            output, _ = compiler.communicate(timeout=_COMPILER_SECONDS)
        except subprocess.TimeoutExpired as error:
            raise TimeoutError(f"{command[0]} did not finish in {_COMPILER_SECONDS} s and was stopped.") from error
        finally:
            # It starts others, which would run on; and Ctrl-C, too, does not reach a session of its own.
            if compiler.returncode is None:
                os.killpg(compiler.pid, signal.SIGKILL) if os.name == "posix" else compiler.kill()
    if compiler.returncode != 0:
        raise ChildProcessError(f"{command[0]} failed ({compiler.returncode}). {output}")
