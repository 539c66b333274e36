"""The adapter on one linear layer."""

from __future__ import annotations

import math
import warnings
from typing import Any, cast

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ..ops import adapted_linear, delta_weight
from ..transfer import Transfer
from .config import LrLoraConfig


class LrLoraLayer(BaseTunerLayer):
    """What every adapted layer holds, by adapter name."""

    adapter_layer_names = ("lrlora_A", "lrlora_B", "lrlora_phi")
    other_param_names = ("r", "lora_alpha", "scaling", "input_gain", "lrlora_dropout")

    lrlora_A: nn.ModuleDict
    lrlora_B: nn.ModuleDict
    lrlora_phi: nn.ModuleDict


class Linear(nn.Module, LrLoraLayer):
    """y = x (W + Σ (s/g)·φ(g·BA))ᵀ + b over the active adapters, on an `nn.Linear` or transformers' `Conv1D`.

    A is `lrlora_A[adapter].weight` (r, n), B is `lrlora_B[adapter].weight` (m, r), φ is `lrlora_phi[adapter]`.
    """

    base_layer: Any

    def __init__(
        self, base_layer: nn.Module, adapter_name: str, transfer: Transfer, r: int, alpha: float, config: LrLoraConfig
    ) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.is_conv1d = isinstance(base_layer, Conv1D)
        if self.is_conv1d:
            self.in_features, self.out_features = self.base_layer.weight.shape
        else:
            self.in_features, self.out_features = self.base_layer.in_features, self.base_layer.out_features
        self.lrlora_A = nn.ModuleDict()
        self.lrlora_B = nn.ModuleDict()
        self.lrlora_phi = nn.ModuleDict()
        self.lrlora_dropout = nn.ModuleDict()
        self.r: dict[str, int] = {}
        self.lora_alpha: dict[str, float] = {}
        self.scaling: dict[str, float] = {}
        self.input_gain: dict[str, float] = {}
        self.merged_adapters: list[str] = []
        self._weight_before_merge: Tensor | None = None
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, transfer, r, alpha, config)

    def update_layer(self, adapter_name: str, transfer: Transfer, r: int, alpha: float, config: LrLoraConfig) -> None:
        """Add an adapter, or replace the one of this name."""
        self.r[adapter_name] = r
        self.lora_alpha[adapter_name] = alpha
        self.scaling[adapter_name] = alpha / math.sqrt(r) if config.use_rslora else alpha / r
        self.input_gain[adapter_name] = config.input_gain
        A = nn.Linear(self.in_features, r, bias=False)
        B = nn.Linear(r, self.out_features, bias=False)
        nn.init.kaiming_uniform_(A.weight, a=math.sqrt(5))
        if config.init_weights:
            nn.init.zeros_(B.weight)
        self.lrlora_A[adapter_name], self.lrlora_B[adapter_name] = A, B
        self.lrlora_phi[adapter_name] = transfer
        self.lrlora_dropout[adapter_name] = nn.Dropout(config.lora_dropout) if config.lora_dropout else nn.Identity()
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    @torch.no_grad()
    def get_delta_weight(self, adapter: str) -> Tensor:
        """ΔW of one adapter in the layout of the base weight: (m, n), or (n, m) on a Conv1D; float32 or float64."""
        delta = delta_weight(
            *self._factors(adapter), scaling=self.scaling[adapter], input_gain=self.input_gain[adapter]
        )
        return delta.T if self.is_conv1d else delta

    def get_transfer_input(self, adapter: str) -> Tensor:
        """Z = g·BA, the entries φ acts on, in the layout of the base weight."""
        A, B, _ = self._factors(adapter)
        dtype = torch.promote_types(A.dtype, torch.float32)
        z = self.input_gain[adapter] * (B.to(dtype) @ A.to(dtype))
        return z.T if self.is_conv1d else z

    def _factors(self, adapter: str) -> tuple[Tensor, Tensor, Transfer]:
        phi = cast(Transfer, self.lrlora_phi[adapter])
        phi.restore_precision()
        return cast(nn.Linear, self.lrlora_A[adapter]).weight, cast(nn.Linear, self.lrlora_B[adapter]).weight, phi

    def _update(self, x: Tensor, adapter: str, weight: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
        """X (W + ΔW)ᵀ + b, or x ΔWᵀ without a weight: (..., n) → (..., m)."""
        scaling, gain = self.scaling[adapter], self.input_gain[adapter]
        return adapted_linear(x, weight, bias, *self._factors(adapter), scaling=scaling, input_gain=gain)

    def _takes_one_matmul(self, x: Tensor, adapters: list[str]) -> bool:
        """Whether x (W + ΔW)ᵀ may be formed without calling the base layer.

        Not so if the base layer does more than its weight says (a subclass, a hook, an offloaded or sharded weight),
        if the adapter sees another input than the base layer does (dropout), or in half precision, where rounding
        W + ΔW loses the update.
        """
        base, weight = self.base_layer, self.base_layer.weight
        return (
            len(adapters) == 1
            and type(base) in (nn.Linear, Conv1D)
            and "forward" not in vars(base)
            and not (base._forward_hooks or base._forward_pre_hooks or base._backward_hooks or base._backward_pre_hooks)
            and type(weight) in (nn.Parameter, Tensor)
            and not weight.is_meta
            and weight.dtype == x.dtype
            and x.dtype in (torch.float32, torch.float64)
            and not _autocasts(x)
            and not (self.training and getattr(self.lrlora_dropout[adapters[0]], "p", 0) > 0)
        )

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """(..., n) → (..., m), in the dtype of the base layer's output."""
        if self.disable_adapters and self.merged:
            self.unmerge()
        adapters = [name for name in self.active_adapters if name in self.lrlora_A]
        if self.disable_adapters or self.merged or not adapters:
            return self.base_layer(x, *args, **kwargs)
        if self._takes_one_matmul(x, adapters):
            weight = self.base_layer.weight.T if self.is_conv1d else self.base_layer.weight
            return self._update(x, adapters[0], weight, self.base_layer.bias)

        result = self.base_layer(x, *args, **kwargs)
        if _autocasts(x):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        for adapter in adapters:
            result = result + self._update(self.lrlora_dropout[adapter](x), adapter).to(result.dtype)
        return result

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Add ΔW of the given adapters (default: the active ones) to the base weight.

        ΔW is added in float32 and the sum rounded to the dtype of the weight once. The weight from before is kept on
        the CPU, so that `unmerge` restores it to the bit. Non-finite results are refused with or without
        `safe_merge`, before the base weight is touched.

        Raises:
            ValueError: the merged weight would not be finite.
            NotImplementedError: the base weight is quantised.

        """
        adapters = [name for name in check_adapters_to_merge(self, adapter_names) if name in self.lrlora_A]
        if not adapters:
            return
        weight = self.base_layer.weight
        if not weight.is_floating_point():
            raise NotImplementedError(
                f"Cannot merge into a weight of dtype {weight.dtype}: the base layer is quantised. Load the base "
                "model unquantised and merge there, or keep the adapter unmerged."
            )
        merged = weight.data.to(torch.promote_types(weight.dtype, torch.float32), copy=True)
        for adapter in adapters:
            merged += self.get_delta_weight(adapter).to(merged.device)
        merged = merged.to(weight.dtype)
        if not torch.isfinite(merged).all():
            raise ValueError(
                f"Merging {', '.join(adapters)} would put non-finite values into a base weight; nothing was merged "
                "into this layer. Training has diverged: go back to an earlier checkpoint."
            )
        if self._weight_before_merge is None:
            self._weight_before_merge = weight.data.to("cpu", copy=True)
        weight.data.copy_(merged)
        self.merged_adapters.extend(adapters)

    def unmerge(self) -> None:
        """Restore the base weight to the bit."""
        if self._weight_before_merge is None:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        self.base_layer.weight.data.copy_(self._weight_before_merge)
        self._weight_before_merge = None
        self.merged_adapters.clear()

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """PEFT's `convert_to_lora` may factorise ΔW."""
        return True

    def __repr__(self) -> str:
        return "lrlora." + super().__repr__()


def _autocasts(x: Tensor) -> bool:
    return torch.amp.is_autocast_available(x.device.type) and torch.is_autocast_enabled(x.device.type)
