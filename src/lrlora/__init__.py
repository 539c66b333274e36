"""Learnable-Rank LoRA: fine-tune transformers without guessing a rank (arXiv:2606.04325)."""

import sys
from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from .learned import FittedRanks, FittedRanksCallback, shrink
    from .learning_rate import LearningRate, find_learning_rate
    from .rank_logger import RankLogger
    from .ranks import RankReport, rank_report
    from .sharding import fully_shard_phi
    from .tuner import LrLoraConfig, LrLoraModel, cached_weights

# PEFT loads LR-LoRA adapters once the method is registered. The command line, whose help waits neither for PEFT nor for
# torch, registers it when a command reads or trains an adapter.
if "lrlora_cli" not in sys.modules:
    import_module(".tuner", __name__)

# Public name → module, imported when the name is first used.
_MODULES = {
    "FittedRanks": "learned",
    "FittedRanksCallback": "learned",
    "LearningRate": "learning_rate",
    "LrLoraConfig": "tuner",
    "LrLoraModel": "tuner",
    "RankLogger": "rank_logger",
    "RankReport": "ranks",
    "cached_weights": "tuner",
    "find_learning_rate": "learning_rate",
    "fully_shard_phi": "sharding",
    "rank_report": "ranks",
    "shrink": "learned",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_MODULES[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_MODULES})


__all__ = [
    "FittedRanks",
    "FittedRanksCallback",
    "LearningRate",
    "LrLoraConfig",
    "LrLoraModel",
    "RankLogger",
    "RankReport",
    "__version__",
    "cached_weights",
    "find_learning_rate",
    "fully_shard_phi",
    "rank_report",
    "shrink",
]
