"""What is looked for in a file of data before its reader gets it, which a hostile one would crash or fill the disk.

`datasets` unpacks what is packed, whatever it is called and however large that becomes. Its reader of JSON calls itself
for every level of brackets, and some ten thousand are too much for the stack: the process dies.
"""

from __future__ import annotations

import mmap
import re
from pathlib import Path

import numpy as np
from datasets.utils.extract import Extractor

from ..files import DEEPEST, nesting

# Between two rows, in valid JSON: nowhere else can a line begin with an object that no comma parts from another.
_NEXT_ROW = re.compile(rb"\}\r?\n\{")
_BLOCK = 2**16  # which stays in the processor's cache
# Of opening brackets one in so many is looked at. Rows of more are rare, and twice as many levels do no harm.
_STRIDE = 2000


def require_harmless(data: Path) -> None:
    """Raise a ValueError if a file of data, or one in a folder, is packed, or is JSON that is nested too deeply.

    It costs a few percent of the time in which `datasets` reads the files.
    """
    for file in (data, *data.rglob("*")):
        if not file.is_file():
            continue
        if kind := Extractor.infer_extractor_format(file):
            raise ValueError(f"{file} is packed ({kind}), and what is in it may have any size. Put it there unpacked.")
        if "json" in file.suffix and file.stat().st_size:
            with file.open("rb") as opened, mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) as text:
                # An array goes through a parser with a bound of its own.
                if text[:1] != b"[":
                    _require_flat(text, file)


def _require_flat(text: mmap.mmap, file: Path) -> None:
    """Raise a ValueError unless the rows have few brackets, or these are not nested deeply.

    Brackets within strings are counted too, and only a row with many is looked at in earnest.
    """
    seen = row = before = 0
    for start in range(0, len(text), _BLOCK):
        block = np.frombuffer(text[start : start + _BLOCK], np.uint8)
        is_bracket = (block | 0x20) == ord("{")  # or "[", which differs in this bit
        first, count = -seen % _STRIDE, int(np.count_nonzero(is_bracket))
        seen += count
        if first >= count:
            continue  # to find places costs more than to count them
        for place in (start + np.flatnonzero(is_bracket)[first::_STRIDE]).tolist():
            if found := _NEXT_ROW.search(text, before, place):
                row = found.end() - 1
            elif place > row:
                found = _NEXT_ROW.search(text, place)
                end = found.start() + 1 if found else len(text)
                if (depth := nesting(text[row:end])) > DEEPEST:
                    raise ValueError(
                        f"{file} nests brackets {depth} levels deep in what begins at byte {row}, and {DEEPEST} are "
                        "read. Remove that row."
                    )
                row = end
            before = place
