"""A plain LoRA of a live PEFT model as factors, and its replacement by smaller ones, in place."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from peft import LoraConfig, PeftModel
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from ..naming import PEFT_PREFIX
from .export import lora_config
from .factorize import Factors
from .update import CHANGING_STARTS, Layout

_DOWN = (nn.Linear, _ConvNd)  # supported as lora_A
# Fields of LoraConfig that a replacement does not support.
_UNSUPPORTED = (
    *("use_dora", "lora_bias", "bias", "use_qalora", "use_bdlora", "alora_invocation_tokens", "layer_replication"),
    *("target_parameters", "arrow_config", "kasa_config", "velora_config", "monteclora_config"),
)


def require_plain_lora(model: Any) -> str:
    """Name of the adapter, which can be replaced.

    Raises:
        ValueError: the model has no adapter, or one that cannot be replaced.

    """
    if hasattr(model, "_orig_mod"):
        raise ValueError("Learned ranks do not support torch.compile(model). Pass the model that was compiled.")
    if not isinstance(model, PeftModel):
        raise ValueError("Learned ranks need a PEFT model with LoRA. Wrap the model with get_peft_model.")
    (adapter, *others) = model.active_adapters
    config = model.peft_config[adapter]
    if others or type(config) is not LoraConfig:
        found = ", ".join(f"{name} ({type(model.peft_config[name]).__name__})" for name in model.active_adapters)
        raise ValueError(f"Learned ranks need one active LoRA adapter, got {found}.")
    for name in _UNSUPPORTED:
        if (value := getattr(config, name, None)) and value != "none":
            raise ValueError(f"Learned ranks do not support {name}={value!r}. Remove it.")
    if str(config.init_lora_weights).startswith(CHANGING_STARTS):
        raise ValueError(
            f"Learned ranks do not support init_lora_weights={config.init_lora_weights!r}, which changes the base "
            "weights. Remove it."
        )
    for path, layer in lora_layers(model, adapter).items():
        _require_plain(path, layer, adapter)
    return adapter


def _require_plain(path: str, layer: Any, adapter: str) -> None:
    base = layer.get_base_layer()
    is_whole = not isinstance(base, nn.MultiheadAttention) and getattr(base, "groups", 1) == 1
    if layer.merged or not is_whole or not isinstance(dict(layer.lora_A.items()).get(adapter), _DOWN):
        raise ValueError(
            "Learned ranks need an unmerged LoRA on linear layers and convolutions without groups, but "
            f"{path} has another. Leave it out of target_modules."
        )
    if not all(weight.requires_grad for weight in lora_weights(layer, adapter)):
        raise ValueError(f"Learned ranks need trainable LoRA weights, but those of {path} are frozen.")
    if layer.scaling[adapter] <= 0:
        raise ValueError(f"Learned ranks need lora_alpha > 0, got {layer.lora_alpha[adapter]} for {path}.")


def lora_layers(model: PeftModel, adapter: str) -> dict[str, LoraLayer]:
    """Layers with the adapter, by their path in the base model."""
    base = model.get_base_model()
    layers = {path: layer for path, layer in base.named_modules() if isinstance(layer, LoraLayer)}
    return {path: layer for path, layer in layers.items() if adapter in layer.r}


def lora_weights(layer: Any, adapter: str) -> tuple[nn.Parameter, nn.Parameter]:
    """The parameters A and B."""
    return layer.lora_A[adapter].weight, layer.lora_B[adapter].weight


def lora_factors(model: PeftModel, adapter: str) -> list[Factors]:
    """ΔW of each layer as its own factors, s·B and A, on the CPU."""
    return [_factors(path, layer, adapter) for path, layer in lora_layers(model, adapter).items()]


def _factors(path: str, layer: Any, adapter: str) -> Factors:
    down, up, scaling = layer.lora_A[adapter], layer.lora_B[adapter], layer.scaling[adapter]
    A, B = (part.weight.detach().float().cpu().flatten(1) for part in (down, up))
    B = scaling * B
    energy = ((B.double().T @ B.double()) * (A.double() @ A.double().T)).sum().item()
    layout = Layout(kernel=tuple(down.kernel_size)) if isinstance(down, _ConvNd) else Layout()
    return Factors(path, A, B, len(A), scaling, layout, energy, stable_rank=math.nan, kept=1.0)


def resize(model: PeftModel, adapter: str, factors: Sequence[Factors], optimizer: Any = None) -> None:
    """Replace a LoRA by these factors in place, in model and optimizer, with the same scaling.

    The parameters stay the same objects, with other shapes and without gradients. Modules of rank 0 leave the adapter
    and the optimizer, which begins with no state for the others. The model gets a configuration of its own: the given
    one may serve other models.
    """
    tuner: Any = model.base_model
    layers, base = lora_layers(model, adapter), model.get_base_model()
    config: Any = copy.copy(model.peft_config[adapter])
    new = lora_config(factors, like=config, keep_scaling=True)
    removed: set[int] = set()
    for part in factors:
        layer: Any = layers[part.module]
        down, up = layer.lora_A[adapter], layer.lora_B[adapter]
        if optimizer is not None:
            for weight in (down.weight, up.weight):
                optimizer.state.pop(weight, None)
        if not part.rank:
            removed |= {id(down.weight), id(up.weight)}
            down.weight.grad = up.weight.grad = None
            tuner.targeted_module_names.remove(part.module)
            if len(layer.r) > 1:
                layer.delete_adapter(adapter)
            else:
                parent, _, name = part.module.rpartition(".")
                setattr(base.get_submodule(parent), name, layer.get_base_layer())
            continue
        for module, value in zip((down, up), part.padded(part.rank), strict=True):
            _set(module.weight, (value / part.scaling**0.5).to(module.weight).contiguous())
        is_conv = isinstance(down, _ConvNd)
        setattr(down, "out_channels" if is_conv else "out_features", part.rank)
        setattr(up, "in_channels" if is_conv else "in_features", part.rank)
        layer.r[adapter], layer.lora_alpha[adapter] = part.rank, part.scaling * part.rank
    for name in ("r", "lora_alpha", "target_modules", "exclude_modules", "rank_pattern", "alpha_pattern"):
        setattr(config, name, getattr(new, name))
    config.use_rslora, config.layers_to_transform, config.layers_pattern = False, None, None
    config.init_lora_weights = True  # others, such as orthogonal, may not allow these ranks when PEFT loads them
    model.peft_config[adapter] = config
    for group in () if optimizer is None else optimizer.param_groups:
        group["params"] = [p for p in group["params"] if id(p) not in removed]


def _set(parameter: nn.Parameter, value: Tensor) -> None:
    """Give a parameter other values, of another shape.

    While the loss of a step is alive, autograd keeps the gradient accumulator of the parameter, with the old shape. A
    change of the dtype replaces it.
    """
    parameter.grad = None
    parameter.data = value.to(torch.float16 if value.dtype != torch.float16 else torch.float32)
    parameter.data = value


def fit_to_checkpoint(model: Any, state: Mapping[str, Tensor], prefix: str, *args: Any) -> None:
    """Resize the adapter to a checkpoint with smaller ranks, before PEFT loads it.

    Raises:
        ValueError: the checkpoint has larger ranks.

    """
    adapter = model.active_adapters[0]
    key = f"{prefix}{PEFT_PREFIX}{{}}.lora_A.{adapter}.weight"
    ending = f".lora_A.{adapter}.weight"
    if not any(name.endswith(ending) for name in state):
        return
    whole = lora_factors(model, adapter)
    ranks = {part.module: len(state.get(key.format(part.module), ())) for part in whole}
    known = sum(name.endswith(ending) for name in state)
    if known > sum(map(bool, ranks.values())) or any(ranks[part.module] > part.rank for part in whole):
        raise ValueError("The checkpoint is from before the cut, and cannot be loaded after it.")
    if any(ranks[part.module] != part.rank for part in whole):
        cut = [replace(p, A=p.A[: ranks[p.module]], B=p.B[:, : ranks[p.module]]) for p in whole]
        resize(model, adapter, cut)
