"""The updates ΔW of any adapter, of a model in memory, of a file, or between two checkpoints: one matrix a module.

from lrlora.updates import read_updates

updates = read_updates("my-lora.safetensors")
rank_report(updates)                    # lrlora.rank
factorize(updates, energy=0.99)         # lrlora.export
"""

from .read import read_updates
from .update import Layout, Update, Updates

__all__ = ["Layout", "Update", "Updates", "read_updates"]
