"""The smallest LoRA that does the same: what of an adapter matters to the loss, and what it costs to leave it out."""

from .curve import LossCurve, Point, energy_curve, loss_curve, mean_loss, smallest
from .moments import model_loss

__all__ = ["LossCurve", "Point", "energy_curve", "loss_curve", "mean_loss", "model_loss", "smallest"]
