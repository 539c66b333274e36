"""Ranks that the loss decides: during training (`LearnedRanks`), and of any adapter (`loss_curve`)."""

import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING or "lrlora_cli" not in sys.modules:  # see `lrlora`
    from ..shrunk import Kept, Shrunk
    from .callback import LearnedRanksCallback
    from .directions import LossCurve, energy_curve, loss_curve
    from .gain import Gain, example_losses, mean_loss
    from .learned_ranks import LearnedRanks
    from .moments import model_loss
    from .search import Point, smallest
    from .shrinking import shrink
    from .size import Size

__all__ = [
    "Gain",
    "Kept",
    "LearnedRanks",
    "LearnedRanksCallback",
    "LossCurve",
    "Point",
    "Shrunk",
    "Size",
    "energy_curve",
    "example_losses",
    "loss_curve",
    "mean_loss",
    "model_loss",
    "shrink",
    "smallest",
]
