"""LoRA-equivalent rank: at which r would LoRA reach the same loss?"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from scipy.optimize import isotonic_regression

from .statistics import Interval, paired_difference


@dataclass(frozen=True)
class EquivalentRank(Interval):
    """An r, the geometric mean over seeds, with its 95 % interval.

    Attributes:
        below: how many seeds have a higher loss than LoRA at its lowest r, and count as that r.
        above: how many have a lower one than at its highest, and count as that.

    """

    below: int = 0
    above: int = 0

    def __str__(self) -> str:
        # With seeds that count as an end of the curve, there is no telling how they spread.
        if self.below or self.above:
            return "" if self.below and self.above else f"{'<' if self.below else '>'} {self.value:.1f}"
        return f"{self.value:.1f}" if math.isnan(self.low) else f"{self.value:.1f} ({self.low:.1f} to {self.high:.1f})"


def equivalent_rank(curve: Mapping[int, Mapping[int, float]], losses: Mapping[int, float]) -> EquivalentRank | None:
    """The r at which LoRA reaches these losses, found for each seed on LoRA's own curve of that seed.

    Between two r, log r is linear in the loss. A curve that rises somewhere is flattened there (isotonic regression).

    Args:
        curve: r → seed → LoRA's loss; at least two r.
        losses: seed → loss.

    Returns:
        None if no seed is common to all.

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
        # `interp` wants rising losses, and holds its ends.
        found.append(float(np.interp(losses[seed], falling[::-1], np.log(ranks[::-1]))))
    mean = paired_difference(found, [0.0] * len(found))
    assert mean is not None
    return EquivalentRank(math.exp(mean.value), math.exp(mean.low), math.exp(mean.high), below, above)
