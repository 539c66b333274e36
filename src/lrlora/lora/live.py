"""A plain LoRA of a live model: its factors, their replacement in place, and what is written of it.

A cut changes no shape. The directions that are kept come first; the other rows of A and columns of B are zero, and stay
so, since the gradient of a row of A needs its column of B and the reverse. What is saved leaves them out.
"""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Iterator, Mapping, MutableMapping, Sequence
from dataclasses import fields, replace
from types import NoneType
from typing import Any, cast

import torch
from peft import LoraConfig, PeftModel, PeftType
from peft.tuners.lora import Embedding, LoraLayer
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from ..sharding import full_value, write
from .config import changes_base, config_of_ranks
from .factors import Factors, Layout
from .host import active_adapters, base_of, prefix_of, saves_adapter

_DOWN = (nn.Linear, _ConvNd)  # supported as lora_A
# Fields of LoraConfig that a cut does not support.
_UNSUPPORTED = (
    *("use_dora", "lora_bias", "bias", "use_qalora", "use_bdlora", "alora_invocation_tokens", "layer_replication"),
    *("target_parameters", "arrow_config", "kasa_config", "velora_config", "monteclora_config"),
)


def require_plain_lora(model: Any) -> str:
    """Name of the adapter, which can be cut.

    Raises:
        ValueError: it cannot.

    """
    if not (active := active_adapters(model)):
        raise ValueError("Fitted ranks need an active LoRA adapter, but none is active. Call set_adapter.")
    adapter, *other_adapters = active
    config = model.peft_config[adapter]
    if other_adapters or not isinstance(config, LoraConfig) or config.peft_type != PeftType.LORA:
        configs = {name: type(model.peft_config[name]).__name__ for name in (adapter, *other_adapters)}
        adapters = ", ".join(f"{name} ({kind})" for name, kind in configs.items())
        raise ValueError(f"Fitted ranks need one active LoRA adapter, got {adapters}.")
    for name in _UNSUPPORTED:
        if (value := getattr(config, name, None)) and value != "none":
            raise ValueError(f"Fitted ranks do not support {name}={value!r}. Remove it.")
    if changes_base(config):
        raise ValueError(
            f"Fitted ranks do not support init_lora_weights={config.init_lora_weights!r}, which changes the base "
            "weights. Train without it; a trained adapter can be exported (lrlora export)."
        )
    for path, layer in lora_layers(model, adapter).items():
        _require_plain(path, layer, adapter)
        weight = (
            layer.scaling[adapter] * layer.r[adapter] ** (0.5 if config.use_rslora else 1) / layer.lora_alpha[adapter]
        )
        if not math.isclose(weight, 1, rel_tol=1e-3):
            raise ValueError(
                f"Fitted ranks need an adapter of weight 1, but {path} has {weight:.3g}: set_adapters([{adapter!r}])."
            )
    return adapter


def _require_plain(path: str, layer: Any, adapter: str) -> None:
    base = layer.get_base_layer()
    is_whole = not isinstance(base, nn.MultiheadAttention) and getattr(base, "groups", 1) == 1
    kind = type(layer)
    if not kind.__module__.startswith("peft."):
        raise ValueError(f"Fitted ranks need PEFT's LoRA layers, but {path} is {kind.__module__}.{kind.__name__}.")
    if layer.merged:
        raise ValueError(
            f"Fitted ranks need an unmerged LoRA, but {path} is merged. Call unmerge_adapter() (diffusers: "
            "unfuse_lora()) first."
        )
    if not is_whole or not isinstance(dict(layer.lora_A.items()).get(adapter), _DOWN):
        raise ValueError(
            "Fitted ranks need LoRA on linear layers and convolutions without groups, but "
            f"{path} has another. Leave it out of target_modules."
        )
    if not all(weight.requires_grad for weight in lora_weights(layer, adapter)):
        raise ValueError(
            f"Fitted ranks need trainable LoRA weights, but those of {path} are frozen. Load the adapter with "
            "is_trainable=True; init_lora_weights='mica', which freezes lora_B, is not supported."
        )
    if layer.scaling[adapter] <= 0:
        raise ValueError(f"Fitted ranks need lora_alpha > 0, got {layer.lora_alpha[adapter]} for {path}.")


