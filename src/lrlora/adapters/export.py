"""Export of the learned update as a plain LoRA, which loads without lrlora."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors.torch import save_file
from torch import Tensor

from ..checks import require_known
from ..files import free_folder, replacing_folder
from ..lora.config import lora_config, require_exportable
from ..lora.factors import Factors, require_finite
from ..naming import PEFT_PREFIX
from ..run_folder import hand_on_reading
from .card import adapter_card
from .factorize import kept_energy
from .loading import check_layers, load_processor
from .lora_file import SingleFile, save_single_file
from .peft_folder import MODEL_CONFIG, AdapterSource, SavedAdapter
from .servers import ONE_ALPHA, SERVERS, served
from .update import Updates, as_stored


def save_as_lora(
    factors: Sequence[Factors],
    source: AdapterSource | Updates,
    output: str | os.PathLike[str],
    *,
    dtype: torch.dtype | None = None,
    server: str = "peft",
) -> None:
    """Write a LoRA adapter with these factors and all other trained weights: heads, biases, token embeddings.

    A DoRA adapter keeps its magnitudes and stays DoRA.

    Args:
        factors: result of `factorize`.
        source: original adapter: folder, hub name, or `SavedAdapter`; or its `Updates`.
        output: output folder; must be empty or missing. Written atomically.
        dtype: dtype of the factors; default: that of the source.
        server: name in `SERVERS` of the program that reads it.

    Raises:
        FileExistsError: the output folder is not empty.
        ValueError: no module has a rank; an adapter has a bias on B, or is a single file; or the server cannot read it.

    """
    require_known("server", server, SERVERS)
    folder = free_folder(output)
    updates = source if isinstance(source, Updates) else None
    origin: Any = SavedAdapter.read(source) if not isinstance(source, Updates) else source.origin
    like = origin.config  # which a single file has not
    require_exportable(like)
    if updates is not None:
        try:
            check_layers(updates)
        except FileNotFoundError:  # the names are all there is
            check_layers(updates, by_name=True)
    # With magnitudes, updates of DoRA are not products: these are only of its direction.
    keeps_magnitudes = bool(getattr(like, "use_dora", False)) if updates is None else updates.have_magnitudes
    if keeps_magnitudes:
        factors = [pair.padded(1) for pair in factors]  # the magnitude may be trained even if BA is 0
    _require_wrappers(factors)
    padded = SERVERS[server].padded(factors)
    exported = [pair for pair in padded if pair.rank]
    config = lora_config(padded, like)
    config.inference_mode, config.use_dora = True, keeps_magnitudes
    config.base_model_name_or_path = like.base_model_name_or_path or origin.base
    weights = _other_weights(origin, padded, with_magnitudes=keeps_magnitudes)
    SERVERS[server].require_readable(config, weights)
    if SERVERS[server].form == ONE_ALPHA:
        config.lora_alpha, config.alpha_pattern = 1, {}
        exported = [replace(pair, B=pair.rank * pair.B) for pair in exported]
    ranks = [(pair.rank, pair.parameters_per_rank) for pair in factors]
    line = served(ranks, config, None if server == "peft" else server, weights)
    for pair in exported:
        weights |= _tensors(pair, dtype or origin.stored_dtype)
    method = "an adapter" if updates is None else updates.method
    sections = ["# LoRA adapter", _summary(factors, exported, method), *([line] if line else [])]
    card = adapter_card(origin, ["lora", "lrlora", "transformers"], sections)
    with replacing_folder(folder) as partial:
        save_file(weights, partial / SAFETENSORS_WEIGHTS_NAME, metadata={"format": "pt"})
        if (processor := load_processor(origin.name)) is not None:
            processor.save_pretrained(partial)
        config.save_pretrained(str(partial))
        if (Path(origin.name) / MODEL_CONFIG).is_file():
            shutil.copyfile(Path(origin.name) / MODEL_CONFIG, partial / MODEL_CONFIG)
        hand_on_reading(origin.name, partial)
        (partial / "README.md").write_text(card, encoding="utf-8")


def save(
    factors: Sequence[Factors],
    updates: Updates,
    output: str | os.PathLike[str],
    *,
    dtype: torch.dtype | None = None,
    server: str = "peft",
) -> int:
    """Write a LoRA with these factors: a single file with its original keys, or a PEFT folder.

    Args:
        factors: result of `factorize`.
        updates: updates that were factorized.
        output: file or folder to write; must not exist. Written atomically.
        dtype: dtype of the factors; default: as stored.
        server: see `save_as_lora`; for a single file "peft" or "hot-swap".

    Returns:
        Number of bytes of the weights written.

    Raises:
        FileExistsError: the output exists.
        ValueError: no module has a rank; see also `save_as_lora` and `save_single_file`.

    """
    path = Path(output)
    if isinstance(updates.origin, SingleFile):
        require_known("server of a single file", server, ("peft", "hot-swap"))
        save_single_file(factors, updates, path, dtype=dtype, pad=server == "hot-swap")
        return path.stat().st_size
    save_as_lora(factors, updates, path, dtype=dtype, server=server)
    return (path / SAFETENSORS_WEIGHTS_NAME).stat().st_size


def _other_weights(origin: SavedAdapter, padded: Sequence[Factors], *, with_magnitudes: bool) -> dict[str, Tensor]:
    """Trained weights besides the factors, by keys of the export, where modules without a rank are not wrapped."""
    unwrapped = tuple(f"{PEFT_PREFIX}{pair.module}.base_layer." for pair in padded if not pair.rank)
    weights = {
        key.replace(".base_layer.", ".") if key.startswith(unwrapped) else key: value
        for key, value in origin.other_weights(with_magnitudes=with_magnitudes).items()
    }
    for key, value in weights.items():
        require_finite(key, value)
    return weights


def _require_wrappers(factors: Sequence[Factors]) -> None:
    """Raise ValueError if an outer wrapper is missing: PEFT would look in its place for the factors of the inner."""
    modules = {pair.layout.stack.module for pair in factors if pair.layout.stack is not None}
    for module in modules:
        if module.endswith(".base_layer") and module.removesuffix(".base_layer") not in modules:
            raise ValueError(
                f"The factors of {module.removesuffix('.base_layer')} are missing, around {module}. Pass those of all "
                "parameters, as factorize returns them."
            )


def _tensors(pair: Factors, dtype: torch.dtype) -> dict[str, Tensor]:
    """Tensors of a module under PEFT's names, in PEFT's shapes."""
    names = ("embedding_A", "embedding_B") if pair.layout.is_embedding else ("A.weight", "B.weight")
    module = pair.module if pair.layout.stack is None else pair.layout.stack.module
    return {
        f"{PEFT_PREFIX}{module}.lora_{name}": as_stored(pair.module, weight, dtype)
        for name, weight in zip(names, pair.weights, strict=True)
    }


def _summary(factors: Sequence[Factors], exported: Sequence[Factors], method: str) -> str:
    """Paragraph of a card: what the LoRA was made from, its size, and what it keeps."""
    return (
        f"Made by lrlora ([LR-LoRA](https://arxiv.org/abs/2606.04325)) from {method}: "
        f"{sum(pair.rank for pair in exported)} ranks in {len(exported)} modules,\n"
        f"{sum(pair.parameters for pair in exported):,} parameters, {kept_energy(factors):.4%} of the energy of the "
        "update. It is an ordinary LoRA adapter and loads with PEFT\nalone."
    )
