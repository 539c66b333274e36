"""Learnable-Rank LoRA: fine-tune transformers without guessing a rank (arXiv:2606.04325)."""

import sys
from typing import TYPE_CHECKING

__version__ = "0.1.0"

# Importing these registers the method with PEFT and imports torch, transformers and PEFT, so the command line imports
# them only when needed.
if TYPE_CHECKING or "lrlora_cli" not in sys.modules:
    from .learned import LearnedRanks, LearnedRanksCallback, shrink
    from .rank_logger import RankLogger
    from .ranks import RankReport, rank_report
    from .sharding import fully_shard_phi
    from .tuner import LrLoraConfig, LrLoraModel, cached_weights

__all__ = [
    "LearnedRanks",
    "LearnedRanksCallback",
    "LrLoraConfig",
    "LrLoraModel",
    "RankLogger",
    "RankReport",
    "__version__",
    "cached_weights",
    "fully_shard_phi",
    "rank_report",
    "shrink",
]
