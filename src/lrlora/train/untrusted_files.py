"""Checks of data files before loading, and a time limit for templates, against crashes caused by malicious files.

`datasets` extracts archives, whatever their names and sizes. Its JSON reader recurses at every level of brackets, and
some ten thousand levels overflow the stack and kill the process.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import re
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset, Image
from datasets.config import REPOCARD_FILENAME, REPOYAML_FILENAME
from datasets.utils.extract import Extractor

from ..files import DEEPEST, nesting, read_json, read_text

# Boundary of two rows: in valid JSON, only a new row starts a line with an object that no comma precedes.
_NEXT_ROW = re.compile(rb"\}\r?\n\{")
_BLOCK = 2**16  # fits in the processor's cache
# Sampling stride of opening brackets. Rows with more are rare, and twice as many levels are harmless.
_STRIDE = 2000


def require_harmless(data: Path) -> None:
    """Raise ValueError if data contains an archive or deeply nested JSON, or names data elsewhere.

    Adds a few percent to the loading time of `datasets`.
    """
    _require_local_card(data)
    for file in (data, *data.rglob("*")):
        if not file.is_file():
            continue
        if kind := Extractor.infer_extractor_format(file):
            raise ValueError(f"{file} is an archive ({kind}), whose content may have any size. Extract it first.")
        if "json" in file.suffix and file.stat().st_size:
            with file.open("rb") as opened, mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) as text:
                # Arrays use a parser with its own limit.
                if text[:1] != b"[":
                    _require_flat(text, file)


def _require_local_card(folder: Path) -> None:
    """Raise ValueError if a folder's metadata name data elsewhere, which `datasets` would read or fetch."""
    import yaml
    from huggingface_hub import DatasetCard

    found: list[tuple[Path, Any]] = []
    card, other = folder / REPOCARD_FILENAME, folder / REPOYAML_FILENAME
    for file in (card, other):
        if not file.is_file():
            continue
        text = read_text(file)
        try:
            # As `datasets` reads them: another reader would find less than it does.
            found.append((file, yaml.safe_load(text) if file == other else DatasetCard.load(file).data.to_dict()))
        except (yaml.YAMLError, RecursionError, TypeError, ValueError) as error:
            raise ValueError(f"{file} has a header that is not YAML: {' '.join(str(error).split())[:200]}") from None
    for file, values in found:
        for value in _texts(values.get("configs") if isinstance(values, dict) else None):
            _require_inside(value, f"{file} names data outside of its folder, {value!r:.200}. Remove it.")


def _require_inside(path: str, said: str) -> None:
    if "://" in path or "::" in path or Path(path).is_absolute() or ".." in Path(path).parts or ":\\" in path:
        raise ValueError(said)


def require_own_files(data: Path) -> None:
    """Raise ValueError if a data set from `save_to_disk` names files outside of its folder."""
    for file in data.rglob("state.json"):
        state = read_json(file, dict[str, Any], "Save the data set again.")
        for name in _texts(state.get("_data_files")):
            _require_inside(name, f"{file} names data outside of its folder, {name!r:.200}. Save the data set again.")


def require_own_images(splits: Mapping[Any, Dataset], data: Path) -> None:
    """Raise ValueError if a cell names an image outside of the data's folder."""
    root = (data if data.is_dir() else data.parent).absolute()
    for part in splits.values():
        for name in (name for name, feature in part.features.items() if isinstance(feature, Image)):
            for cell in part.cast_column(name, Image(decode=False)).select_columns([name]):
                path = (cell[name] or {}).get("path")
                if path and cell[name]["bytes"] is None and root not in Path(os.path.abspath(path)).parents:
                    raise ValueError(f"{data} names an image outside of its folder, {path!r:.200}. Store its bytes.")


def _texts(values: Any) -> Iterator[str]:
    """All texts in nested lists and mappings."""
    if isinstance(values, str):
        yield values
    elif isinstance(values, (list, dict)):
        for value in values.values() if isinstance(values, dict) else values:
            yield from _texts(value)


def _require_flat(text: mmap.mmap, file: Path) -> None:
    """Raise ValueError unless rows have few brackets or shallow nesting.

    Also counts brackets in strings, and checks only rows with many brackets exactly.
    """
    seen = row = before = 0
    for start in range(0, len(text), _BLOCK):
        block = np.frombuffer(text[start : start + _BLOCK], np.uint8)
        is_bracket = (block | 0x20) == ord("{")  # or "[", which differs in this bit
        first, count = -seen % _STRIDE, int(np.count_nonzero(is_bracket))
        seen += count
        if first >= count:
            continue  # locating brackets is slower than counting them
        for place in (start + np.flatnonzero(is_bracket)[first::_STRIDE]).tolist():
            if found := _NEXT_ROW.search(text, before, place):
                row = found.end() - 1
            elif place > row:
                found = _NEXT_ROW.search(text, place)
                end = found.start() + 1 if found else len(text)
                if (depth := nesting(text[row:end])) > DEEPEST:
                    raise ValueError(
                        f"{file} nests brackets {depth} levels deep in the row at byte {row}; the limit is {DEEPEST}. "
                        "Remove that row."
                    )
                row = end
            before = place


_raise_in = ctypes.pythonapi.PyThreadState_SetAsyncExc


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Context that raises TimeoutError in this thread after a time, in Python code of any kind.

    A signal would only reach the main thread, and a thread cannot be stopped from outside in another way.
    """
    thread = ctypes.c_ulong(threading.get_ident())
    timer = threading.Timer(seconds, lambda: _raise_in(thread, ctypes.py_object(TimeoutError)))
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
        _raise_in(thread, None)  # cancels a pending exception
