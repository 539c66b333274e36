"""Locks for one writer at a time, and cleanup after killed writers."""

from __future__ import annotations

import os
import platform
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout


@contextmanager
def only_writer(output: str | os.PathLike[str]) -> Iterator[None]:
    """Context that locks a file or folder for this process, and removes leftovers of killed writers.

    Reentrant within a process. In distributed training, the first process holds the lock for all.

    Raises:
        BlockingIOError: another process holds it.

    """
    if int(os.environ.get("RANK", "0")) > 0:
        yield
        return
    target = Path(output).resolve()
    path = lock_of(target)
    made = [folder for folder in path.parents if not folder.exists()]
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(path, timeout=0, is_singleton=True)
    try:
        lock.acquire()
    except Timeout:
        if not path.exists():
            raise PermissionError(f"{output} cannot be written: its folder takes no new file.") from None
        raise BlockingIOError(
            f"Another process{_holder(path)} is writing to {output}. Wait for it to finish, stop it, or choose "
            "another output. No files were changed."
        ) from None
    is_outermost = lock.lock_counter == 1
    try:
        if is_outermost:
            _sign(path)
            remove_left(target.parent, rf"{re.escape(target.name)}\.\d+|\.{re.escape(target.name)}(-\w+)?")
        yield
    finally:
        if is_outermost:
            # Delete before releasing: a process that has opened the file sees that it is deleted, which filelock does
            # not accept as a lock. Windows cannot delete open files; filelock deletes it there.
            with suppress(OSError):
                path.unlink()
        lock.release()
        for folder in made:
            with suppress(OSError):  # not empty
                folder.rmdir()


def remove_left(folder: Path, stem: str = ".*") -> None:
    """Remove files and folders in `folder` that end in .partial and whose stem matches the pattern."""
    for path in folder.iterdir():
        if re.fullmatch(rf"({stem})\.partial", path.name):
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink()


def lock_of(target: Path) -> Path:
    """Path of the lock file: next to the output, which may be replaced as a whole or have to be empty.

    There, all processes that can write the output find it, on any machine. If only the output is writable, such as a
    volume mounted into a container, the lock is inside.
    """
    folder = target if target.is_dir() and not os.access(target.parent, os.W_OK) else target.parent
    return folder / f".{target.name}.lock"


def _sign(path: Path) -> None:
    """Write the owner into a lock, unless filelock did (on file systems without locks)."""
    mine = [str(os.getpid()), platform.node()]
    with suppress(OSError):  # Windows: locked files cannot be read or written
        if path.read_text(encoding="utf-8").split()[:2] != mine:
            path.write_text("\n".join(mine), encoding="utf-8")


def writer_of(output: str | os.PathLike[str]) -> str:
    """Process that writes to a file or folder, in words; empty if there is none."""
    path = lock_of(Path(output).resolve())
    if not path.exists():
        return ""
    try:
        with FileLock(path, timeout=0):
            return ""
    except Timeout:
        return f"Another process{_holder(path)} is writing to {output}."


def _holder(path: Path) -> str:
    try:
        process, machine = path.read_text(encoding="utf-8").split()[:2]
    except (OSError, ValueError):
        return ""
    return f" ({process} on {machine})"
