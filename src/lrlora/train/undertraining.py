"""What tells that a run has learned little, and the remedy, from its metrics and its course."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from ..learned.search import OVERFIT
from ..run_folder import guess_in

_LITTLE = 0.05  # share of a loss that was saved: of a guess's, and of the first evaluation's
_STEEP = 0.1  # share of the loss's whole fall between the last two evaluations
_FEWEST_EVALUATIONS = 4


def is_like_guessing(metrics: Mapping[str, float]) -> bool:
    """Whether the loss is hardly lower than that of the best constant answer; False if that is unknown.

    Args:
        metrics: result of `with_guess`.

    """
    losses = _losses(metrics)
    return losses is not None and losses[0] > (1 - _LITTLE) * losses[1]


def _losses(metrics: Mapping[str, float]) -> tuple[float, float] | None:
    """Loss of the model and of the best constant answer; None if that is unknown."""
    guess = guess_in(metrics)
    name = next((name for name in ("log_loss", "loss") if name in metrics and guess.get(name, 0) > 0), None)
    return None if name is None else (metrics[name], guess[name])


def undertraining(
    metrics: Mapping[str, float],
    log: Sequence[Mapping[str, float]],
    *,
    rate: float,
    head_rate: float | None,
) -> Iterator[str]:
    """Sentences on a model that is no better than guessing, and on a loss that still falls steeply at the end.

    Args:
        metrics: of the validation data, with those of the best constant answer (`with_guess`).
        log: the Trainer's log.
        rate: peak learning rate.
        head_rate: that of a new head; None without one.

    """
    if (losses := _losses(metrics)) is not None and is_like_guessing(metrics):
        loss, guess = losses
        rates = f"--learning-rate, now {rate:g}"
        if head_rate is not None:
            rates += f"; of the head --head-learning-rate, now {head_rate:g}"
        if loss > (1 + OVERFIT) * guess:
            yield (
                f"The loss is above that of guessing: {loss:.4g}, guessing {guess:.4g}. The model has diverged, "
                f"learned its training data by heart, or hardly begun to learn: change the learning rate ({rates}) or "
                "the length (--epochs), before making it smaller."
            )
        else:
            yield (
                f"The model is hardly better than guessing: loss {loss:.4g}, guessing {guess:.4g}. Raise "
                f"the learning rate ({rates}), or train longer (--epochs), before making it smaller."
            )
    course = [entry["eval_loss"] for entry in log if "eval_loss" in entry]
    if len(course) < _FEWEST_EVALUATIONS:
        return
    fall, last = course[0] - course[-1], course[-2] - course[-1]
    if fall > _LITTLE * abs(course[0]) and fall >= last > _STEEP * fall:
        yield (
            f"The validation loss still fell steeply at the end, by {last / fall:.0%} of its fall between the last two "
            "evaluations: train longer (--epochs), or at a higher rate."
        )
