"""What a few seeds can say: paired differences, corrected for many comparisons, and what the learned ranks show."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.stats import bootstrap, permutation_test, sem, ttest_1samp

_RESAMPLES = 2_000


@dataclass(frozen=True)
class Difference:
    """A paired difference: its mean, standard error, and p of the paired t-test; NaN if it has nothing to go by."""

    mean: float
    standard_error: float
    p: float


def paired_difference(values: Sequence[float], others: Sequence[float]) -> Difference | None:
    """How much larger `values` are, pair by pair; None with less than two pairs."""
    differences = np.asarray(values) - np.asarray(others)
    if len(differences) < 2:
        return None
    # Two or three accuracies often differ by the same number of examples: that is no certainty.
    has_spread = np.ptp(differences) > 1e-9 * max(1.0, np.abs(differences).max())
    p = float(ttest_1samp(differences, 0.0).pvalue) if has_spread else math.nan
    return Difference(float(differences.mean()), float(sem(differences)), p)


def holm(p_values: Sequence[float]) -> list[float]:
    """The p values corrected for their number (Holm 1979), in their order."""
    order = np.argsort(p_values)
    corrected, largest = np.empty(len(p_values)), 0.0
    for rank, index in enumerate(order):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[index]))
        corrected[index] = largest
    return corrected.tolist()


def modules_differ(by_seed: NDArray[np.float64]) -> float:
    """P of the permutation test that the modules' values (seeds, modules) differ, and not only within a seed.

    Under the null hypothesis a module's value under one seed says nothing of its value under another.
    """
    return float(
        permutation_test(
            tuple(by_seed),
            lambda *seeds: np.var(np.mean(seeds, axis=0)),
            permutation_type="pairings",
            alternative="greater",
            vectorized=False,
            n_resamples=_RESAMPLES,
            rng=np.random.default_rng(0),
        ).pvalue
    )


@dataclass(frozen=True)
class Gap:
    """The difference of two groups' means, its 95 % bootstrap interval, and Cohen's d."""

    mean: float
    low: float
    high: float
    d: float


def gap(first: NDArray[np.float64], second: NDArray[np.float64]) -> Gap:
    """How much larger the first group's values are than the second's; each has two values at least."""
    interval = bootstrap(
        (first, second), lambda a, b: a.mean() - b.mean(), vectorized=False, rng=np.random.default_rng(0)
    ).confidence_interval
    mean = float(first.mean() - second.mean())
    spread = math.sqrt((first.var(ddof=1) + second.var(ddof=1)) / 2)
    return Gap(mean, float(interval.low), float(interval.high), mean / spread if spread > 0 else math.inf)
