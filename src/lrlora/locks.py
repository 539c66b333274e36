"""One writer at a time, and cleanup after killed ones."""

from __future__ import annotations

import glob
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


@contextmanager
def only_writer(output: str | os.PathLike[str]) -> Iterator[None]:
    """Context that locks a file or folder for this process.

    Reentrant within a process. In distributed training, the first process holds the lock for all.

    Raises:
        BlockingIOError: another process holds it.
        NotADirectoryError: see `require_parents`.

    """
    from filelock import FileLock, Timeout  # lazy: the help of the command line, which locks nothing, starts sooner

    require_parents(output)
    if int(os.environ.get("RANK", "0")) > 0:
        yield
        return
    path = lock_of(Path(output).resolve())
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(path, timeout=0, is_singleton=True)
    try:
        lock.acquire()
    except Timeout:
        raise BlockingIOError(
            f"Another process is writing to {output}. Wait for it to finish, stop it, or choose another output. No "
            "files were changed."
        ) from None
    try:
        yield
    finally:
        if lock.lock_counter == 1:
            with suppress(OSError):  # Windows cannot delete open files; filelock deletes it there
                path.unlink()
        lock.release()


def require_parents(output: str | os.PathLike[str]) -> None:
    """Raise NotADirectoryError if what an output would be in is no folder."""
    nearest = next((parent for parent in Path(output).absolute().parents if parent.exists()), None)
    if nearest is not None and not nearest.is_dir():
        raise NotADirectoryError(f"The output {output} cannot be in {nearest}, which is no folder. Choose another.")


def remove_left(folder: Path, start: str = "") -> None:
    """Remove what killed writers left: files and folders that end in .partial, of names with this start."""
    for path in folder.glob(f"{glob.escape(start)}*.partial"):
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
