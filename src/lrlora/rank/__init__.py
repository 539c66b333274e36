"""Learned ranks: their measures, the report, and the walk over a model that makes it."""

from .measures import MEASURES, Measure
from .report import Curve, RankReport, RankRow, Spectrum
from .walk import rank_report

__all__ = ["MEASURES", "Curve", "Measure", "RankReport", "RankRow", "Spectrum", "rank_report"]
