"""Adapters for linear layers, convolutions and embeddings, and `cached_weights` of linear layers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from .layer import LrLoraLayer, autocasts


class Linear(LrLoraLayer):
    """y = x (W + Σ (s/g)·φ(g·BA))ᵀ + b over the active adapters: `nn.Linear`, quantized ones, transformers' `Conv1D`.

    Forward: (..., n) → (..., m).
    """

    plain_types = (nn.Linear, Conv1D)

    # Set by `cached_weights`: whether to cache, and (parameter state, cached weight).
    caches_weight = False
    _cached: tuple[object, Tensor] | None = None

    def _features(self) -> tuple[int, int]:
        if isinstance(self.base_layer, Conv1D):
            n, m = self.base_layer.weight.shape
            return n, m
        return self.base_layer.in_features, self.base_layer.out_features

    def _in_layout(self, matrix: Tensor) -> Tensor:
        return matrix.T if isinstance(self.base_layer, Conv1D) else matrix

    def _adapter_output(self, x: Tensor, adapter: str) -> Tensor:
        A, B, phi = self._factors(adapter)
        return phi.linear(x, A, B, scaling=self.scaling[adapter], gain=self.input_gain[adapter])

    def _add_update(self, result: Tensor, x: Tensor, adapter: str) -> Tensor:
        A, B, phi = self._factors(adapter)
        if not phi.is_product:
            return super()._add_update(result, x, adapter)
        return phi.linear(x, A, B, scaling=self.scaling[adapter], gain=self.input_gain[adapter], added_to=result)

    def _fused_output(self, x: Tensor, adapter: str) -> Tensor:
        base, (A, B, phi) = self.base_layer, self._factors(adapter)
        scaling, gain = self.scaling[adapter], self.input_gain[adapter]
        return phi.fused_linear(x, self._in_layout(base.weight), base.bias, A, B, scaling=scaling, gain=gain)

    def forward(self, x: Tensor, *args: Any, adapter_names: list[str] | None = None, **kwargs: Any) -> Tensor:
        if self.caches_weight and adapter_names is None and not torch.is_grad_enabled():
            adapters = self._adapters_to_apply()
            if adapters:
                return self._forward_cached(x, adapters, *args, **kwargs)
        return super().forward(x, *args, adapter_names=adapter_names, **kwargs)

    def _forward_cached(self, x: Tensor, adapters: list[str], *args: Any, **kwargs: Any) -> Tensor:
        # In half precision, rounding W + ΔW would lose part of the update.
        is_fused = (
            not autocasts(x.dtype, x.device.type)
            and x.dtype in (torch.float32, torch.float64)
            and self._can_fuse(x.dtype, adapters[:1])
        )
        tensors = [p for name in adapters for p in self.adapter_parameters(name)]
        if is_fused:
            tensors.append(self.base_layer.weight)
        versions = tuple((tensor.data_ptr(), tensor._version) for tensor in tensors)
        state = (x.dtype, is_fused, tuple(adapters), versions)
        if self._cached is None or self._cached[0] != state:
            self._cached = None  # free the old weight before allocating a new one
            delta = self.get_delta_weight(adapters[0])
            for name in adapters[1:]:
                delta += self.get_delta_weight(name)
            self._cached = (state, delta.add_(self.base_layer.weight) if is_fused else delta.to(x.dtype))
        weight = self._in_layout(self._cached[1])
        if is_fused:
            return F.linear(x, weight, self.base_layer.bias)
        result = self.base_layer(x, *args, **kwargs)
        return result + F.linear(x.to(weight.dtype), weight).to(result.dtype)

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        return True


class Conv(LrLoraLayer):
    """1D to 3D convolution with W + ΔW; W (m, n/groups, k, …) is flattened to (m, n/groups·k·…)."""

    plain_types = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
    adds_products = True

    def _features(self) -> tuple[int, int]:
        return self.base_layer.weight[0].numel(), self.base_layer.out_channels

    def _in_layout(self, matrix: Tensor) -> Tensor:
        return matrix.view(self.base_layer.weight.shape)

    def _adapter_output(self, x: Tensor, adapter: str) -> Tensor:
        return self.base_layer._conv_forward(x, self._delta(adapter).to(x.dtype), None)

    def _fused_output(self, x: Tensor, adapter: str) -> Tensor:
        base = self.base_layer
        return base._conv_forward(x, base.weight + self._delta(adapter).to(base.weight.dtype), base.bias)


class Embedding(LrLoraLayer):
    """Row i of W + ΔW for token i of an `nn.Embedding` with the weight W (m tokens, n).

    Only the rows in a batch are computed: T·n entries for T tokens. Ignores dropout. Forward: (...) → (..., n).
    """

    def _features(self) -> tuple[int, int]:
        return self.base_layer.num_embeddings, self.base_layer.embedding_dim

    def _new_factors(self, r: int) -> tuple[nn.Linear, nn.Linear]:
        return nn.Linear(self.out_features, r, bias=False), nn.Linear(r, self.in_features, bias=False)

    def _adapter_output(self, x: Tensor, adapter: str) -> Tensor:
        A, B, phi = self._factors(adapter)
        tokens, padding = x.flatten(), self.base_layer.padding_idx
        delta = phi.delta(A, B, scaling=self.scaling[adapter], gain=self.input_gain[adapter], rows=tokens)
        if padding is not None:
            delta = torch.where((tokens == padding).unsqueeze(-1), delta.detach(), delta)  # padding is not trained
        scale = self._get_embed_scale()
        delta = delta if scale is None else delta * scale
        return delta.view(*x.shape, self.out_features)


@contextmanager
def cached_weights(model: nn.Module) -> Iterator[None]:
    """Cache the effective weights of adapted linear layers, for inference, mainly `generate`.

    Applies inside the context and without gradients. A float32 layer then costs as much as its base layer and keeps W +
    ΔW, as large as W. In half precision and on a quantized base, the layer keeps ΔW in the dtype of its input and a
    second matmul, so that rounding the sum does not lose part of the update. The cache is freed on exit.

    Optimizer steps, loading and switching adapters are detected; writes to `parameter.data` are not.

        with torch.no_grad(), lrlora.cached_weights(model):
            tokens = model.generate(**inputs)
    """
    layers = [module for module in model.modules() if isinstance(module, Linear) and not module.caches_weight]
    for layer in layers:
        layer.caches_weight = True
    try:
        yield
    finally:
        for layer in layers:
            layer.caches_weight, layer._cached = False, None
