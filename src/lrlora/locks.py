"""One writer at a time: a lock on what is written over time, and what writers left of it that were killed."""

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
    """Hold a file or folder for this process until the end of the block, and clear away what killed writers left.

    It may be held several times over by one process. Of processes that train together, the first holds it for all.

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
        raise BlockingIOError(
            f"Another process{_holder(path)} is writing to {output}. Wait until it has ended, stop it, or give another "
            "output. Nothing was touched."
        ) from None
    is_outermost = lock.lock_counter == 1
    try:
        if is_outermost:
            _sign(path)
            remove_left(target.parent, rf"{re.escape(target.name)}\.\d+|\.{re.escape(target.name)}(-\w+)?")
        yield
    finally:
        if is_outermost:
            # Before it is released: who has opened the file meanwhile finds that it has no name any more, and that is
            # no lock to filelock. Windows lets no one remove an open file, and filelock does it there.
            with suppress(OSError):
                path.unlink()
        lock.release()
        for folder in made:
            with suppress(OSError):  # there is something in it
                folder.rmdir()


def remove_left(folder: Path, stem: str = ".*") -> None:
    """Remove files and folders in `folder` that end in .partial, and whose stem is as this pattern says."""
    for path in folder.iterdir():
        if re.fullmatch(rf"({stem})\.partial", path.name):
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink()


def lock_of(target: Path) -> Path:
    """The file to lock: beside the output, which may be replaced as a whole, or have to be empty.

    There, every process that can write the output finds it, on whatever machine. Where only the output can be
    written, as a volume that is mounted into a container, it is in there.
    """
    folder = target if target.is_dir() and not os.access(target.parent, os.W_OK) else target.parent
    return folder / f".{target.name}.lock"


def _sign(path: Path) -> None:
    """Write into a lock who holds it, unless filelock has, as it does where the file system has no locks."""
    mine = [str(os.getpid()), platform.node()]
    with suppress(OSError):  # on Windows, no one reads or writes what is locked
        if path.read_text(encoding="utf-8").split()[:2] != mine:
            path.write_text("\n".join(mine), encoding="utf-8")


def _holder(path: Path) -> str:
    try:
        process, machine = path.read_text(encoding="utf-8").split()[:2]
    except (OSError, ValueError):
        return ""
    return f" ({process} on {machine})"
