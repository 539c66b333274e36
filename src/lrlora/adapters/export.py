"""Export of the learned update as a plain PEFT LoRA, which loads without lrlora."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors.torch import save_file
from torch import Tensor

from ..checks import require_known
from ..files import free_folder, replacing_folder
from ..naming import PEFT_PREFIX, pattern_key
from ..tuner.config import pattern_of
from .card import ASKING, MODEL_CONFIG, header, is_asked_in_chats, loading
from .factorize import Factors, kept_energy
from .loading import check_base, check_names, load_adapted, sample_inputs, save_preprocessing
from .lora_file import SingleFile, save_single_file
from .peft_folder import AdapterSource, SavedAdapter
from .servers import ONE_ALPHA, SERVERS, served
from .update import Updates, as_stored, require_finite

_CARD = """# LoRA adapter

Made by lrlora ([LR-LoRA](https://arxiv.org/abs/2606.04325)) from {method}: {ranks} ranks in {modules} modules,
{parameters:,} parameters, {kept:.4%} of the energy of the update. It is an ordinary LoRA adapter and loads with PEFT
alone.

"""


_TAGS = ["lora", "lrlora", "transformers"]


def lora_config(factors: Sequence[Factors], like: Any, *, keep_scaling: bool = False) -> LoraConfig:
    """Configuration of a plain LoRA with the ranks of `factors`.

    `r` is the largest rank; other ranks go into `rank_pattern`, and their `lora_alpha` into `alpha_pattern`, so that
    α/r is the same everywhere, even for servers that read only `r` and `lora_alpha`.

    Args:
        factors: result of `factorize`; modules of rank 0 are omitted.
        like: configuration of the adapter, which provides base model, task and fully trained parts.
        keep_scaling: keep each module's α/r and dropout, for training; by default α/r is 1, as the factors require.

    Raises:
        ValueError: no module has a rank, or PEFT cannot tell a module from another by its name.

    """
    ranks = {part.module: part.rank for part in factors}
    scaling = {part.module: part.scaling for part in factors} if keep_scaling else None
    return config_of_ranks(ranks, scaling, like)


def config_of_ranks(
    ranks: Mapping[str, int], scaling: Mapping[str, float] | None, like: Any, modules: Iterable[str] = ()
) -> LoraConfig:
    """`lora_config` of these ranks; without `scaling`, α/r is 1. PEFT must not adapt `modules`, further paths."""
    adapted = {module: rank for module, rank in ranks.items() if rank}
    if not adapted:
        raise ValueError("No module has a rank: there is nothing to export.")
    largest = max(adapted, key=adapted.__getitem__)
    alphas = {module: (scaling[module] if scaling else 1.0) * rank for module, rank in adapted.items()}
    inherited = ["base_model_name_or_path", "revision", "task_type", "auto_mapping", "modules_to_save"]
    inherited += ["layer_replication", "trainable_token_indices", "alora_invocation_tokens"]
    fields: dict[str, Any] = {name: getattr(like, name) for name in inherited if hasattr(like, name)}
    bias = getattr(like, "bias", "none")
    fields["bias"] = bias if bias in ("none", "all") else "lora_only"
    fields["lora_alpha"] = alphas[largest]
    if scaling:
        fields["lora_dropout"] = getattr(like, "lora_dropout", 0.0)
    config = LoraConfig(
        r=adapted[largest],
        target_modules=_targets(adapted, [*modules, *ranks], like),
        rank_pattern={pattern_of(m, adapted): rank for m, rank in adapted.items() if rank != adapted[largest]},
        alpha_pattern={pattern_of(m, adapted): alpha for m, alpha in alphas.items() if alpha != alphas[largest]},
        **fields,
    )
    _require_found(config, ranks)
    return config


def _targets(kept: Collection[str], modules: Iterable[str], like: Any) -> list[str] | str:
    """Names of the kept modules; as a pattern where PEFT, which also matches the end of a path, would find others."""
    is_by_name = not isinstance(getattr(like, "target_modules", None), str) and not any(
        getattr(like, field, None) for field in ("exclude_modules", "layers_to_transform")
    )
    is_plain = is_by_name or all("." in module for module in kept)  # no other module is likely to end in a whole path
    others = set(modules).difference(kept)
    if is_plain and not any(other[dot.end() :] in kept for other in others for dot in re.finditer(r"\.", other)):
        return list(kept)
    return "|".join(map(re.escape, kept))


def _require_found(config: LoraConfig, ranks: Mapping[str, int]) -> None:
    """Raise ValueError unless PEFT finds just the modules of this configuration, with their ranks."""
    patterns: dict[str, int] = config.rank_pattern or {}
    for module, rank in ranks.items():
        found = patterns.get(pattern_key(patterns, module), config.r)
        if bool(check_target_module_exists(config, module)) != (rank > 0) or rank not in (0, found):
            raise ValueError(f"PEFT would not load {module} as it is: its name matches that of another module.")


def require_exportable(config: Any) -> None:
    """Raise ValueError for a configuration of which no plain LoRA can be made."""
    if getattr(config, "lora_bias", False):
        raise ValueError(
            "Adapters with lora_bias=True cannot be exported. Load them with PEFT, or merge them if the adapted layers "
            "have a bias."
        )


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
        source: original adapter: folder, hub name, or `SavedAdapter`; or the `Updates` of an adapter or two
            checkpoints.
        output: output folder; must be empty or missing. Written atomically.
        dtype: dtype of the factors; default: that of the source.
        server: name in `SERVERS` of the program that reads it.

    Raises:
        FileExistsError: the output folder is not empty.
        ValueError: no module has a rank; an adapter has a bias on B, or is a single file; or the server cannot read it.

    """
    require_known("server", server, SERVERS)
    form = SERVERS[server].form
    folder = free_folder(output)
    origin = source.origin if isinstance(source, Updates) else SavedAdapter.read(source)
    like: Any = origin.config
    require_exportable(like)
    keeps_magnitudes = bool(getattr(like, "use_dora", False))
    if isinstance(source, Updates):
        try:
            check_base(source)
        except FileNotFoundError:  # the names are all there is
            check_names(source)
        # With magnitudes, updates of DoRA are not products: these are only of its direction.
        keeps_magnitudes = keeps_magnitudes and source.are_products
    if keeps_magnitudes:
        factors = [part.padded(1) for part in factors]  # the magnitude may be trained even if BA is 0
    written = SERVERS[server].formed(factors)
    exported = [part for part in written if part.rank]
    config = lora_config(written, like)
    config.inference_mode = True
    if isinstance(origin, SavedAdapter):
        config.base_model_name_or_path = like.base_model_name_or_path or origin.base
    config.use_dora = keeps_magnitudes
    if form == ONE_ALPHA:
        config.lora_alpha, config.alpha_pattern = 1, {}
        exported = [replace(part, B=part.rank * part.B) for part in exported]
    left_out = tuple(f"{PEFT_PREFIX}{part.module}.base_layer." for part in written if not part.rank)
    weights = {
        # On loading, a module without an adapter is not wrapped.
        key.replace(".base_layer.", ".") if key.startswith(left_out) else key: value
        for key, value in origin.other_weights(with_magnitudes=config.use_dora).items()
    }
    for key, value in weights.items():
        require_finite(key, value)
    SERVERS[server].require_readable(config, weights)
    dtype = dtype or origin.stored_dtype
    for part in exported:
        weights |= _tensors(part, dtype)
    method = source.method if isinstance(source, Updates) else "an adapter"
    card = _card(factors, exported, config, method, origin, server)
    with replacing_folder(folder) as partial:
        save_file(weights, partial / SAFETENSORS_WEIGHTS_NAME, metadata={"format": "pt"})
        save_preprocessing(partial, origin.name)
        config.save_pretrained(str(partial))
        has_classes = isinstance(origin, SavedAdapter) or like.task_type == "SEQ_CLS"
        if has_classes and (Path(origin.name) / MODEL_CONFIG).is_file():
            shutil.copyfile(Path(origin.name) / MODEL_CONFIG, partial / MODEL_CONFIG)
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


def _card(
    factors: Sequence[Factors],
    exported: Sequence[Factors],
    config: LoraConfig,
    method: str,
    origin: Any,
    server: str,
) -> str:
    text = _CARD.format(
        method=method,
        ranks=sum(part.rank for part in exported),
        modules=len(exported),
        parameters=sum(part.parameters for part in exported),
        kept=kept_energy(factors),
    )
    ranks = [(part.rank, part.parameters_per_rank) for part in factors]
    if line := served(ranks, config, None if server == "peft" else server):
        text += f"{line}\n\n"
    if not isinstance(origin, SavedAdapter):
        return header("peft", _TAGS) + text
    asking = f"\n{ASKING}" if is_asked_in_chats(origin) else ""
    return header("peft", _TAGS, origin) + text + loading(origin, needs_lrlora=False) + asking


def _tensors(part: Factors, dtype: torch.dtype) -> dict[str, Tensor]:
    """Tensors of a module under PEFT's names, in PEFT's shapes."""
    A, B = (as_stored(part.module, matrix, dtype) for matrix in part.weights)
    name = f"{PEFT_PREFIX}{part.module}.lora_"
    if part.layout.is_embedding:
        return {f"{name}embedding_A": B.T.contiguous(), f"{name}embedding_B": A.T.contiguous()}
    return {f"{name}A.weight": A, f"{name}B.weight": B}


@torch.no_grad()
def output_difference(adapter: AdapterSource, exported: AdapterSource) -> float:
    """Share of an adapter's effect that its export loses, on random inputs in float32.

    ‖h − h′‖ / ‖h − h₀‖, with the last hidden states h of the original, h′ of the export and h₀ of the base model.

    Raises:
        FileNotFoundError: the base model is missing.
        ValueError: an adapter does not fit it, or no sample inputs exist for it.

    """
    original = load_adapted(adapter, dtype=torch.float32).eval()
    inputs = sample_inputs(original.get_base_model())
    with original.disable_adapter():
        base = _last_hidden(original, inputs)
    hidden = _last_hidden(original, inputs)
    del original
    again = SavedAdapter.read(exported).on_base(SavedAdapter.read(adapter).base)
    difference = hidden - _last_hidden(load_adapted(again, dtype=torch.float32).eval(), inputs)
    effect = (hidden - base).norm().item()
    return difference.norm().item() / effect if effect > 0 else 0.0


def _last_hidden(model: Any, inputs: dict[str, Tensor]) -> Tensor:
    outputs = model(**inputs, output_hidden_states=True)
    return (getattr(outputs, "decoder_hidden_states", None) or outputs.hidden_states)[-1]
