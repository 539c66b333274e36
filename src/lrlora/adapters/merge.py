"""Merging the learned update into the base model: a full model without an adapter."""

from __future__ import annotations

import os
import warnings
from collections import Counter
from typing import Any

import torch
from peft.tuners.trainable_tokens import TrainableTokensLayer
from peft.tuners.tuners_utils import BaseTunerLayer

from ..files import free_folder, replacing_folder
from ..lora.factors import require_finite
from ..run_folder import hand_on_reading
from ..tuner import LrLoraLayer
from .card import merged_card
from .loading import load_adapted, load_processor
from .peft_folder import AdapterSource, SavedAdapter


def merge_adapter(
    adapter: AdapterSource,
    output: str | os.PathLike[str],
    *,
    base: str | os.PathLike[str] | None = None,
    dtype: torch.dtype | None = None,
    dequantize: bool = False,
    max_shard_size: str = "5GB",
    progressbar: bool = False,
) -> None:
    """Write the base model with the adapter merged, and the tokenizer, in `from_pretrained` format.

    Merges layer by layer: at most one layer's update is in memory besides the model.

    Args:
        adapter: folder or hub name of a saved adapter, or `SavedAdapter`.
        output: output folder; must be empty or missing. Written atomically.
        base: base model (folder or hub name); default: the one named by the adapter.
        dtype: dtype of the model; default: that of the base model's files.
        dequantize: dequantize a base model that is stored quantized, which cannot be merged otherwise.
        max_shard_size: maximum size of a weights file.
        progressbar: show a progress bar.

    Raises:
        FileExistsError: the output folder is not empty.
        FileNotFoundError: the base model is missing.
        ValueError: the adapter does not fit or adapts tied weights, the base model is quantized, or merged weights are
            not finite.

    """
    folder, saved = free_folder(output), SavedAdapter.read(adapter).on_base(base)
    model = load_adapted(saved, dtype=dtype or "auto")
    if is_quantized := getattr(model.config, "quantization_config", None) is not None:
        if not dequantize:
            raise ValueError(
                f"The base model {model.config.name_or_path} is stored quantized. Dequantize it (dequantize=True, "
                "--dequantize), or pass the original as base (base=, --base)."
            )
        _dequantize(model)
    _require_untied(model)
    merged = model.merge_and_unload(progressbar=progressbar, safe_merge=True)
    for name, parameter in merged.named_parameters():
        require_finite(name, parameter)
    with replacing_folder(folder) as partial:
        # The names of the model, not of its checkpoint: transformers 5.23 cannot revert a quantizer's conversion.
        merged.save_pretrained(partial, max_shard_size=max_shard_size, save_original_format=not is_quantized)
        processor = load_processor(saved.name, str(saved.base_model))
        if processor is not None:
            processor.save_pretrained(partial)
        else:
            warnings.warn(
                f"The model is saved without a tokenizer or processor: neither {saved.name} nor {saved.base_model} has "
                "one.",
                stacklevel=2,
            )
        (partial / "README.md").write_text(merged_card(saved), encoding="utf-8")
        hand_on_reading(saved.name, partial)


def _require_untied(model: Any) -> None:
    """Refuse adapters on weights that another module uses too, such as tied embeddings: merging would change both.

    Trained tokens pass if PEFT trains them in all of these modules; it leaves out the bias of a linear one.
    """
    names: dict[int, list[str]] = {}
    for name, parameter in model.get_base_model().named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name.replace(".base_layer.", "."))
    layers = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
    tokens = [layer for layer in layers if isinstance(layer, TrainableTokensLayer)]
    followers = Counter(
        id(layer.weight)
        for layer in tokens
        if layer.tied_adapter is not None and getattr(layer.base_layer, "bias", None) is None
    )
    for layer in layers:
        base = layer.get_base_layer()
        weight = id(getattr(getattr(base, "token_adapter", base), "weight", None))  # tokens may be trained below LoRA
        shared = names.get(weight, [])
        if len(shared) > 1 and not (layer in tokens and followers[weight] == len(shared) - 1):
            raise ValueError(
                f"The adapter changes {shared[0]}, which is tied to {shared[1]}: merged, it would change both. Use the "
                "adapter unmerged, or export it (lrlora export)."
            )


def _dequantize(model: Any) -> None:
    """Dequantize the base layers under the adapters."""
    layers = [layer for layer in model.modules() if isinstance(layer, LrLoraLayer)]
    if not layers:
        raise ValueError("Only LR-LoRA adapters can be merged into a base model that is stored quantized.")
    model.get_base_model().dequantize()
    for layer in layers:
        layer.quantization_backend = None
