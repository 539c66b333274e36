"""Record of the smallest LoRA found for an adapter: what it keeps of the gain, and its size."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

SHRUNK_FILE = "shrunk.json"
_LESS = 0.002  # than the share asked for that is told
_FAR = 0.02  # difference of the shares on training and held-out data that is told
_EARLY_GROWTH = 1.6  # of an update whose training is far from its end (lab/studies/early_cuts.md)


class Kept(NamedTuple):
    """Share of the gain, and the 5 % and 95 % quantiles of its bootstrap."""

    share: float
    low: float
    high: float

    def __str__(self) -> str:
        low = f"{self.low:.1%}" if math.isfinite(self.low) else "unknown"
        return f"{self.share:.1%} ({low} to {self.high:.1%})"


@dataclass(frozen=True)
class Shrunk:
    """A LoRA of the smallest size found, or of a size given.

    Attributes:
        keep: share of the gain that was asked for; None if a size was.
        kept: share that it keeps, on the split of the held-out data that did not choose it; None without a gain.
        loss, base: mean loss of the whole adapter, and without it, or of guessing if that is lower, on all splits.
        ranks: module → rank.
        parameters, whole: number of parameters, now and before.
        parameters_per_rank: of one rank in all modules.
        units: number of units of the statistics, in all splits.
        unit: of the statistics: "held-out examples", "held-out batches", "training examples" or "training batches".
        equal_rank: smallest rank that keeps the share if all modules have it; None if a size was asked for.
        sizes, shares, lows: parameters of the measured LoRAs, largest first, the share that each keeps, and the lower
            end of its interval, which decides; None where that is unknown.
        needed: number of units that would show that a smaller LoRA keeps the share; None if one was found.
        training: share kept on training data; None if not measured.
        metrics: metric of the task → its values before and after, on all held-out data.
        step: training step of the cut; None for a cut after training.
        growth: ratio of ‖ΔW‖ at the cut to that after half of the steps before; None where that is unknown.
        loss_before, end_loss: mean loss on the held-out data after half of the steps before the cut, and at the end of
            the training after it; None where it is unknown.

    """

    keep: float | None
    kept: Kept | None
    loss: float
    base: float
    ranks: dict[str, int]
    parameters: int
    whole: int
    parameters_per_rank: int
    units: int
    unit: str
    equal_rank: int | None = None
    sizes: list[int] = field(default_factory=list)
    shares: list[float] = field(default_factory=list)
    lows: list[float | None] = field(default_factory=list)
    needed: int | None = None
    training: float | None = None
    metrics: dict[str, list[float]] = field(default_factory=dict)
    step: int | None = None
    growth: float | None = None
    loss_before: float | None = None
    end_loss: float | None = None

    def __post_init__(self) -> None:
        if self.kept is not None:  # JSON has a list
            object.__setattr__(self, "kept", Kept(*self.kept))

    @property
    def gain(self) -> float:
        """Loss that the whole adapter saves."""
        return self.base - self.loss

    @property
    def is_overfitted(self) -> bool:
        """Whether the smaller adapter is better on held-out data than the whole one, beyond chance."""
        is_held_out = self.unit.startswith("held-out")
        return is_held_out and self.kept is not None and self.kept.low > 1 and self.kept.share > 1 + _FAR

    @property
    def sentence(self) -> str:
        """Share, size, largest rank, and the one rank for all modules that keeps the share."""
        rank = f"LoRA r = {self.parameters / self.parameters_per_rank:.2g}"
        size = f"{self.parameters:,} of {self.whole:,} parameters, as many as {rank}"
        largest = f"at most r = {max(self.ranks.values())} in a module"
        losses = f"loss {self.base:.4g} to {self.loss:.4g}"
        if self.kept is None:
            return f"A LoRA of {size}, {largest}; the adapter has no gain that could be measured ({losses})."
        if self.parameters == self.whole and self.keep is not None:
            return f"No smaller LoRA was found that keeps {self.keep:g} of the adapter's gain ({losses}): {size}."
        cut, gain = ("Cut", "its gain") if self.step is None else (f"Cut at step {self.step}", "its gain so far")
        sentence = f"{cut} to {size}, {largest}, the adapter keeps {self.kept} of {gain} ({losses})."
        if self.equal_rank is not None:
            equal_size = self.equal_rank * self.parameters_per_rank
            sentence += f" With one rank for all modules, r = {self.equal_rank} keeps it, in {equal_size:,} parameters."
        return sentence

    @property
    def end(self) -> str:
        """Loss at the end of a training that was cut."""
        return (
            f"At the end of the training, the held-out loss of the cut adapter is {self.end_loss:.4g}. That of the "
            "whole one at the end is unknown: the share is that at the cut."
        )

    def __str__(self) -> str:
        lines = [self.sentence]
        for name, (before, after) in self.metrics.items():
            lines.append(f"{name.replace('_', ' ').capitalize()}: {before:.4g} before, {after:.4g} after.")
        if self.training is not None and self.kept is not None:
            lines.append(f"On training data {self.training:.1%} is kept.")
            if abs(self.training - self.kept.share) > _FAR:
                lines[-1] += " The difference is large: some of what was learned is not seen in the held-out data."
        if self.needed is not None:
            lines.append(f"About {self.needed:,} {self.unit} would show that a smaller LoRA keeps {self.keep:g}.")
        if self.keep is not None:
            if self.kept is not None and self.kept.share < self.keep - _LESS:
                lines.append(
                    f"That is less than {self.keep:g}, on the third of the {self.unit} that did not choose the size."
                )
            lines.append(f"{self.units} {self.unit} chose this size; a third of them gave the share.")
        if self.is_overfitted:
            lines.append(
                "The cut lowers the loss on held-out data, a sign of overfitting: train for fewer epochs, at a lower "
                "rate, or on more data."
            )
            return " ".join(lines)
        is_growing = self.growth is not None and self.growth > _EARLY_GROWTH
        is_falling = self.loss_before is not None and self.loss < self.loss_before
        if self.step is not None and is_growing and is_falling:
            lines.append(
                f"The update has grown {self.growth:.1f} times since step {self.step // 2}: this training is far from "
                "its end, where less may be kept. Raise the learning rate, train longer, or cut at the end (at=1)."
            )
        return " ".join(lines) + self._advice

    @property
    def _advice(self) -> str:
        """On a LoRA of the same rank that is trained anew, in a line of its own."""
        if self.equal_rank is None or self.equal_rank * self.parameters_per_rank >= self.whole:
            return ""
        return (
            f"\nLoRA r = {self.equal_rank} trained anew often needs a higher learning rate "
            "(lrlora.find_learning_rate). Only that training tells whether it is as good."
        )


def read_shrunk(folder: Path) -> Shrunk | None:
    """Record in an adapter's folder; None without one.

    Raises:
        ValueError: the file is damaged.

    """
    from .files import read_json  # which the record itself does not need

    path = folder / SHRUNK_FILE
    if not path.exists():
        return None
    record: Shrunk = read_json(path, Shrunk, "Remove it to continue without the record of the smallest LoRA.")
    return record
