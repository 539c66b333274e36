"""From a learned rank to what everything can serve: a plain LoRA adapter, a LoRA configuration, a merged model."""

from .adapter import OutputDifference, lora_config, output_difference, save_as_lora, save_lora_config
from .factorize import Factors, factorize
from .merge import merge_adapter
from .single_file import save_single_file

__all__ = [
    "Factors",
    "OutputDifference",
    "factorize",
    "lora_config",
    "merge_adapter",
    "output_difference",
    "save_as_lora",
    "save_lora_config",
    "save_single_file",
]
