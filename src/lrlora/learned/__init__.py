"""Ranks that the loss decides: during training (`LearnedRanks`), and of any adapter (`loss_curve`)."""

from .callback import LearnedRanksCallback
from .directions import LossCurve, Point, energy_curve, loss_curve, mean_loss, smallest
from .learn import LearnedRanks
from .moments import model_loss

__all__ = [
    "LearnedRanks",
    "LearnedRanksCallback",
    "LossCurve",
    "Point",
    "energy_curve",
    "loss_curve",
    "mean_loss",
    "model_loss",
    "smallest",
]
