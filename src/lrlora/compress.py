"""See and compress the updates of any adapter: all that this takes, under one name.

from lrlora.compress import factorize, rank_report, read_updates, save

updates = read_updates("my-lora.safetensors")           # or a folder, or base= and a full model
print(rank_report(updates).summary()["rank/stable_rank_mean"])
save(factorize(updates, energy=0.99), updates, "smaller.safetensors")
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import torch

from .cut import LossCurve, loss_curve, mean_loss, smallest
from .export import Factors, factorize, save_as_lora, save_single_file
from .rank import RankReport, rank_report
from .updates import Update, Updates, read_updates
from .updates.single_file import SingleFile

__all__ = [
    "Factors",
    "LossCurve",
    "RankReport",
    "Update",
    "Updates",
    "factorize",
    "loss_curve",
    "mean_loss",
    "rank_report",
    "read_updates",
    "save",
    "save_as_lora",
    "smallest",
]


def save(
    factors: Sequence[Factors],
    updates: Updates,
    output: str | os.PathLike[str],
    *,
    dtype: torch.dtype | None = None,
    pad: bool = False,
) -> int:
    """Write a LoRA with these factors: a file with its own keys for a single file, else a folder of PEFT's.

    Args:
        factors: as `factorize` returns them.
        updates: what they were made of.
        output: file or folder to write, which must not exist. It is there whole or not at all.
        dtype: of the factors; default: as stored.
        pad: give all modules the largest rank, with zeros, for programs that know only one.

    Returns:
        How many bytes were written.

    Raises:
        FileExistsError: the output is there.
        ValueError: no module has a rank; and as `save_as_lora` and `save_single_file`.

    """
    path = Path(output)
    if isinstance(updates.origin, SingleFile):
        save_single_file(factors, updates, path, dtype=dtype, pad=pad)
        return path.stat().st_size
    save_as_lora(factors, updates, path, dtype=dtype, pad=pad)
    return sum(file.stat().st_size for file in path.iterdir())
