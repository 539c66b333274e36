"""Ranks used by an update, and ranks required by the loss."""

from .cut import LossCurve, Point, energy_curve, loss_curve, mean_loss, smallest
from .measures import MEASURES, Measure
from .moments import model_loss
from .report import Curve, RankReport, RankRow, Spectrum, rank_report

__all__ = [
    "MEASURES",
    "Curve",
    "LossCurve",
    "Measure",
    "Point",
    "RankReport",
    "RankRow",
    "Spectrum",
    "energy_curve",
    "loss_curve",
    "mean_loss",
    "model_loss",
    "rank_report",
    "smallest",
]
