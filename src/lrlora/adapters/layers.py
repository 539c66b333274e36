"""Updates of a PEFT model's layers, for any mergeable method."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import torch
from peft.utils.integrations import dequantize_module_weight
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ..lora.config import variant_option
from ..lora.factors import Layout, Stack
from ..lora.host import tuner_layers
from ..ops.form import at_least_float32
from ..ops.transfer import Transfer
from ..sharding import gathered, shard_owners
from .products import expert_updates
from .update import Learned, Pair, Update

# Methods whose `r` is the rank of a product.
_WITH_RANK = ("lrlora_A", "lora_A", "hada_w1_a", "lokr_w1", "hira_A", "vera_lambda_b", "randlora_lambda")


def updates_of_model(model: nn.Module, adapter: str | None = None) -> Iterator[Update]:
    """Yield the update of every module that an adapter changes in a PEFT model, in model order.

    On an FSDP2-sharded model, each module stays gathered until the next iteration; iterate on all processes together.

    Args:
        model: an unmerged PEFT model.
        adapter: adapter name; default: the active one.

    Raises:
        ValueError: no module has this adapter, several are active, it is merged into the base weights, or it changes
            modules by more than s·BA, as PiSSA's start does.

    """
    candidates = [(path, layer) for path, layer in tuner_layers(model) if layer.adapter_layer_names]
    names = sorted({name for _, layer in candidates for name in layer._get_available_adapters()})
    active = list(dict.fromkeys(name for _, layer in candidates for name in layer.active_adapters))
    if not names:
        raise ValueError(
            "The model has no adapter. Wrap it with get_peft_model, or load one with PeftModel.from_pretrained."
        )
    if adapter is None and len(active) > 1:
        raise ValueError(f"Several adapters are active: {', '.join(active)}. Pass adapter=NAME, or activate one.")
    name = adapter or next(iter(active), "")
    layers = [(path, layer) for path, layer in candidates if name in layer._get_available_adapters()]
    if not layers:
        raise ValueError(f"No module has an adapter named {adapter!r}. Available adapters: {', '.join(names)}.")
    if any(layer.merged for _, layer in layers):
        raise ValueError("The adapter is merged, but its ranks need the base weights. Call unmerge_adapter() first.")
    config = getattr(model, "peft_config", {}).get(name)
    if config is not None and (option := variant_option(config)) is not None:
        raise ValueError(
            f"{option}={getattr(config, option)!r} changes modules by more than s·BA. Save the adapter as a plain LoRA "
            "with PEFT, and read that."
        )
    owners = shard_owners(model)
    for path, layer in layers:
        with gathered(layer, owners):
            if hasattr(layer, "parameter_name"):
                yield from _parameter_updates(path, layer, name)
            else:
                yield _layer_update(path, layer, name)


def _layer_update(path: str, layer: Any, adapter: str) -> Update:
    base = layer.get_base_layer()
    is_transposed = isinstance(base, Conv1D)

    def as_matrix(weight: Tensor) -> Tensor:
        return weight.T if is_transposed else weight.flatten(1)

    def weight() -> Tensor | None:
        W0 = _base_weight(layer)
        return None if W0 is None else as_matrix(W0)

    learned, phi = None, dict(getattr(layer, "lrlora_phi", {})).get(adapter)
    if phi is not None:
        learned = Learned(
            lambda: layer.linear_factors(adapter),
            phi if isinstance(phi, Transfer) else None,
            lambda: as_matrix(layer.get_transfer_input(adapter)),
        )
    weights = getattr(base, "weight", None)
    layout = Layout(() if weights is None else tuple(weights.shape[2:]), isinstance(base, nn.Embedding))
    has_rank = not set(_WITH_RANK).isdisjoint(layer.adapter_layer_names)
    r: Any = layer.r.get(adapter) if has_rank else None
    scalings = getattr(layer, "scaling", None)
    scaling = scalings.get(adapter, 1.0) if isinstance(scalings, dict) else 1.0
    linear = _linear_factors(layer, adapter)
    if linear is None:
        m, n = as_matrix(base.weight).shape
    else:
        m, n = len(linear[1].weight), linear[0].weight.shape[1]
    factors: Callable[[], Pair] | None = None
    if phi is not None and phi.is_product:
        factors = lambda: layer.thin_factors(adapter)  # noqa: E731
    elif phi is None and linear is not None:
        A, B = linear
        factors = lambda: (layer.scaling[adapter] * at_least_float32(B.weight.detach()), A.weight.detach())  # noqa: E731
    if factors is not None:
        num_terms = 1 if phi is None else phi.num_terms
        return Update(path, (m, n), factors, True, r, min(r * num_terms, m, n), scaling, layout, weight, learned)

    def matrix() -> Tensor:
        if learned is not None or hasattr(layer, "lora_A"):
            return as_matrix(layer.get_delta_weight(adapter))
        return as_matrix(_difference_by_merging(layer, adapter))

    # For LoRA on convolutions and embeddings, PEFT provides only the matrix.
    limit = min(r, m, n) if r is not None and hasattr(layer, "lora_A") else min(m, n)
    return Update(path, (m, n), matrix, False, r, limit, scaling, layout, weight, learned)


def _linear_factors(layer: Any, adapter: str) -> tuple[nn.Linear, nn.Linear] | None:
    """A and B of LoRA or LR-LoRA as linear layers; else None."""
    for method in ("lrlora", "lora"):
        A, B = (getattr(layer, f"{method}_{factor}", {}) for factor in "AB")
        if adapter in A and isinstance(A[adapter], nn.Linear) and isinstance(B[adapter], nn.Linear):
            return A[adapter], B[adapter]
    return None


def stack_of_layer(path: str, layer: Any) -> Stack:
    """The parameter that a wrapper adapts, from the wrapper's path."""
    # Wrappers of several parameters of one module are nested.
    return Stack(f"{path.replace('.base_layer', '')}.{layer.parameter_name}", path, layer.num_experts)


