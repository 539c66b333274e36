"""The compressed update in one safetensors file, with the keys of the file that it comes from."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from ..files import replacing
from ..updates import Updates
from ..updates.single_file import KOHYA_STYLE, METADATA_KEY, SingleFile
from .adapter import padded_factors, stored_dtype
from .factorize import Factors

_CONVOLUTION = re.compile(r"conv|shortcut|sampler|proj_(in|out)$")


def save_single_file(
    factors: Sequence[Factors],
    updates: Updates,
    output: str | os.PathLike[str],
    *,
    dtype: torch.dtype | None = None,
    pad: bool = False,
) -> None:
    """Write a LoRA with these factors; LoHa and LoKr become LoRA, in kohya's keys.

    Where there is an α it is 1, and B is multiplied by the rank, which a reader divides by. What else the file held
    (DoRA's magnitudes, text embeddings, the notes of whoever trained it) is kept; hashes, which would be of another
    file, are not.

    Args:
        factors: as `factorize` returns them.
        updates: what was read of the file.
        output: `.safetensors` file to write; it is there whole or not at all.
        dtype: of the factors; default: that of the file.
        pad: give all modules the largest rank, with zeros.

    Raises:
        FileExistsError: the file exists.
        ValueError: no module has a rank; or a LoHa or LoKr may be of a convolution, whose kernel it does not tell.

    """
    file: SingleFile = updates.origin
    path = free_file(output)
    if file.has_magnitudes:
        factors = [part.at_least_one() for part in factors]  # where BA is 0, the magnitude may still be trained
    exported = [part for part in factors if part.rank]
    if not exported:
        raise ValueError("No module has a rank: there is nothing to export.")
    if unclear := [p.module for p in exported if not p.layout.is_known and _CONVOLUTION.search(p.module)]:
        raise ValueError(
            f"{unclear[0]} may be a convolution, and {updates.method} does not tell its kernel: it cannot be "
            "written as LoRA."
        )
    largest = max(part.rank for part in exported)
    dtype = dtype or stored_dtype(file)
    tensors = dict(file.others)
    for part in exported:
        rank = largest if pad else part.rank
        A, B = (matrix.to(dtype).contiguous() for matrix in padded_factors(part, rank))
        tensors |= _named(file, part.module, A, B, rank)
    with replacing(path) as partial:
        save_file(tensors, partial, metadata=_metadata(file, exported, largest if pad else None))


def free_file(output: str | os.PathLike[str]) -> Path:
    """The file to write, if it is free.

    Raises:
        FileExistsError: it exists.
        ValueError: its name does not end as it must, or its folder is not there.

    """
    path = Path(output)
    if path.suffix != ".safetensors":
        raise ValueError(f"A single file is compressed into one: output must end in .safetensors, and is {output}.")
    if path.exists():
        raise FileExistsError(f"The output file {path} exists. Give another one, or remove it.")
    if not path.absolute().parent.is_dir():
        raise ValueError(f"The folder {path.parent} for {path.name} does not exist.")
    return path


def _named(file: SingleFile, module: str, A: Tensor, B: Tensor, rank: int) -> dict[str, Tensor]:
    down, up = file.styles.get(module, KOHYA_STYLE)
    if module not in file.alphas and (down, up) != KOHYA_STYLE:
        return {f"{module}{down}": A, f"{module}{up}": B}
    # One α for all: diffusers loses those of single modules.
    key = file.alphas[module][0] if module in file.alphas else f"{module}.alpha"
    return {f"{module}{down}": A, f"{module}{up}": rank * B, key: torch.tensor(1.0)}


def _metadata(file: SingleFile, exported: Sequence[Factors], padded: int | None) -> dict[str, str]:
    dropped = ("sshs_model_hash", "sshs_legacy_hash", METADATA_KEY)
    metadata = {key: value for key, value in file.metadata.items() if key not in dropped}
    ranks = {part.rank for part in exported} if padded is None else {padded}
    rank = str(*ranks) if len(ranks) == 1 else "Dynamic"  # as kohya's own tool calls it
    values = {"ss_network_dim": rank, "ss_network_alpha": "1.0"}
    return metadata | {key: value for key, value in values.items() if key in metadata}
