"""What is asked for of a cut: a size or a share of the gain, and when."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from ..checks import require_share
from .size import CUT_AT, Size


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
        """Arguments of `LearnedRanks` and `LearnedRanksCallback`, as plain values."""
        return {**vars(self), "size": self.size and self.size.text}
