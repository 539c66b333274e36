"""Atomic writes, and readers with clear errors for damaged files."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import is_dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, cast

from safetensors import SafetensorError

from .checks import require_type
from .locks import lock_of, only_writer, require_parents


@contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Context with a temporary path, renamed at the end: readers never see a partial file."""
    target = Path(path)
    partial = target.with_name(f"{target.name}.{os.getpid()}.partial")
    try:
        with writing(target):
            yield partial
        flush(partial)
        partial.replace(target)
    finally:
        partial.unlink(missing_ok=True)


_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_NOT_WRITTEN = re.compile("while serializing|PytorchStreamWriter|unexpected pos|iostream error")


@contextmanager
def writing(target: Path) -> Iterator[None]:
    """Name the target in write errors: disk-full errors lack it, and safetensors and torch raise their own."""
    try:
        yield
    except (SafetensorError, RuntimeError, OSError) as error:
        is_full = isinstance(error, OSError) and error.errno in _FULL and error.filename is None
        if not is_full and _NOT_WRITTEN.search(str(error)) is None:
            raise  # unrelated error
        raise OSError(f"{target} could not be written. Is the disk full? ({error})") from error


def flush(path: Path) -> None:
    """Sync a file's content to disk, before a rename can be persisted without it."""
    with path.open("r+b") as file:
        os.fsync(file.fileno())


def write_whole(path: str | os.PathLike[str], text: str) -> None:
    """Write a text file atomically."""
    with replacing(path) as partial:
        partial.write_text(text, encoding="utf-8")


def write_json(path: str | os.PathLike[str], content: Any) -> None:
    """Write JSON atomically.

    Raises:
        ValueError: it contains NaN or infinite numbers.

    """
    try:
        text = json.dumps(content, indent=1, allow_nan=False)
    except ValueError:
        raise ValueError(
            f"{path} was not written: its content has NaN or infinite values, which JSON does not support."
        ) from None
    write_whole(path, text)