def lora_layers(model: Any, adapter: str) -> dict[str, Any]:
    """Layers with the adapter, by their path in the base model."""
    base = base_of(model)
    layers = {path: layer for path, layer in base.named_modules() if isinstance(layer, LoraLayer)}
    return {path: layer for path, layer in layers.items() if adapter in layer.r}


def lora_weights(layer: Any, adapter: str) -> tuple[nn.Parameter, nn.Parameter]:
    """The parameters A and B; of an embedding, (k, tokens) and (width, k)."""
    if isinstance(layer, Embedding):
        return layer.lora_embedding_A[adapter], layer.lora_embedding_B[adapter]
    return layer.lora_A[adapter].weight, layer.lora_B[adapter].weight


def weights_of(layers: Mapping[str, Any], adapter: str) -> list[nn.Parameter]:
    """A and B of every layer."""
    return [weight for layer in layers.values() for weight in lora_weights(layer, adapter)]


def costs_of(model: Any, adapter: str) -> dict[str, int]:
    """Module → number of parameters of one rank."""
    return {
        path: sum(getattr(w, "ds_numel", w.numel()) for w in lora_weights(layer, adapter)) // layer.r[adapter]
        for path, layer in lora_layers(model, adapter).items()  # ZeRO-3 leaves parameters empty
    }


def lora_factors(model: Any, adapter: str) -> list[Factors]:
    """ΔW of each layer as its own factors, s·B and A, on the CPU; call it on every process."""
    return [_factors(path, layer, adapter) for path, layer in lora_layers(model, adapter).items()]


def _factors(path: str, layer: Any, adapter: str) -> Factors:
    down, scaling = layer.lora_A[adapter], layer.scaling[adapter]
    A, B = (full_value(weight).to("cpu", copy=True).flatten(1) for weight in lora_weights(layer, adapter))
    B = scaling * B
    energy = ((B.double().T @ B.double()) * (A.double() @ A.double().T)).sum().item()
    layout = Layout(kernel=tuple(down.kernel_size)) if isinstance(down, _ConvNd) else Layout()
    return Factors(path, A, B, len(A), scaling, layout, energy, stable_rank=math.nan, kept=1.0)


def put(model: Any, adapter: str, factors: Sequence[Factors]) -> None:
    """Overwrite the factors of all layers in place, with zeros beyond their ranks; call it on every process.

    Rows of A and columns of B get equal norms, but no row of A becomes smaller than the mean norm before: while B is
    small, changes of B would otherwise have less effect.
    """
    pairs = {pair.module: pair for pair in factors}
    for path, layer in lora_layers(model, adapter).items():
        pair, weights, scaling = pairs[path], lora_weights(layer, adapter), layer.scaling[adapter]
        old_norms, new_norms = (A.flatten(1).double().norm(dim=1) for A in (full_value(weights[0]).cpu(), pair.A))
        mean_norm = (old_norms.square().sum() / (old_norms > 0).sum().clamp(min=1)).sqrt()
        scale = torch.where(new_norms * mean_norm > 0, mean_norm / new_norms, 1.0).clamp(min=scaling**-0.5)
        balanced = replace(pair, A=(scale[:, None] * pair.A).to(pair.A), B=(pair.B / scale / scaling).to(pair.B))
        for weight, value in zip(weights, balanced.padded(layer.r[adapter]).weights, strict=True):
            write(weight, value)


def make_small(model: Any, adapter: str, ranks: Mapping[str, int], optimizer: torch.optim.Optimizer | None) -> None:
    """Leave the zeros beyond the ranks out of the live model and its optimizer too, where nothing is sharded.

    The parameters stay the same objects, without gradients. Modules of rank 0 leave the adapter.
    """
    model.peft_config[adapter] = small_config(model, adapter, ranks)
    for path, layer in lora_layers(model, adapter).items():
        down, up, rank = layer.lora_A[adapter], layer.lora_B[adapter], ranks[path]
        for weight, dim in ((down.weight, 0), (up.weight, 1)):
            old_shape = weight.shape
            small = weight.data.narrow(dim, 0, rank).clone(memory_format=torch.contiguous_format)
            weight.grad = None
            # While the last loss is alive, autograd expects gradients of the old shape, until the dtype changes.
            weight.data = small.to(torch.float64)
            weight.data = small
            if optimizer is not None:
                narrow_state(optimizer, weight, dim, old_shape)
        if rank:
            is_conv = isinstance(down, _ConvNd)
            setattr(down, "out_channels" if is_conv else "out_features", rank)
            setattr(up, "in_channels" if is_conv else "in_features", rank)
            layer.r[adapter], layer.lora_alpha[adapter] = rank, layer.scaling[adapter] * rank
            continue
        if len(layer.r) > 1:
            layer.set_adapter([])  # or PEFT activates another one, in this layer alone
            layer.delete_adapter(adapter)
            layer.set_adapter(active_adapters(model))
        else:
            if isinstance(model, PeftModel):
                cast(Any, model.base_model).targeted_module_names.remove(path)
            parent, _, name = path.rpartition(".")
            setattr(base_of(model).get_submodule(parent), name, layer.get_base_layer())


