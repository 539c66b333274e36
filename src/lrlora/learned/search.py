"""Smallest LoRA that keeps a share of the gain, measured on held-out data.

The held-out data are in three splits: one finds the size, one confirms it, and the third gives the interval, since the
split that chose a size is biased in its favor.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from ..checks import CannotCutError
from ..lora.factors import Factors
from ..shrunk import Kept, Shrunk
from .directions import LossCurve
from .gain import Gain, mean_of

SPLITS = 3
FEWEST_UNITS = 30  # of a split, on average
PASSES = 6  # over the held-out data, about
LEARNED = 0.1  # training loss below which gradients are those of sampled labels
_FIRST_SHARE = 0.25  # share of the parameters that is measured first
_TOLERANCE = 1.05  # ratio of sizes at which the search ends
_EVALUATIONS = 12
_GROWTH = 1.2  # ratio of sizes that are tried to confirm a share
OVERFIT = 0.1  # a loss that is higher than that of guessing by this share may come from overfitting
_LEAST_GAIN = 1e-3  # share of the loss below which a gain is none: losses are printed with four digits


class Split:
    """A split of the data, with the losses that an adapter has on it.

    Args:
        whole: losses of its units, see `losses_of`.
        without: those without the adapter, or a function that measures them.
        measure: returns those of smaller factors.
        ranks: of all directions, where these are the adapter itself: in half precision, other factors of the same
            update have other losses.

    """

    def __init__(
        self,
        whole: Tensor,
        without: Tensor | Callable[[], Tensor],
        measure: Callable[[Sequence[Factors]], Tensor],
        ranks: Sequence[int] = (),
    ) -> None:
        self.whole, self.measure, self._without = whole, measure, without
        self._measured = {tuple(ranks): whole}

    @cached_property
    def without(self) -> Tensor:
        """Losses without the adapter."""
        return self._without if isinstance(self._without, Tensor) else self._without()

    @cached_property
    def gain(self) -> Gain:
        return Gain(self.without, self.whole)

    def losses(self, factors: Sequence[Factors]) -> Tensor:
        """Losses of factors of one curve, cached by their ranks."""
        ranks = tuple(pair.rank for pair in factors)
        if ranks not in self._measured:
            self._measured[ranks] = self.measure(factors)
        return self._measured[ranks]

    def kept(self, factors: Sequence[Factors]) -> Kept:
        """Share of the gain that factors keep."""
        return self.gain.kept(self.losses(factors))


class Point(NamedTuple):
    """Share of the gain kept at a size."""

    parameters: int
    kept: Kept


def parameters_of(factors: Sequence[Factors]) -> int:
    """Total parameters of factors."""
    return sum(pair.parameters for pair in factors)


def find_smallest(
    splits: Sequence[Split], curve: LossCurve, keep: float, *, unit: str, max_rank: int | None = None
) -> tuple[list[Factors], Shrunk]:
    """Find the smallest LoRA that keeps a share of the gain: by the directions that matter most, or of equal ranks.

    Args:
        splits: three splits of the held-out data: to find a size, to confirm it, and for the interval.
        curve: curve of the adapter.
        keep: share, in (0, 1): the lower bound on the first split, and the share on the second.
        unit: see `Shrunk`.
        max_rank: of any module.

    Returns:
        The factors, and their record.

    Raises:
        CannotCutError: there are fewer than 90 units, or a split has no gain; or no size keeps the share.

    """
    require_units([len(split.whole) for split in splits], unit)
    require_gain(splits, unit)
    search, confirm, _ = splits
    factors, points = smallest(
        curve, search.kept, keep, max_rank=max_rank, confirm=lambda factors: confirm.kept(factors).share
    )
    equal_rank, equal_factors = _smallest_equal(
        curve,
        parameters_of(factors),
        lambda candidate: search.kept(candidate).low >= keep and confirm.kept(candidate).share >= keep,
    )
    if max_rank is None or equal_rank <= max_rank:
        factors = min(factors, equal_factors, key=parameters_of)
    record = describe(splits, curve, factors, unit)
    if record.parameters not in {point.parameters for point in points}:  # equal ranks
        points = sorted([*points, Point(record.parameters, search.kept(factors))], reverse=True)
    needed = _needed(points, search.gain, keep) if record.parameters == points[0].parameters else None
    return factors, replace(
        record,
        keep=keep,
        equal_rank=equal_rank,
        sizes=[point.parameters for point in points],
        shares=[point.kept.share for point in points],
        lows=[point.kept.low if math.isfinite(point.kept.low) else None for point in points],
        needed=needed,
    )


def describe(splits: Sequence[Split], curve: LossCurve, factors: Sequence[Factors], unit: str) -> Shrunk:
    """Record of factors: the losses of the whole adapter on all splits, and the share kept on the last one."""
    last = splits[-1]
    whole, without = (torch.cat(losses) for losses in zip(*((s.whole, s.without) for s in splits), strict=True))
    return Shrunk(
        keep=None,
        kept=last.kept(factors) if last.gain.low > 0 else None,
        loss=mean_of(whole),
        base=mean_of(without),
        ranks={pair.module: pair.rank for pair in factors},
        parameters=parameters_of(factors),
        whole=curve.parameters,
        parameters_per_rank=sum(pair.parameters_per_rank for pair in factors),
        units=sum(len(split.whole) for split in splits),
        unit=unit,
    )


def require_units(sizes: Sequence[int], unit: str) -> None:
    """Raise CannotCutError unless the splits have 90 units, nearly equally divided."""
    if sum(sizes) < SPLITS * FEWEST_UNITS or min(sizes) < FEWEST_UNITS / 2:
        raise CannotCutError(too_few(f"{sum(sizes)} {unit}", by_batch=unit.endswith("batches")))


def too_few(units: str, *, by_batch: bool) -> str:
    """Message on too few units."""
    fewest = SPLITS * FEWEST_UNITS
    remedy = f"Provide at least {fewest} examples, in at least {3 * SPLITS} batches."
    if by_batch:
        remedy = (
            f"This loss is known by batch alone: provide at least {fewest} batches, of more data, or by a smaller "
            "per_device_eval_batch_size where the loss is a mean over examples."
        )
    return f"{units} are too few to tell which share of the gain a smaller adapter keeps. {remedy}"


def require_gain(splits: Sequence[Split], unit: str) -> None:
    """Raise CannotCutError unless every split shows a gain."""
    without, whole = (torch.cat([getattr(split, name) for split in splits]) for name in ("without", "whole"))
    losses = f"loss {mean_of(whole):.4g}, {mean_of(without):.4g} without it or by guessing"
    if not torch.isfinite(torch.cat([without, whole])).all():
        raise CannotCutError(f"The loss on {len(whole)} {unit} is not finite ({losses}). Check the data.")
    if not Gain(without, whole).low > _LEAST_GAIN * abs(mean_of(without)):
        remedy = "Where it still falls, raise the learning rate (also a new head's), or train longer."
        if mean_of(whole) > (1 + OVERFIT) * mean_of(without):
            remedy = "The training data may be learned by heart: train less, at a lower rate, or on more data."
        raise CannotCutError(
            f"The adapter gains nothing that {len(whole)} {unit} could show ({losses}), so no share of it can be kept. "
            f"{remedy}"
        )
    gain = min((split.gain for split in splits), key=lambda gain: gain.low)
    if gain.low <= 0:
        ratio = ((gain.nats - gain.low) / gain.nats) ** 2 if gain.nats > 0 else 2
        larger = ", or larger ones" if unit.endswith("batches") else ""
        raise CannotCutError(
            f"The gain is too small ({losses}) for a third of {len(whole)} {unit} to tell which share a smaller LoRA "
            f"keeps; about {math.ceil(len(whole) * ratio):,} would{larger}."
        )


def _needed(points: Sequence[Point], gain: Gain, keep: float) -> int | None:
    """Number of units, in all splits, that would show that the smallest likely size keeps the share."""
    likely = [point for point in points[1:] if point.kept.share > keep]
    return SPLITS * gain.examples_for(likely[-1].kept, keep) if likely else None


def _smallest_equal(
    curve: LossCurve, parameters: int, keeps: Callable[[Sequence[Factors]], bool]
) -> tuple[int, list[Factors]]:
    """Smallest rank of all modules that keeps the share, and its factors; the largest if none does.

    Equal ranks do not need fewer parameters than the best ones, except for the tolerance of the search, and often
    hardly more.
    """
    per_rank = sum(module.whole.parameters_per_rank for module in curve.modules)
    high = max(len(module.rises) for module in curve.modules)  # keeps it
    low, step = min(int(parameters / _TOLERANCE / per_rank), high - 1), 1
    while high - low > 1:
        rank = min(low + step, (low + high) // 2)
        if keeps([module.factors(rank) for module in curve.modules]):
            high = rank
        else:
            low, step = rank, 2 * step
    return high, [module.factors(high) for module in curve.modules]


def smallest(
    curve: LossCurve,
    measure: Callable[[Sequence[Factors]], Kept],
    keep: float,
    *,
    max_rank: int | None = None,
    confirm: Callable[[Sequence[Factors]], float] | None = None,
) -> tuple[list[Factors], list[Point]]:
    """Find the smallest size that keeps a share of the gain, to about 5 %.

    Measures all directions and a quarter, then sizes at which the predicted curve, scaled to the last measurement,
    reaches the share, or between the smallest size that keeps it and the largest that does not; at most 12 in all.

    Args:
        curve: curve of the adapter.
        measure: returns the share that given factors keep, from `Gain.kept` on held-out examples.
        keep: share to keep, between 0 and 1.
        max_rank: maximum rank of a module.
        confirm: returns the share that factors keep on other held-out examples; the size grows by fifths until it is
            the share there, too.

    Returns:
        The factors, and all measured sizes, sorted.

    Raises:
        CannotCutError: even all directions keep less.

    """
    sizes = _Sizes(curve, measure, keep, max_rank)
    sizes.measure(curve.parameters)
    if not sizes.factors:
        whole_kept = max(sizes.points.values()).kept
        raise CannotCutError(
            f"Even with all directions, {whole_kept} of the gain are kept, and {keep:g} is asked for. "
            f"Ask for less{'' if max_rank is None else ', or for a larger rank'}."
        )
    sizes.narrow()
    factors, size, whole = sizes.factors, sizes.enough, max(sizes.points)
    while confirm is not None and confirm(factors) < keep and size < whole:
        size = min(whole, int(_GROWTH * size) + 1)
        factors = curve.within(size, max_rank)
        sizes.points[parameters_of(factors)] = Point(parameters_of(factors), measure(factors))
    return factors, sorted(sizes.points.values(), reverse=True)


class _Sizes:
    """Sizes measured by a search for the smallest that keeps a share.

    Attributes:
        points: size → what it keeps.
        factors, enough: those of the smallest size that keeps the share, and this size; empty and 0 if none does.
        too_few: the largest size that does not keep the share; 0 if none is known.

    """

    def __init__(
        self, curve: LossCurve, kept: Callable[[Sequence[Factors]], Kept], keep: float, max_rank: int | None
    ) -> None:
        self.curve, self.kept, self.keep, self.max_rank = curve, kept, keep, max_rank
        self.points: dict[int, Point] = {}
        self.factors: list[Factors] = []
        self.enough = self.too_few = 0
        self.sizes, self.rises = curve.predicted(max_rank)

    def measure(self, budget: float) -> Point | None:
        """Measure the size within a budget; None if it is known."""
        factors = self.curve.within(max(int(budget), self.curve.fewest), self.max_rank)
        size = parameters_of(factors)
        if size in self.points:
            return None
        self.points[size] = point = Point(size, self.kept(factors))
        if not point.kept.low >= self.keep:  # or NaN
            self.too_few = max(self.too_few, size)
        elif not self.factors or size < self.enough:
            self.enough, self.factors = size, factors
        return point

    def narrow(self) -> None:
        """Measure sizes until those that keep the share and those that do not are within the tolerance."""
        budget, was_near = _FIRST_SHARE * self.enough, False
        while len(self.points) < _EVALUATIONS and self.enough > max(self.curve.fewest, _TOLERANCE * self.too_few):
            point = self.measure(budget)
            if point is None and budget == self.middle:
                return  # no size remains between the two
            budget = self.middle if point is None else self.expected(point)
            low, high = _TOLERANCE * self.too_few, self.enough / _TOLERANCE
            is_near = not low < budget < high
            if is_near and (was_near or not self.too_few):
                budget = self.middle
            elif is_near:  # a step of the tolerance on the other side of the expected size ends the search
                budget = high if budget >= high else low
            was_near = is_near

    @property
    def middle(self) -> float:
        """Size between the smallest that keeps the share and the largest that does not."""
        return (self.enough * self.too_few) ** 0.5 if self.too_few else self.enough / 2

    def expected(self, point: Point) -> float:
        """Size that keeps the share, by the predicted curve through a measured point."""
        lost, index = 1 - point.kept.low, int(torch.searchsorted(self.sizes, point.parameters))
        if lost <= 0 or not self.rises[index]:
            return 0.0
        return float(self.sizes[(self.rises * (lost / self.rises[index]) <= 1 - self.keep).int().argmax()])
