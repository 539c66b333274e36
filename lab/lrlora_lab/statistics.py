"""Statistics over a few seeds: paired differences, correction for many tests, fitted ranks, LoRA-equivalent rank."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import isotonic_regression
from scipy.stats import bootstrap, f, permutation_test, sem, ttest_1samp

_RESAMPLES = 2_000


@dataclass(frozen=True)
class Interval:
    """A value with its 95 % interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Difference(Interval):
    """A mean paired difference, with its standard error and p of the corresponding paired t-test.

    All but the mean are NaN if undefined, as with one pair.
    """

    standard_error: float
    p: float


def paired_difference(values: Sequence[float], others: Sequence[float]) -> Difference | None:
    """Paired difference values − others; None without a pair."""
    differences = np.asarray(values) - np.asarray(others)
    if not len(differences):
        return None
    mean = float(differences.mean())
    if len(differences) == 1:
        return Difference(mean, math.nan, math.nan, math.nan, math.nan)
    error = float(sem(differences))
    # Two or three accuracies often differ by the same number of examples, which is not certainty.
    if np.ptp(differences) <= 1e-9 * max(1.0, np.abs(differences).max()):
        return Difference(mean, math.nan, math.nan, error, math.nan)
    test = ttest_1samp(differences, 0.0)
    interval = test.confidence_interval()
    return Difference(mean, float(interval.low), float(interval.high), error, float(test.pvalue))


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm-corrected p values (Holm 1979), in their order."""
    order = np.argsort(p_values)
    corrected, largest = np.empty(len(p_values)), 0.0
    for rank, index in enumerate(order):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[index]))
        corrected[index] = largest
    return corrected.tolist()


def columns_differ(values: NDArray[np.float64]) -> float:
    """P value of the permutation test that the columns of `values` (rows, columns) differ, not only within a row.

    Under the null hypothesis, a column's values in different rows are unrelated.
    """
    return float(
        permutation_test(
            tuple(values),
            lambda *rows, axis: np.var(np.mean(rows, axis=0), axis=axis),
            permutation_type="pairings",
            alternative="greater",
            vectorized=True,
            n_resamples=_RESAMPLES,
            rng=np.random.default_rng(0),
        ).pvalue
    )


def share_between_columns(values: NDArray[np.float64]) -> Interval:
    """Share of the variance of `values` (rows, columns) that lies between columns.

    Intraclass correlation ICC(1,1) with its F-based interval (Shrout & Fleiss 1979): 1 if each column is constant, and
    0, up to chance, if columns are alike.
    """
    rows, columns = values.shape
    between, within = rows * values.mean(0).var(ddof=1), values.var(0, ddof=1).mean()
    chance = f(columns - 1, columns * (rows - 1))
    bounds = (between, between / chance.ppf(0.975), between / chance.ppf(0.025))
    return Interval(*(float((b - within) / (b + (rows - 1) * within)) for b in bounds))


def gap(first: NDArray[np.float64], second: NDArray[np.float64]) -> tuple[Interval, Interval]:
    """Difference of two groups (first − second), of at least two values each.

    Returns:
        The difference of means, and Cohen's d, with bootstrap intervals; NaN where resamples have no spread.

    """
    gaps = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # of scipy and numpy, of these resamples
        for statistic in (_mean_difference, _cohens_d):
            interval = bootstrap((first, second), statistic, rng=np.random.default_rng(0)).confidence_interval
            gaps.append(Interval(float(statistic(first, second)), float(interval.low), float(interval.high)))
    return gaps[0], gaps[1]


def _mean_difference(first: NDArray[np.float64], second: NDArray[np.float64], axis: int = -1) -> Any:
    return first.mean(axis) - second.mean(axis)


def _cohens_d(first: NDArray[np.float64], second: NDArray[np.float64], axis: int = -1) -> Any:
    spread = np.sqrt((first.var(axis, ddof=1) + second.var(axis, ddof=1)) / 2)
    return _mean_difference(first, second, axis) / spread


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
    log_ranks: list[float] = []
    below = above = 0
    for seed in seeds:
        falling = isotonic_regression([curve[r][seed] for r in ranks], increasing=False).x
        below += losses[seed] > falling[0]
        above += losses[seed] < falling[-1]
        # `interp` requires rising losses, and clips at its ends.
        log_ranks.append(float(np.interp(losses[seed], falling[::-1], np.log(ranks[::-1]))))
    mean = paired_difference(log_ranks, [0.0] * len(log_ranks))
    assert mean is not None
    return EquivalentRank(math.exp(mean.value), math.exp(mean.low), math.exp(mean.high), below, above)
