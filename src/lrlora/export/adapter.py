"""The learned update as an ordinary PEFT LoRA adapter, which needs no lrlora to load."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from peft import LoraConfig
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors.torch import save_file
from torch import Tensor

from ..files import free_folder, replacing_folder
from ..naming import PEFT_PREFIX
from ..saved import AdapterSource, SavedAdapter
from ..tuner.config import pattern_of
from .factorize import Factors, kept_energy
from .loading import load_adapted, sample_inputs, save_preprocessing

_CARD = """---
base_model: {base}
library_name: peft
tags: [lora]
---

# LoRA adapter

Exported by [lrlora](https://pypi.org/project/lrlora) from an LR-LoRA adapter (arXiv:2606.04325): {ranks} ranks in
{modules} modules, {parameters:,} parameters, {kept:.4%} of the energy of the learned update. It is an ordinary LoRA
adapter and loads with PEFT alone. `lora_alpha` equals `r`, so that the scaling is 1.
"""


def lora_config(factors: Sequence[Factors], like: Any, *, keep_scaling: bool = False) -> LoraConfig:
    """The configuration of a plain LoRA with the ranks of `factors`.

    The largest rank is its `r`; modules of another rank are in `rank_pattern`, and their `lora_alpha` in
    `alpha_pattern`, so that α/r is the same everywhere, also for servers that read `r` and `lora_alpha` alone.

    Args:
        factors: as `factorize` returns them; modules of rank 0 are left out.
        like: `LrLoraConfig` of the adapter, whose base model, task, and fully trained parts are taken over.
        keep_scaling: α/r and dropout that each module was trained with, to train with; else 1, which the factors
            themselves are made for.

    Raises:
        ValueError: no module has a rank.

    """
    ranks = {part.module: part.rank for part in factors if part.rank}
    if not ranks:
        raise ValueError("No module has a rank: there is nothing to export.")
    scaling = {part.module: part.scaling if keep_scaling else 1.0 for part in factors if part.rank}
    largest = max(ranks, key=ranks.__getitem__)
    alphas = {module: scaling[module] * rank for module, rank in ranks.items()}
    kept = ("base_model_name_or_path", "revision", "task_type", "auto_mapping", "modules_to_save", "bias")
    fields: dict[str, Any] = {name: getattr(like, name) for name in (*kept, "trainable_token_indices")}
    fields["lora_alpha"] = alphas[largest]
    if keep_scaling:
        fields["lora_dropout"] = like.lora_dropout
    return LoraConfig(
        r=ranks[largest],
        target_modules=list(ranks),
        rank_pattern={pattern_of(m, ranks): rank for m, rank in ranks.items() if rank != ranks[largest]},
        alpha_pattern={pattern_of(m, ranks): alpha for m, alpha in alphas.items() if alpha != alphas[largest]},
        **fields,
    )


def save_as_lora(
    factors: Sequence[Factors],
    adapter: AdapterSource,
    output: str | os.PathLike[str],
    *,
    dtype: torch.dtype = torch.float32,
    pad: bool = False,
) -> None:
    """Write a LoRA adapter with these factors, and with all else that was trained: heads, biases, token embeddings.

    Args:
        factors: as `factorize` returns them.
        adapter: the LR-LoRA adapter that they come from: folder, hub name, or what was read there.
        output: folder to write; it must be empty or not exist. It is there whole or not at all.
        dtype: of the factors.
        pad: give all modules the largest rank, with zeros, for programs that know only one (llama.cpp divides
            `lora_alpha` by each matrix's own rank).

    Raises:
        FileExistsError: the output folder is not empty.
        ValueError: no module has a rank.

    """
    folder = free_folder(output)
    exported = [part for part in factors if part.rank]
    saved = SavedAdapter.read(adapter)
    config = lora_config(exported, saved.config)
    config.inference_mode = True
    if pad:
        config.rank_pattern, config.alpha_pattern = {}, {}
    left_out = tuple(f"{PEFT_PREFIX}{part.module}.base_layer." for part in factors if not part.rank)
    weights = {
        # A module without an adapter of its own is not wrapped when this is loaded.
        key.replace(".base_layer.", ".") if key.startswith(left_out) else key: value
        for key, value in saved.weights.items()
        if ".lrlora_" not in key
    }
    for part in exported:
        rank = config.r if pad else part.rank
        weights[f"{PEFT_PREFIX}{part.module}.lora_A.weight"] = _padded(part.A.T, rank).T.to(dtype).contiguous()
        weights[f"{PEFT_PREFIX}{part.module}.lora_B.weight"] = _padded(part.B, rank).to(dtype).contiguous()
    card = _CARD.format(
        base=config.base_model_name_or_path,
        ranks=sum(part.rank for part in exported),
        modules=len(exported),
        parameters=sum(part.parameters for part in exported),
        kept=kept_energy(factors),
    )
    with replacing_folder(folder) as partial:
        save_file(weights, partial / SAFETENSORS_WEIGHTS_NAME, metadata={"format": "pt"})
        save_preprocessing(partial, saved.name)
        config.save_pretrained(str(partial))
        (partial / "README.md").write_text(card, encoding="utf-8")


def save_lora_config(factors: Sequence[Factors], adapter: AdapterSource, output: str | os.PathLike[str]) -> None:
    """Write the configuration alone, for training plain LoRA at these ranks: `LoraConfig.from_pretrained(output)`.

    Args:
        factors: as `factorize` returns them.
        adapter: the LR-LoRA adapter that they come from: folder, hub name, or what was read there.
        output: folder to write; it must be empty or not exist.

    Raises:
        FileExistsError: the output folder is not empty.
        ValueError: no module has a rank.

    """
    folder = free_folder(output)
    config = lora_config(factors, SavedAdapter.read(adapter).config, keep_scaling=True)
    with replacing_folder(folder) as partial:
        config.save_pretrained(str(partial))


def _padded(matrix: Tensor, columns: int) -> Tensor:
    return torch.nn.functional.pad(matrix, (0, columns - matrix.shape[1]))


@dataclass(frozen=True)
class OutputDifference:
    """How far an exported adapter's outputs are from the original's, on random inputs.

    Attributes:
        relative: ‖h − h′‖ / ‖h − h₀‖, with h and h′ the last hidden states of original and export, h₀ of the base
            model: the share of the adapter's effect that is lost.
        largest: the largest difference of any logit; None if the model has no head.

    """

    relative: float
    largest: float | None


@torch.no_grad()
def output_difference(adapter: AdapterSource, exported: AdapterSource) -> OutputDifference:
    """Run base model, original and exported adapter on the same random inputs, in float32.

    Raises:
        FileNotFoundError: the base model is not there.
        ValueError: an adapter does not fit it, or there are no sample inputs for it.

    """
    original = load_adapted(adapter, dtype=torch.float32).eval()
    inputs = sample_inputs(original.get_base_model())
    with original.disable_adapter():
        base, _ = _outputs(original, inputs)
    hidden, logits = _outputs(original, inputs)
    del original
    exported_hidden, exported_logits = _outputs(load_adapted(exported, dtype=torch.float32).eval(), inputs)
    effect = (hidden - base).norm().item()
    return OutputDifference(
        relative=(hidden - exported_hidden).norm().item() / effect if effect > 0 else 0.0,
        largest=None if logits is None or exported_logits is None else (logits - exported_logits).abs().max().item(),
    )


def _outputs(model: Any, inputs: dict[str, Tensor]) -> tuple[Tensor, Tensor | None]:
    outputs = model(**inputs, output_hidden_states=True)
    states = getattr(outputs, "decoder_hidden_states", None) or outputs.hidden_states
    return states[-1], getattr(outputs, "logits", None)