def narrow_state(optimizer: torch.optim.Optimizer, weight: nn.Parameter, dim: int, old_shape: torch.Size) -> None:
    """Narrow an optimizer's state of a factor to the factor's rank, its size in `dim`, from its `old_shape`.

    The optimizer begins anew with the factor if its state has other shapes, such as sums of rows.
    """
    state = optimizer.state.get(weight, {})
    if all(
        value.numel() == 1 or (value.shape == old_shape and value.is_floating_point())
        if isinstance(value, Tensor)
        else isinstance(value, (int, float, str, NoneType))
        for value in state.values()
    ):
        _resize(state, weight, dim, old_shape)
    else:
        del optimizer.state[weight]


def fit_state(optimizer: torch.optim.Optimizer, weight: nn.Parameter, dim: int) -> None:
    """Fit an optimizer's state to a factor, if it was saved for the same factor of another rank, its size in `dim`."""
    state = optimizer.state.get(weight, {})
    shapes = {value.shape for value in state.values() if isinstance(value, Tensor) and value.numel() > 1}
    if len(shapes) != 1:
        return  # none, or not of the factor's shape
    (shape,) = shapes
    if len(shape) == weight.dim() and all(shape[axis] == size for axis, size in enumerate(weight.shape) if axis != dim):
        _resize(state, weight, dim, shape)


def _resize(state: MutableMapping[str, Any], weight: nn.Parameter, dim: int, shape: torch.Size) -> None:
    """Leave rows or columns of all tensors of a shape out, or add zeros, for the rank of a factor."""
    rank = min(shape[dim], weight.shape[dim])
    for name, value in state.items():
        if isinstance(value, Tensor) and value.shape == shape != weight.shape:
            state[name] = torch.zeros_like(weight, dtype=value.dtype, device=value.device)
            state[name].narrow(dim, 0, rank).copy_(value.narrow(dim, 0, rank))


def small_config(model: Any, adapter: str, ranks: Mapping[str, int]) -> LoraConfig:
    """Configuration of the plain LoRA of these ranks, with the same scaling, as a copy."""
    layers = lora_layers(model, adapter)
    config = _plain(model.peft_config[adapter])
    scaling = {path: layers[path].scaling[adapter] for path in ranks}
    modules = [path for path, _ in base_of(model).named_modules()]
    rank_config: Any = config_of_ranks(ranks, scaling, config, modules)
    for name in ("r", "lora_alpha", "target_modules", "exclude_modules", "rank_pattern", "alpha_pattern"):
        setattr(config, name, getattr(rank_config, name))
    config.use_rslora, config.layers_to_transform, config.layers_pattern = False, None, None
    config.init_lora_weights = True  # others, such as orthogonal, may not allow these ranks when PEFT loads them
    return config


def _plain(config: Any) -> Any:
    """Copy of a configuration, as a LoraConfig without the fields that a subclass adds."""
    plain = copy.copy(config)
    plain.__class__ = LoraConfig
    for name in {field.name for field in fields(config)} - {field.name for field in fields(LoraConfig)}:
        vars(plain).pop(name, None)
    return plain


def _keys(model: Any, path: str, adapter: str) -> Iterator[tuple[str, int]]:
    """Names of A and B in a state dict, and the dimension of each that is the rank."""
    for dim, name in enumerate(("lora_A", "lora_B")):
        yield f"{prefix_of(model)}{path}.{name}.{adapter}.weight", dim


