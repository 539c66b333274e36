"""Adapters on disk: read as updates ΔW, compressed, and saved as LoRA.

from lrlora.adapters import factorize, read_updates, save

updates = read_updates("my-lora.safetensors")           # or a folder
save(factorize(updates, energy=0.99), updates, "smaller.safetensors")
"""

from ..lora.config import lora_config
from ..lora.factors import Factors, Layout
from .export import save, save_as_lora
from .factorize import factorize
from .loading import output_difference
from .lora_file import save_single_file
from .read import read_updates
from .update import Update, Updates

__all__ = [
    "Factors",
    "Layout",
    "Update",
    "Updates",
    "factorize",
    "lora_config",
    "output_difference",
    "read_updates",
    "save",
    "save_as_lora",
    "save_single_file",
]
