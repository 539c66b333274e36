"""Compile native libraries on the user's machine and cache them for that user only.

Loading a library executes it. A library is therefore loaded only from a folder and file that are owned by this user and
not writable by others, like ssh keys, and only if its content matches its hash: a truncated file would crash the
process (SIGBUS). Invalid files in the folder are recompiled.
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
# Much longer than any compilation, because machines that share a folder may disagree on the time.
_SCRATCH_SECONDS = 3600
_SCRATCH = "compiling-"


def load_library(source: Path, command: Sequence[str], functions: Sequence[str]) -> ctypes.CDLL:
    """Load a compiled library from the cache, or compile it now.

    Args:
        source: source file.
        command: compiler and options, without source and output.
        functions: functions that the library must export.

    Raises:
        OSError: compiling, loading or storing fails, or the cache folder is not this user's alone.
        RuntimeError: the home folder cannot be determined.

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
            compiled.chmod(0o700)  # the compiler applies the umask
            library = _open(compiled, functions)  # before storing, so that only working libraries are kept
            flush(compiled)
            compiled.replace(folder / _name(recipe, compiled))
    return library


def _name(recipe: str, library: Path) -> str:
    """File name of a cached library: hashes of the recipe and of the content."""
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
    """Folder of this user's libraries, created if missing.

    Created with mode 0700, whatever the umask; the cache folder around it may be shared or group-writable (umask 002)
    and is left unchanged. A folder that others can write to is refused, not repaired, so that the user notices.
    """
    if os.name != "posix":  # Windows uses access control lists, which Python does not read
        folder = cache_folder() / "kernels"
        folder.mkdir(parents=True, exist_ok=True)
        yield folder
        return
    folder = cache_folder() / f"kernels-{os.geteuid()}"
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    opened = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    # Anyone who can write to the parent can swap the folder after the check. On Linux, /proc leads to the opened folder
    # whatever its name; through the pid and not "self", which would be the compiler in its own process.
    same = Path("/proc/self/fd").resolve() / str(opened)
    try:
        _require_own(folder, os.fstat(opened))
        yield same if os.path.isdir(same) else folder
    except OSError as error:
        raise OSError(str(error).replace(str(same), str(folder))) from error
    finally:
        os.close(opened)


def _require_own(path: Path, status: os.stat_result) -> None:
    """Raise PermissionError unless a path is owned by this user and not writable by others."""
    if os.name != "posix":
        return
    if status.st_uid != os.geteuid():
        raise PermissionError(
            f"{path} belongs to another user (uid {status.st_uid}), whose code would run as yours. Set LRLORA_CACHE to "
            "another folder."
        )
    if status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise PermissionError(
            f"{path} is writable by other users (mode {stat.S_IMODE(status.st_mode):04o}), whose code would run as "
            f"yours. Run chmod go-w {path}, or set LRLORA_CACHE to another folder."
        )


def _remove_leftovers(folder: Path) -> None:
    """Remove scratch folders of compilations that were killed.

    Decided by age: process ids say nothing if containers or machines share the folder.
    """
    for scratch in folder.glob(f"{_SCRATCH}*"):
        with suppress(FileNotFoundError):  # already removed by another process
            if time.time() - scratch.stat().st_mtime > _SCRATCH_SECONDS:
                shutil.rmtree(scratch, ignore_errors=True)


def _run(command: list[str]) -> None:
    """Run the compiler with a timeout."""
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
            # Kill the whole session: the compiler starts subprocesses, and Ctrl-C does not reach them.
            if compiler.returncode is None:
                os.killpg(compiler.pid, signal.SIGKILL) if os.name == "posix" else compiler.kill()
    if compiler.returncode != 0:
        raise ChildProcessError(f"{command[0]} failed ({compiler.returncode}). {output}")
