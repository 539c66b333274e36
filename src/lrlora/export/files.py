"""A folder is there whole, or not at all."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..files import flush


def check_output(output: str | os.PathLike[str]) -> Path:
    """The folder to write, if it is free.

    Raises:
        FileExistsError: it exists and is not empty, or is a file.

    """
    path = Path(output).resolve()
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        kind = "is not empty" if path.is_dir() else "is a file"
        raise FileExistsError(f"The output folder {path} {kind}. Give another one, or remove it.")
    return path


@contextmanager
def written_whole(output: Path) -> Iterator[Path]:
    """A temporary folder beside `output`, which takes its name when all is written, and else is removed."""
    output.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{output.name}-", suffix=".partial", dir=output.parent))
    try:
        yield partial
        partial.chmod(0o777 & ~_umask())  # mkdtemp's is for its user alone
        for file in partial.rglob("*"):
            if file.is_file():
                flush(file)
        partial.replace(output)  # an empty folder may be there
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _umask() -> int:
    umask = os.umask(0)
    os.umask(umask)
    return umask