class SmallSave:
    """`save_pretrained` that writes the plain LoRA of the fitted ranks: of the model, or of a gathered state.

    It replaces the method of one model; copies and pickles of the model have their own.
    """

    def __init__(self, model: Any, adapter: str, cut_step: int) -> None:
        self.model, self.adapter, self.cut_step = model, adapter, cut_step
        self._down = self._downs()[0]
        self.ranks: dict[str, int] | None = None
        self.warns = True  # if the adapter is still wide

    def __call__(self, save_directory: Any, *args: Any, state_dict: Any = None, **options: Any) -> None:
        model, save = self.model, type(self.model).save_pretrained
        if not saves_adapter(model):
            save(model, save_directory, *args, **options)
            return
        # Neither deleted nor replaced by another of its name.
        is_present = any(down is self._down for down in self._downs())
        if self.ranks is None or not is_present:
            if self.warns and is_present:
                warnings.warn(
                    f"The adapter is saved before its cut after step {self.cut_step}: it is wide, not of the size "
                    "asked for.",
                    stacklevel=2,
                )
            save(model, save_directory, *args, state_dict=state_dict, **options)
            return
        state = self._small(model.state_dict() if state_dict is None else state_dict, self.ranks)
        wide_config = model.peft_config[self.adapter]
        model.peft_config[self.adapter] = small_config(model, self.adapter, self.ranks)
        try:
            save(model, save_directory, *args, state_dict=state, **options)
        finally:
            model.peft_config[self.adapter] = wide_config

    def _downs(self) -> list[nn.Module]:
        """lora_A of each module."""
        return [layer.lora_A[self.adapter] for layer in lora_layers(self.model, self.adapter).values()]

    def _small(self, state: Mapping[str, Tensor], ranks: Mapping[str, int]) -> dict[str, Tensor]:
        small = dict(state)
        for path, rank in ranks.items():
            for key, dim in _keys(self.model, path, self.adapter):
                if (value := small.pop(key, None)) is None:
                    continue
                require_zero(value, dim, rank, path)
                if rank:
                    small[key] = value.narrow(dim, 0, rank).contiguous()
        return small


def require_zero(value: Tensor, dim: int, rank: int, path: str) -> None:
    """Raise ValueError unless the weights are finite and what was cut, beyond the rank, is still zero."""
    if not value.isfinite().all():
        raise ValueError(f"The LoRA weights of {path} are not finite. Lower the learning rate.")
    if value.narrow(dim, rank, value.shape[dim] - rank).any():
        raise ValueError(
            f"The directions that were cut from {path} are not zero any more: the optimizer changes weights without a "
            "gradient, or this is an average of weights (EMA) from before and after the cut. Use AdamW, and begin an "
            "average after the cut."
        )


def pad_state(adapter: str, model: Any, state: MutableMapping[str, Tensor], prefix: str, *args: Any) -> None:
    """Hook before a state dict is loaded: zeros for the directions that a checkpoint from after the cut leaves out.

    A state from after the last step has no factors of modules of rank 0; without another adapter, nor their layers.

    Raises:
        ValueError: the state dict has larger ranks than the model.

    """
    layers = lora_layers(model, adapter)
    factor_keys = {path: [(prefix + key, dim) for key, dim in _keys(model, path, adapter)] for path in layers}
    if not any(key in state for keys in factor_keys.values() for key, _ in keys):
        return  # of the base model alone
    for path, layer in layers.items():
        weights = lora_weights(layer, adapter)
        if hasattr(weights[0], "ds_id"):
            continue  # ZeRO-3 keeps the values elsewhere, all of them
        place = f"{prefix}{prefix_of(model)}{path}."
        if place + "weight" in state:
            for key in [key for key in state if key.startswith(place)]:
                state[f"{place}base_layer.{key.removeprefix(place)}"] = state.pop(key)
        if f"{place}base_layer.weight" in state and not any(key in state for key, _ in factor_keys[path]):
            state.update(
                {key: torch.zeros_like(weight) for (key, _), weight in zip(factor_keys[path], weights, strict=True)}
            )
        for (key, dim), weight in zip(factor_keys[path], weights, strict=True):
            small = state.get(key)
            if small is None:
                continue
            padding = list(weight.shape)
            padding[dim] -= small.shape[dim]
            if padding[dim] < 0:
                raise ValueError("The checkpoint is from before the cut, and cannot be loaded after it.")
            if padding[dim]:
                zeros = torch.zeros(padding, dtype=weight.dtype, device=small.device)
                state[key] = torch.cat([small.to(zeros), zeros], dim)
