"""Checks of data files before loading, against crashes and full disks caused by malicious files.

`datasets` extracts archives, whatever their names and sizes. Its JSON reader recurses at every level of brackets, and
some ten thousand levels overflow the stack and kill the process.
"""

from __future__ import annotations

import mmap
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from datasets.utils.extract import Extractor

from ..files import DEEPEST, nesting, read_text

# Boundary of two rows: in valid JSON, only a new row starts a line with an object that no comma precedes.
_NEXT_ROW = re.compile(rb"\}\r?\n\{")
_BLOCK = 2**16  # fits in the processor's cache
# Sampling stride of opening brackets. Rows with more are rare, and twice as many levels are harmless.
_STRIDE = 2000


def require_harmless(data: Path) -> None:
    """Raise ValueError if data contains an archive or deeply nested JSON, or names data elsewhere.

    Adds a few percent to the loading time of `datasets`.
    """
    if (card := data / "README.md").is_file():
        _require_local(card)
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


def _require_local(card: Path) -> None:
    """Raise ValueError if a folder's card names data outside of the folder, which `datasets` would read or fetch."""
    import yaml

    text = read_text(card)
    front = re.match(r"---\s*\n(.*?)\n---", text, re.DOTALL)
    if front is None:
        return
    try:
        found = yaml.safe_load(front[1])
    except (yaml.YAMLError, RecursionError) as error:
        raise ValueError(f"{card} has a header that is not YAML: {' '.join(str(error).split())[:200]}") from None
    for value in _texts(found.get("configs") if isinstance(found, dict) else None):
        if "://" in value or "::" in value or Path(value).is_absolute() or ".." in Path(value).parts or ":\\" in value:
            raise ValueError(f"{card} names data outside of its folder, {value!r:.200}. Remove it from the header.")


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
