"""Size of a LoRA: r4, 200k or 4MiB."""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass

CUT_AT = 0.3  # share of the steps before a cut to a size
KEEP_AT = 0.6  # and to a share of the gain so far
WIDTH = 4  # rank at the start, as a multiple of that of the size
WIDE_RANK = 16  # rank at the start for a size in parameters or bytes, and for a share
_UNITS = {None: ("parameters", 1), "k": ("parameters", 10**3), "M": ("parameters", 10**6)}
_UNITS |= {"kB": ("bytes", 10**3), "MB": ("bytes", 10**6), "GB": ("bytes", 10**9)}
_UNITS |= {"KiB": ("bytes", 2**10), "MiB": ("bytes", 2**20), "GiB": ("bytes", 2**30)}


@dataclass(frozen=True)
class Size:
    """A number of `unit`: parameters, bytes, or LoRA ranks on the same modules; `text` is the size as given."""

    text: str
    number: float
    unit: str

    @classmethod
    def parse(cls, text: str, option: str = "size") -> Size:
        """Parse 250000, 250k, 1.5M, 8MiB or r4.

        Raises:
            ValueError: other formats.

        """
        match = re.fullmatch(r"(r?)(\d+(?:\.\d+)?)([kM]|kB|KiB|[MG]i?B)?", text) if isinstance(text, str) else None
        if match is None or (match[1] and (match[3] or "." in match[2])) or float(match[2]) == 0:
            raise ValueError(f"{option} must be a size such as 250000, 250k, 1.5M, 8MiB or r4, got {text!r}.")
        unit, factor = ("ranks", 1) if match[1] else _UNITS[match[3]]
        return cls(text, float(match[2]) * factor, unit)

    @property
    def wide_rank(self) -> int:
        """Usual rank to start training from."""
        return WIDTH * int(self.number) if self.unit == "ranks" else WIDE_RANK

    def parameters(self, per_rank: int, itemsize: int) -> int:
        """Number of parameters: `per_rank` for one rank of all modules, of `itemsize` bytes each."""
        return int(self.number * {"ranks": per_rank, "bytes": 1 / itemsize, "parameters": 1}[self.unit])

    def below(self, whole: int, costs: Collection[int], itemsize: int) -> int:
        """Number of parameters, for an adapter of `whole` parameters, with `costs` for one rank of each module.

        Raises:
            ValueError: it is not below that of the adapter, or below one rank of its smallest module.

        """
        number = self.parameters(sum(costs), itemsize)
        if number < min(costs):
            hint = f" Did you mean r{self.text}?" if self.unit == "parameters" else ""
            raise ValueError(
                f"size={self.text} is {number:,} parameters, but one rank of the smallest module has "
                f"{min(costs):,}.{hint}"
            )
        if number >= whole:
            raise ValueError(
                f"size={self.text} is {number:,} parameters, but must be below the adapter's {whole:,}. Lower "
                f"it, or start from a higher rank (r of LoraConfig, --rank): {WIDTH} times that of the size is usual."
            )
        return number
