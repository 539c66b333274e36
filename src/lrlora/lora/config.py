"""Configurations of LoRA: what one of them changes besides s·BA, and that of given ranks."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

from peft import LoraConfig

from ..naming import pattern_of
from .factors import Factors

# Initializations of LoRA that subtract the initial BA from the base weight: s·BA is not the full update.
_CHANGING_STARTS = ("pissa", "olora", "corda", "loftq", "lora_ga")
_REPRODUCIBLE_STARTS = ("pissa", "olora")  # "pissa_niter_4" is a randomized SVD, another one each time
# LoRA options whose update is more than s·BA.
_VARIANTS = ("use_qalora", "use_bdlora", "monteclora_config", "kasa_config", "arrow_config")
# Fields that a plain LoRA takes over from another adapter.
_INHERITED = (
    *("base_model_name_or_path", "revision", "task_type", "auto_mapping", "modules_to_save"),
    *("layer_replication", "trainable_token_indices", "alora_invocation_tokens"),
)


def changes_base(config: Any) -> bool:
    """Whether the initialization of a LoRA changes the base weights."""
    return _start_of(config).startswith(_CHANGING_STARTS)


def _start_of(config: Any) -> str:
    """Name of the initialization, in lower case: PEFT reads "OLoRA" as "olora"."""
    return str(getattr(config, "init_lora_weights", None)).lower()


def variant_option(config: Any) -> str | None:
    """Option by which a LoRA changes its modules by more than s·BA, besides DoRA's magnitudes; None without one."""
    variant = next((option for option in _VARIANTS if getattr(config, option, None)), None)
    return "init_lora_weights" if changes_base(config) else variant


def require_reproducible_start(config: Any, name: str) -> None:
    """Raise ValueError if training began by changing the base weights in a way that loading cannot repeat.

    Args:
        config: configuration of an adapter.
        name: its folder or hub name.

    """
    if changes_base(config) and _start_of(config) not in _REPRODUCIBLE_STARTS:
        raise ValueError(
            f"{name} uses init_lora_weights={config.init_lora_weights!r}, whose change to the base weights cannot be "
            "reproduced. Save it as a plain LoRA with PEFT's path_initial_model_for_weight_conversion, or train with "
            "'pissa'."
        )


def require_exportable(config: Any) -> None:
    """Raise ValueError for a configuration of which no plain LoRA can be made."""
    if getattr(config, "lora_bias", False):
        raise ValueError(
            "Adapters with lora_bias=True cannot be exported. Load them with PEFT, or merge them if the adapted layers "
            "have a bias."
        )


def lora_config(factors: Sequence[Factors], like: Any, *, keep_scaling: bool = False) -> LoraConfig:
    """Configuration of a plain LoRA with the ranks of `factors`.

    `r` is the largest rank; other ranks go into `rank_pattern`, and their `lora_alpha` into `alpha_pattern`, so that
    α/r is the same everywhere, even for servers that read only `r` and `lora_alpha`.

    Args:
        factors: result of `factorize`; modules of rank 0 are omitted.
        like: configuration of the adapter, which provides base model, task and fully trained parts.
        keep_scaling: keep each module's α/r and dropout, for training; by default α/r is 1, as the factors require.

    Raises:
        ValueError: no module has a rank.

    """
    ranks = {pair.module: pair.rank for pair in factors}
    scaling = {pair.module: pair.scaling for pair in factors} if keep_scaling else None
    parameters = [pair.module for pair in factors if pair.layout.stack is not None]
    return config_of_ranks(ranks, scaling, like, parameters=parameters)


def config_of_ranks(
    ranks: Mapping[str, int],
    scaling: Mapping[str, float] | None,
    like: Any,
    modules: Iterable[str] = (),
    parameters: Sequence[str] = (),
) -> LoraConfig:
    """`lora_config` of these ranks; without `scaling`, α/r is 1. PEFT must not adapt `modules`, further paths.

    `parameters` are paths in `ranks` that are not modules.
    """
    adapted = {module: rank for module, rank in ranks.items() if rank}
    if not adapted:
        raise ValueError("No module has a rank: there is nothing to export.")
    largest = max(adapted, key=adapted.__getitem__)
    alphas: dict[str, Any] = {module: (scaling[module] if scaling else 1.0) * rank for module, rank in adapted.items()}
    bias: Any = getattr(like, "bias", "none")
    return LoraConfig(
        r=adapted[largest],
        lora_alpha=alphas[largest],
        lora_dropout=getattr(like, "lora_dropout", 0.0) if scaling else 0.0,
        target_modules=_targets([path for path in adapted if path not in parameters], [*modules, *ranks], like),
        target_parameters=list(parameters) or None,
        rank_pattern={pattern_of(m, adapted): rank for m, rank in adapted.items() if rank != adapted[largest]},
        alpha_pattern={pattern_of(m, adapted): alpha for m, alpha in alphas.items() if alpha != alphas[largest]},
        bias=bias if bias in ("none", "all") else "lora_only",
        **{name: getattr(like, name) for name in _INHERITED if hasattr(like, name)},
    )


def _targets(adapted: Collection[str], modules: Iterable[str], like: Any) -> list[str] | str:
    """Names of the kept modules; as a pattern where PEFT, which also matches the end of a path, would find others."""
    is_by_name = not isinstance(getattr(like, "target_modules", None), str) and not any(
        getattr(like, field, None) for field in ("exclude_modules", "layers_to_transform")
    )
    # No other module is likely to end in a whole path.
    is_plain = is_by_name or all("." in module for module in adapted)
    unadapted = set(modules).difference(adapted)
    if is_plain and not any(path[dot.end() :] in adapted for path in unadapted for dot in re.finditer(r"\.", path)):
        return list(adapted)
    return "|".join(map(re.escape, adapted))
