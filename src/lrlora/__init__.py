"""Learnable-Rank LoRA: fine-tune transformers without guessing a rank (arXiv:2606.04325)."""

__version__ = "0.1.0"

from .callback import RankCallback
from .distributed import fully_shard_phi
from .rank import RankReport, rank_report
from .tuner import LrLoraConfig, LrLoraModel, cached_weights

__all__ = [
    "LrLoraConfig",
    "LrLoraModel",
    "RankCallback",
    "RankReport",
    "__version__",
    "cached_weights",
    "fully_shard_phi",
    "rank_report",
]
