"""Parsing of adapter sizes."""

from __future__ import annotations

import re
from typing import NamedTuple


class Budget(NamedTuple):
    """Size limit of an export, a number of `unit`: parameters, bytes, or LoRA ranks on the same modules."""

    number: float
    unit: str

    def parameters(self, per_rank: int, itemsize: int) -> int:
        """Number of parameters: `per_rank` for one rank of all modules, of `itemsize` bytes each."""
        return int(self.number * {"ranks": per_rank, "bytes": 1 / itemsize, "parameters": 1}[self.unit])


_SIZES = {"kB": 10**3, "KiB": 2**10, "MB": 10**6, "GB": 10**9, "MiB": 2**20, "GiB": 2**30}


def parse_size(text: str, option: str) -> Budget:
    """Parse 250000, 250k, 1.5M, 8MiB or r4.

    Raises:
        ValueError: other formats.

    """
    match = re.fullmatch(r"(r?)(\d+(?:\.\d+)?)([kM]|kB|KiB|[MG]i?B)?", text) if isinstance(text, str) else None
    if match is None or (match[1] and (match[3] or "." in match[2])) or float(match[2]) == 0:
        raise ValueError(f"{option} must be a size such as 250000, 250k, 1.5M, 8MiB or r4, got {text!r}.")
    number, unit = float(match[2]), match[3]
    if match[1]:
        return Budget(number, "ranks")
    if unit in _SIZES:
        return Budget(number * _SIZES[unit], "bytes")
    return Budget(number * {None: 1, "k": 1e3, "M": 1e6}[unit], "parameters")