def _parameter_updates(path: str, layer: Any, adapter: str) -> Iterator[Update]:
    """Updates of a parameter that is not a layer's weight: one, or one per stacked expert."""
    weights, is_stack = _base_weight(layer), layer.get_param().dim() == 3
    shape = (layer.out_features, layer.in_features)

    def weight(expert: int) -> Tensor | None:
        if weights is None:
            return None
        matrix = weights[expert] if is_stack else weights
        return matrix if matrix.shape == shape else matrix.T

    A, B = (factor[adapter].weight.detach() for factor in (layer.lora_A, layer.lora_B))
    return expert_updates(stack_of_layer(path, layer), (A, B), layer.scaling[adapter], weight)


def _difference_by_merging(layer: Any, adapter: str) -> Tensor:
    """Difference that a merge makes to the base weight, in its layout, float64.

    Merges a float64 copy: keeps the layer unchanged and small updates exact.

    Raises:
        ValueError: PEFT cannot merge it.

    """
    clone = copy.deepcopy(layer).to(torch.float64)
    base = clone.get_base_layer()
    old_weight = base.weight.detach().clone()
    try:
        clone.merge(adapter_names=[adapter])
    except Exception as error:  # a method's code can raise anything
        kind = type(layer).__module__.split(".")[-2]
        raise ValueError(f"PEFT cannot merge {kind} adapters into a {type(base).__name__}: {error}") from error
    return base.weight.detach() - old_weight


def _unpacked(base: nn.Module) -> nn.Module:
    """A base layer whose weight can be dequantized: on some CPUs, bitsandbytes packs 4-bit weights for inference.

    Dequantization would misread the packed layout as the usual one. Requesting the state unpacks a weight, with scales
    in bfloat16; so a copy is unpacked.
    """
    if not getattr(getattr(base.weight, "quant_state", None), "packing_format_for_cpu", False):
        return base
    unpacked = copy.deepcopy(base)
    unpacked.state_dict()
    return unpacked


def _base_weight(layer: Any) -> Tensor | None:
    """Base weight; None if offloaded, missing, or quantized without a way to dequantize."""
    try:
        if hasattr(layer, "get_param"):
            weight: Tensor = layer.get_param().data
        elif layer.quantization_backend is not None:
            weight = layer.quantization_backend.get_base_weight(_unpacked(layer.get_base_layer()))
        else:  # PEFT's own layers for quantized weights have no backend
            weight = dequantize_module_weight(_unpacked(layer.get_base_layer())).data
    except (TypeError, NotImplementedError, AttributeError):
        return None
    # A skeleton's weight is one zero expanded to a matrix; in float64, a large layer would take gigabytes. Values of
    # one byte lack their scale.
    return None if weight.is_meta or weight.dtype.itemsize < 2 or not any(weight.stride()) else weight
