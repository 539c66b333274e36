"""See and compress the updates of any adapter: all that this takes, under one name.

from lrlora.compress import factorize, rank_report, read_updates, save, subspace_overlap

updates = read_updates("my-lora.safetensors")           # or a folder, or base= and a full model
print(rank_report(updates).summary()["rank/stable_rank_mean"])
save(factorize(updates, energy=0.99), updates, "smaller.safetensors")
similar = subspace_overlap(updates, read_updates("another.safetensors"))
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from .cut import LossCurve, loss_curve, mean_loss, smallest
from .export import Factors, factorize, save_as_lora, save_single_file
from .rank import RankReport, rank_report
from .rank.overlap import grassmann_similarity
from .updates import Update, Updates, read_updates
from .updates.single_file import SingleFile

__all__ = [
    "Factors",
    "LossCurve",
    "RankReport",
    "Update",
    "Updates",
    "factorize",
    "grassmann_similarity",
    "leading_directions",
    "loss_curve",
    "mean_loss",
    "rank_report",
    "read_updates",
    "save",
    "save_as_lora",
    "smallest",
    "subspace_overlap",
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


def leading_directions(updates: Updates, most: int = 16) -> dict[str, Tensor]:
    """Module → its leading input directions, right singular vectors of ΔW: (n, k) with k ≤ `most`.

    Modules whose update is 0 are left out.
    """
    if not any(all(part.any() for part in update.factors() or (update.matrix(),)) for update in updates):
        return {}
    factors = factorize(updates, max_rank=most)
    return {part.module: F.normalize(part.A.T, dim=0) for part in factors if part.rank}


def subspace_overlap(first: Updates, second: Updates, directions: int = 8) -> dict[str, float]:
    """How far the leading input directions of two updates agree, module by module, in [0, 1].

    Two updates that have nothing to do with each other have, on average, `directions` / n.

    Args:
        first: of one adapter.
        second: of another, of the same base model.
        directions: how many of each, at most; fewer where an update has fewer.

    Returns:
        Module → ‖V₁ᵀV₂‖²_F / k, for the modules of both (LoRA, arXiv:2106.09685, § 7.2).

    """
    found = [leading_directions(updates, directions) for updates in (first, second)]
    return {
        module: grassmann_similarity(found[0][module], found[1][module])
        for module in found[0]
        if module in found[1] and len(found[0][module]) == len(found[1][module])
    }
