"""Adapter for parameters that are not a layer's weight, such as the stacked experts of a mixture."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from ..ops.form import Form
from .layer import LrLoraLayer


# PEFT recognizes the wrapper of an earlier adapter by this class name.
class ParamWrapper(LrLoraLayer):
    """Module with ΔW added to one of its parameters: a matrix (m, n) or stacked experts (experts, m, n).

    Each expert has its own A and B; all share φ. W + ΔW is materialized and passed to the module in place of the
    parameter, in the parameter's dtype: in half precision, rounding the sum loses part of a small update. Adapting
    several parameters of one module nests the wrappers.
    """

    def __init__(self, base_layer: nn.Module, parameter_name: str, *args: Any, **kwargs: Any) -> None:
        self.parameter_name = self.weight_name = parameter_name
        super().__init__(base_layer, *args, **kwargs)

    def _features(self) -> tuple[int, int]:
        shape, dtype = self.get_param().shape, self.get_param().dtype
        if len(shape) not in (2, 3) or not dtype.is_floating_point:
            raise ValueError(
                f"target_parameters matches {self.parameter_name!r} of shape {tuple(shape)} and dtype {dtype}. LR-LoRA "
                "adapts floating-point matrices (m, n) and stacks of them (experts, m, n)."
            )
        self.num_experts = shape[0] if len(shape) == 3 else 1
        m, n = shape[-2:]
        return (m, n) if self._is_transposed else (n, m)

    @property
    def _is_transposed(self) -> bool:
        # transformers marks experts stored as (experts, in, out) with this attribute.
        return self.get_param().dim() == 3 and getattr(self.get_base_layer(), "is_transposed", False)

    def _new_factors(self, r: int) -> tuple[nn.Linear, nn.Linear]:
        A = nn.Linear(self.in_features, self.num_experts * r, bias=False)
        return A, nn.Linear(r, self.num_experts * self.out_features, bias=False)

    def _factors(self, adapter: str) -> tuple[Tensor, Tensor, Form]:
        A, B, phi = super()._factors(adapter)
        return A.unflatten(0, (self.num_experts, -1)), B.unflatten(0, (self.num_experts, -1)), phi

    def _in_layout(self, matrix: Tensor) -> Tensor:
        matrix = matrix.mT if self._is_transposed else matrix
        return matrix.reshape(self.get_param().shape)

    def get_param(self) -> nn.Parameter:
        """Return the base layer's parameter."""
        return getattr(self.get_base_layer(), self.parameter_name)

    def get_base_weight(self) -> Tensor:
        return self.get_param().data

    def _get_base_layer_device_and_dtype(self, base_layer: nn.Module) -> tuple[torch.device, torch.dtype]:
        return self.get_param().device, self.get_param().dtype

    def extra_repr(self) -> str:
        return f"parameter_name={self.parameter_name!r}"

    def unload_and_optionally_merge_module(
        self, merge: bool, safe_merge: bool, adapter_names: list[str] | None
    ) -> nn.Module:
        """Remove all nested wrappers, merging them if `merge`: PEFT's hook for special modules."""
        module: Any = self
        while isinstance(module, ParamWrapper):
            if merge:
                module.merge(safe_merge=safe_merge, adapter_names=adapter_names)
            module = module.base_layer
        return module

    def forward(self, *args: Any, adapter_names: list[str] | None = None, **kwargs: Any) -> Any:
        """Run the module with W + ΔW in place of the parameter."""
        if adapter_names is not None:
            raise NotImplementedError(
                "adapter_names (per-sample adapters) is not supported with target_parameters, because experts mix "
                "samples. Call set_adapter and run a separate batch for each adapter."
            )
        weight: Tensor = self.get_param()
        adapters = self._adapters_to_apply()
        for adapter in adapters:
            weight = weight + self._delta(adapter).to(weight.dtype)
        if not adapters:
            return self.base_layer(*args, **kwargs)
        path, module = self.parameter_name, self.base_layer
        while module is not self.get_base_layer():
            path, module = f"base_layer.{path}", module.base_layer
        return functional_call(self.base_layer, {path: weight}, args, kwargs)
