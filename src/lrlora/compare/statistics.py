"""What a few seeds can say: paired differences, corrected for many comparisons, and what the learned ranks show."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.stats import bootstrap, f, permutation_test, sem, ttest_1samp

_RESAMPLES = 2_000


@dataclass(frozen=True)
class Interval:
    """A value and its 95 % interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Difference(Interval):
    """A mean paired difference, with its standard error and p of the paired t-test that the interval goes with.

    p and the interval are NaN where they have nothing to go by.
    """

    standard_error: float
    p: float


def paired_difference(values: Sequence[float], others: Sequence[float]) -> Difference | None:
    """How much larger `values` are, pair by pair; None with less than two pairs."""
    differences = np.asarray(values) - np.asarray(others)
    if len(differences) < 2:
        return None
    mean, error = float(differences.mean()), float(sem(differences))
    # Two or three accuracies often differ by the same number of examples: that is no certainty.
    if np.ptp(differences) <= 1e-9 * max(1.0, np.abs(differences).max()):
        return Difference(mean, math.nan, math.nan, error, math.nan)
    test = ttest_1samp(differences, 0.0)
    interval = test.confidence_interval()
    return Difference(mean, float(interval.low), float(interval.high), error, float(test.pvalue))


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


def share_between_modules(by_seed: NDArray[np.float64]) -> Interval:
    """The part of the variance of values (seeds, modules) that lies between modules and not between seeds of a module.

    The intraclass correlation ICC(1,1) with its interval by F (Shrout & Fleiss 1979): 0 if modules are alike, 1 if
    every seed gives a module the same value.
    """
    seeds, modules = by_seed.shape
    between, within = seeds * by_seed.mean(0).var(ddof=1), by_seed.var(0, ddof=1).mean()
    chance = f(modules - 1, modules * (seeds - 1))
    bounds = (between, between / chance.ppf(0.975), between / chance.ppf(0.025))
    return Interval(*(float((b - within) / (b + (seeds - 1) * within)) for b in bounds))


@dataclass(frozen=True)
class Gap(Interval):
    """The difference of two groups' means, its 95 % bootstrap interval, and Cohen's d."""

    d: float


def gap(first: NDArray[np.float64], second: NDArray[np.float64]) -> Gap:
    """How much larger the first group's values are than the second's; each has two values at least."""
    interval = bootstrap(
        (first, second), lambda a, b: a.mean() - b.mean(), vectorized=False, rng=np.random.default_rng(0)
    ).confidence_interval
    mean = float(first.mean() - second.mean())
    spread = math.sqrt((first.var(ddof=1) + second.var(ddof=1)) / 2)
    return Gap(mean, float(interval.low), float(interval.high), mean / spread if spread > 0 else math.inf)
