"""What is asked for of a cut, a size or a share of the gain, and the course of a training with it."""

from __future__ import annotations

import math
import re
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from ..checks import require_share

CUT_AT = 0.3  # share of the steps before a cut to a size
KEEP_AT = 0.6  # and to a share of the gain so far
WIDTH = 4  # rank at the start, as a multiple of that of the size
WIDE_RANK = 16  # rank at the start for a size in parameters or bytes, and for a share
_POWER = 0.5  # of the ratio of sizes, which gives that of the learning rates
_WARM_UP = 20  # steps after the cut if the optimizer begins anew, at most a twentieth of all
FEWEST_STEPS = 10
_FIRST_CUT = 3  # B is 0 in the first step, and with a warm-up also in the second
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


@dataclass(frozen=True)
class Cut:
    """Cut of an adapter: to a size, or to the fewest parameters that keep a share of its gain.

    Attributes:
        size: parameters after the cut; None for a share.
        keep: share of the gain, in (0, 1); None for a size.
        at: share of the steps after which the adapter is cut, in (0, 1]; 1 for the end of the training.
        rate: factor of the learning rate after the cut; None: (parameters before / after)^½.
        max_rank: largest rank of any module; None: that of the adapter.

    Raises:
        ValueError: `size` and `keep` are both given or both missing, or a value is out of range.

    """

    size: Size | None = None
    keep: float | None = None
    at: float = 1.0
    rate: float | None = None
    max_rank: int | None = None

    @classmethod
    def parse(
        cls,
        size: str | None,
        keep: float | None,
        *,
        at: float | None = None,
        rate: float | None = None,
        max_rank: int | None = None,
    ) -> Cut:
        """Cut to a size in words, such as r4; `at` is 0.3 for a size and 1 for a share by default."""
        at = at if at is not None else 1.0 if size is None else CUT_AT
        return cls(None if size is None else Size.parse(size), keep, at, rate, max_rank)

    def __post_init__(self) -> None:
        if (self.size is None) == (self.keep is None):
            raise ValueError(
                f"Pass exactly one of size and keep, got size={self.size and self.size.text!r} and keep={self.keep!r}."
            )
        if self.keep is not None:
            require_share(self.keep)
        if not 0 < self.at <= 1:
            raise ValueError(f"at must be a share of the steps, in (0, 1], got {self.at!r}.")
        if self.rate is not None and not 0 < self.rate < math.inf:
            raise ValueError(f"rate must be a positive factor of the learning rate, got {self.rate!r}.")
        if self.is_at_end and self.rate is not None:
            raise ValueError("rate is that after the cut, and at=1 leaves no step after it. Remove one of them.")
        if self.max_rank is not None and self.max_rank < 1:
            raise ValueError(f"max_rank must be an integer ≥ 1, got {self.max_rank!r}.")

    @property
    def is_at_end(self) -> bool:
        """Whether the adapter is cut at the end of the training."""
        return self.at == 1

    @property
    def options(self) -> dict[str, Any]:
        """Arguments of `FittedRanks` and `FittedRanksCallback`, as plain values."""
        return {**vars(self), "size": self.size and self.size.text}


@dataclass
class Schedule:
    """Course of a training with one cut.

    Attributes:
        cut_step: optimizer step after which the adapter is cut.
        warm_up: steps after the cut in which the learning rate rises; 1 if the optimizer goes on.
        wide: parameters before the cut.
        rate: factor of the learning rate after the cut; None: (parameters before / after)^½.

    """

    cut_step: int
    warm_up: int
    wide: int
    rate: float | None = None

    @classmethod
    def plan(cls, at: float, steps: int, wide: int, rate: float | None) -> Schedule:
        """Schedule of a run of this number of steps, cut at a share of them; see `cut_step`."""
        return cls(cut_step(at, steps), max(1, min(_WARM_UP, steps // 20)), wide, rate)

    def rate_after(self, parameters: int) -> float:
        """Factor of the learning rate after a cut to a number of parameters."""
        return (self.wide / parameters) ** _POWER if self.rate is None else self.rate

    def factor(self, done: int, parameters: int | None) -> float:
        """Factor in the next step, after `done` steps; before the cut, `parameters` is None."""
        if parameters is None:
            return 1.0
        return self.rate_after(parameters) * min(1.0, (done - self.cut_step + 1) / self.warm_up)


def cut_step(at: float, steps: int) -> int:
    """Step of the cut.

    Raises:
        ValueError: it is not within the steps.

    """
    if not isinstance(at, float) or not 0 < at < 1:
        raise ValueError(f"at must be a share of the steps between 0 and 1, got {at!r}.")
    if not isinstance(steps, int) or steps < FEWEST_STEPS:
        raise ValueError(
            f"steps must be at least {FEWEST_STEPS} for ranks to be learned, got {steps!r}. Train longer, or "
            "train a plain LoRA."
        )
    step = max(_FIRST_CUT, round(at * steps))
    if step >= steps:
        raise ValueError(f"at={at} leaves no step of {steps} after the cut. Lower it.")
    return step
