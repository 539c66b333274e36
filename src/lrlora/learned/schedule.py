"""Step of the cut, and the learning rate before and after it."""

from __future__ import annotations

from dataclasses import dataclass

_POWER = 0.5  # of the ratio of sizes, which gives that of the learning rates
_WARM_UP = 20  # steps after the cut, at most a twentieth of all
FEWEST_STEPS = 10
_FIRST_CUT = 3  # B is 0 in the first step, and with a warm-up also in the second


@dataclass
class Schedule:
    """Course of a training with one cut.

    Attributes:
        cut_step: optimizer step after which the adapter is cut.
        warm_up: steps after the cut in which the learning rate rises.
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
