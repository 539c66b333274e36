"""LoRA-equivalent rank: the r at which LoRA reaches the same loss."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from scipy.optimize import isotonic_regression

from .statistics import Interval, paired_difference


@dataclass(frozen=True)
class EquivalentRank(Interval):
    """Geometric mean of r over seeds, with its 95 % interval.

    Attributes:
        below: number of seeds with a higher loss than LoRA at its lowest r, counted as that r.
        above: number with a lower loss than at its highest r, counted as that.

    """

    below: int = 0
    above: int = 0

    def __str__(self) -> str:
        # Seeds clipped to an end of the curve make the spread unknown.
        if self.below or self.above:
            return "" if self.below and self.above else f"{'<' if self.below else '>'} {self.value:.1f}"
        return f"{self.value:.1f}" if math.isnan(self.low) else f"{self.value:.1f} ({self.low:.1f} to {self.high:.1f})"


def equivalent_rank(curve: Mapping[int, Mapping[int, float]], losses: Mapping[int, float]) -> EquivalentRank | None:
    """The r at which LoRA reaches these losses, per seed on LoRA's own curve for that seed.

    Interpolates log r linearly in the loss. Where a curve rises, it is flattened (isotonic regression).

    Args:
        curve: r → seed → LoRA's loss; at least two r.
        losses: seed → loss.

    Returns:
        None without a common seed.

    """
    ranks = sorted(curve)
    seeds = [seed for seed in losses if all(seed in curve[r] for r in ranks)]
    if not seeds:
        return None
    found: list[float] = []
    below = above = 0
    for seed in seeds:
        falling = isotonic_regression([curve[r][seed] for r in ranks], increasing=False).x
        below += losses[seed] > falling[0]
        above += losses[seed] < falling[-1]
        # `interp` requires rising losses, and clips at its ends.
        found.append(float(np.interp(losses[seed], falling[::-1], np.log(ranks[::-1]))))
    mean = paired_difference(found, [0.0] * len(found))
    assert mean is not None
    return EquivalentRank(math.exp(mean.value), math.exp(mean.low), math.exp(mean.high), below, above)
