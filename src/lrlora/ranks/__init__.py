"""Ranks used by an update."""

from .measures import MEASURES, Measure
from .report import Curve, RankReport, RankRow, Spectrum, rank_report

__all__ = ["MEASURES", "Curve", "Measure", "RankReport", "RankRow", "Spectrum", "rank_report"]
