"""What tells that a run has learned little, and the remedy, from its metrics and its course."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

_LITTLE = 0.05  # share of a loss that was saved: of a guess's, and of the first evaluation's
_STEEP = 0.1  # share of the loss's whole fall between the last two evaluations
_FEWEST_EVALUATIONS = 4


def undertraining(
    metrics: Mapping[str, float],
    guess: Mapping[str, float],
    log: Sequence[Mapping[str, float]],
    *,
    rate: float,
    head_rate: float | None,
) -> Iterator[str]:
    """Sentences on a model that is hardly better than guessing, and on a loss that still falls steeply at the end.

    Args:
        metrics: of the validation data.
        guess: those of the best constant answer; empty where there is none.
        log: the Trainer's log.
        rate: peak learning rate.
        head_rate: that of a new head; None without one.

    """
    name = next((metric for metric in ("log_loss", "loss") if metric in guess and metric in metrics), None)
    if name is not None and guess[name] > 0 and metrics[name] > (1 - _LITTLE) * guess[name]:
        rates = f"--learning-rate, now {rate:g}"
        if head_rate is not None:
            rates += f"; of the head --head-learning-rate, now {head_rate:g}"
        yield (
            f"The model is hardly better than guessing: loss {metrics[name]:.4g}, guessing {guess[name]:.4g}. Raise "
            f"the learning rate ({rates}), or train longer (--epochs), before making it smaller."
        )
    losses = [entry["eval_loss"] for entry in log if "eval_loss" in entry]
    if len(losses) < _FEWEST_EVALUATIONS:
        return
    fall, last = losses[0] - losses[-1], losses[-2] - losses[-1]
    if fall > _LITTLE * abs(losses[0]) and fall >= last > _STEEP * fall:
        yield (
            f"The validation loss still fell steeply at the end, by {last / fall:.0%} of its fall between the last two "
            "evaluations: train longer (--epochs), or at a higher rate."
        )