@contextmanager
def replacing_files(folder: Path) -> Iterator[Path]:
    """Context with a temporary folder, whose files are moved to `folder` at the end, each atomically."""
    partial = folder / f"files.{os.getpid()}.partial"
    partial.mkdir(parents=True)
    try:
        with writing(folder):
            yield partial
        for file in sorted(path for path in partial.rglob("*") if path.is_file()):
            target = folder / file.relative_to(partial)
            target.parent.mkdir(parents=True, exist_ok=True)
            flush(file)
            file.replace(target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def free_folder(output: str | os.PathLike[str]) -> Path:
    """Check that an output folder can be written.

    Raises:
        FileExistsError: it is a nonempty folder or a file.
        PermissionError: its parent is not writable.

    """
    path = Path(output).resolve()
    if path.exists() and (not path.is_dir() or any(inside != lock_of(path) for inside in path.iterdir())):
        kind = "exists and is not empty" if path.is_dir() else "exists and is a file"
        raise FileExistsError(f"The output folder {path} {kind}. Choose another output, or remove it.")
    if path.parent.exists() and not os.access(path.parent, os.W_OK):
        raise PermissionError(
            f"The output folder {path} is written through a temporary folder in {path.parent}, which is not writable. "
            "Choose an output in a writable folder."
        )
    return path


def require_folder(output: str | os.PathLike[str]) -> None:
    """Raise FileExistsError if an output folder is a file, or NotADirectoryError if it would be in one."""
    require_parents(output)
    if Path(output).exists() and not Path(output).is_dir():
        raise FileExistsError(f"The output folder {output} exists and is a file. Choose another --output.")


def require_writable(file: Path, *, overwrite: bool | None = None, **inputs: str | os.PathLike[str] | None) -> None:
    """Check that a file can be written.

    Args:
        file: file to write.
        overwrite: whether it may be replaced; None: the command has no such option.
        **inputs: see `require_no_input`.

    Raises:
        FileExistsError: it exists.
        FileNotFoundError: its folder does not.
        IsADirectoryError: it is a folder.
        ValueError: it is an input.

    """
    if not file.absolute().parent.is_dir():
        raise FileNotFoundError(f"The folder {file.parent} for {file.name} does not exist.")
    if file.is_dir():
        raise IsADirectoryError(f"{file} is a folder. Choose a file.")
    if file.exists() and not overwrite:
        remedy = "remove it" if overwrite is None else "pass --overwrite"
        raise FileExistsError(f"The file {file} already exists. Choose another name, or {remedy}.")
    require_no_input(file, **inputs)


def require_no_input(output: str | os.PathLike[str], **inputs: str | os.PathLike[str] | None) -> None:
    """Check that replacing an output would not delete an input, or a file of one.

    Args:
        output: file, or folder, which is replaced as a whole.
        **inputs: files, folders or other names, by what they are.

    Raises:
        ValueError: an input would be deleted.

    """
    target = Path(output).resolve()
    for name, source in inputs.items():
        if source is None or not Path(source).exists():
            continue
        path = Path(source).absolute()
        places = (path.resolve(), path.parent.resolve() / path.name)  # a link, and what it leads to
        is_part = target.is_file() and target.is_relative_to(places[0])
        if is_part or any(place.is_relative_to(target) for place in places):
            raise ValueError(f"--overwrite would delete {name}={source}, or a part of it. Choose another output.")


@contextmanager
def replacing_folder(output: Path) -> Iterator[Path]:
    """Context with a temporary folder next to `output`, renamed to it on success, else removed."""
    with only_writer(output):
        partial = output.with_name(f".{output.name}-{os.getpid()}.partial")
        shutil.rmtree(partial, ignore_errors=True)  # of a killed process with the same number, as in containers
        partial.mkdir()
        try:
            with writing(output):
                yield partial
            for file in partial.rglob("*"):
                if file.is_file():
                    flush(file)
            partial.replace(output)  # replaces an empty folder
        finally:
            shutil.rmtree(partial, ignore_errors=True)


@contextmanager
def readable(path: str | os.PathLike[str], remedy: str, *, until: Callable[[], bool] = lambda: False) -> Iterator[None]:
    """Report which file is damaged, whatever its reader raises, and the remedy.

    Catches every exception, which is done only here: libraries that read user files (PEFT, transformers, safetensors,
    torch, yaml) raise anything on a damaged one, from KeyError to struct.error. The cause stays attached.

    Args:
        path: file or folder.
        remedy: a sentence.
        until: returns True once reading is done, when errors are no longer related to the file.

    """
    try:
        yield
    except ImportError:
        raise
    except Exception as error:
        if until() or (isinstance(error, (ValueError, OSError)) and os.fspath(path) in str(error)):
            raise  # the message already says so
        reason = " ".join(str(error).split())[:300].rstrip(".")
        if isinstance(error, UnpicklingError):
            reason = "its pickle is corrupt, or contains code, which is not loaded"  # torch's says how to run it
        elif not isinstance(error, ValueError):
            reason = f"{type(error).__name__}: {reason}"
        raise ValueError(f"{path} is damaged or has an unexpected format ({reason}). {remedy}") from error


def parse_json(path: Path) -> Any:
    """Parse a JSON file.

    Raises:
        ValueError: it is invalid.

    """
    return json.loads(path.read_text(encoding="utf-8"))


def read_json(path: Path, kind: Any, remedy: str) -> Any:
    """Read a JSON file, as a data class or plain, and validate its type with `require_type`.

    Raises:
        ValueError: it does not match.

    """
    with readable(path, remedy):
        content = parse_json(path)
        if is_dataclass(kind):
            content = cast(Any, kind)(**content)
        require_type(content, kind, "its content")
        return content


def cache_folder() -> Path:
    """Folder for downloads and compiled kernels: `LRLORA_CACHE` if set, else `~/.cache/lrlora`."""
    return Path(os.environ.get("LRLORA_CACHE") or Path.home() / ".cache" / "lrlora")
