"""Base class of the adapters for linear layers, embeddings and convolutions."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from accelerate.utils import align_module_device, has_offloaded_params
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from peft.utils.quantization_utils import QuantizationBackend, quantization_extra_repr
from torch import Tensor, nn

from ..ops.form import Form, at_least_float32, has_autocast
from ..ops.transfer import input_gain
from .config import LrLoraConfig

_MERGEABLE = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


class LrLoraLayer(nn.Module, BaseTunerLayer):
    """State of an adapted layer, by adapter name: ΔW = (s/g)·φ(g·BA) for its weight, as a matrix (m, n).

    A is `lrlora_A[adapter].weight` (r, n), B is `lrlora_B[adapter].weight` (m, r), φ is `lrlora_phi[adapter]`. An
    expansion M takes the place of φ: ΔW = s·M ∘ BA.
    """

    adapter_layer_names = ("lrlora_A", "lrlora_B", "lrlora_phi")
    other_param_names = ("r", "lora_alpha", "scaling", "input_gain", "lrlora_dropout")

    base_layer: Any
    in_features: int
    out_features: int

    def __init__(
        self,
        base_layer: nn.Module,
        adapter_name: str,
        phi: Form,
        r: int,
        alpha: float,
        config: LrLoraConfig,
        quantization_backend: QuantizationBackend | None,
    ) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.quantization_backend = quantization_backend
        self.lrlora_A = nn.ModuleDict()
        self.lrlora_B = nn.ModuleDict()
        self.lrlora_phi = nn.ModuleDict()
        self.lrlora_dropout = nn.ModuleDict()
        self.r: dict[str, int] = {}
        self.lora_alpha: dict[str, float] = {}
        self.scaling: dict[str, float] = {}
        self.input_gain: dict[str, float | None] = {}
        self.merged_adapters: list[str] = []
        # Set by the model before a merge: another module uses the base weight too (tied embeddings).
        self.shares_weight = False
        # Kept until `unmerge`: the weight on the CPU, the parameter itself if shared, or a copy of a quantized base
        # layer. Stored in a tuple to avoid registration as a parameter or module.
        self._before_merge: tuple[Tensor | nn.Module] | None = None
        self._active_adapter = adapter_name
        self.in_features, self.out_features = self._features()
        self.update_layer(adapter_name, phi, r, alpha, config)

    def _features(self) -> tuple[int, int]:
        """(in_features, out_features) in PEFT's convention."""
        raise NotImplementedError

    def _new_factors(self, r: int) -> tuple[nn.Linear, nn.Linear]:
        """Uninitialized (A, B) with the shapes for this layer type."""
        return nn.Linear(self.in_features, r, bias=False), nn.Linear(r, self.out_features, bias=False)

    def update_layer(self, adapter_name: str, phi: Form, r: int, alpha: float, config: LrLoraConfig) -> None:
        """Add an adapter, or replace it."""
        self.r[adapter_name] = r
        self.lora_alpha[adapter_name] = alpha
        self.scaling[adapter_name] = alpha / math.sqrt(r) if config.use_rslora else alpha / r
        self.input_gain[adapter_name] = config.input_gain
        A, B = self._new_factors(r)
        nn.init.kaiming_uniform_(A.weight, a=math.sqrt(5))
        if config.init_weights:
            nn.init.zeros_(B.weight)
        self.lrlora_A[adapter_name], self.lrlora_B[adapter_name] = A, B
        self.lrlora_phi[adapter_name] = phi
        self.lrlora_dropout[adapter_name] = nn.Dropout(config.lora_dropout) if config.lora_dropout else nn.Identity()
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        if device is None and has_offloaded_params(self.base_layer):
            # The base weight is on the meta device, where an adapter would be lost.
            device = torch.device(self.base_layer._hf_hook.execution_device)
        super()._move_adapter_to_device_of_base_layer(adapter_name, device)

    @torch.no_grad()
    def get_delta_weight(self, adapter: str) -> Tensor:
        """ΔW of an adapter as trained, in the layout of the base weight, float32 or float64."""
        return self._delta(adapter)

    def _delta(self, adapter: str) -> Tensor:
        """ΔW of an adapter in the layout of the base weight, differentiable."""
        A, B, phi = self._factors(adapter)
        return self._in_layout(phi.delta(A, B, scaling=self.scaling[adapter], gain=self.input_gain[adapter]))

    @torch.no_grad()
    def linear_factors(self, adapter: str) -> tuple[Tensor, Tensor]:
        """(s·B, A), the plain-LoRA update of the same factors: (m, r) and (r, n)."""
        A, B, _ = self._factors(adapter)
        return self.scaling[adapter] * at_least_float32(B), A

    @torch.no_grad()
    def thin_factors(self, adapter: str) -> tuple[Tensor, Tensor] | None:
        """U (m, r·Q) and V (r·Q, n) with ΔW = U V (as a matrix); None for φ, which may have full rank."""
        A, B, phi = self._factors(adapter)
        return phi.factors(at_least_float32(A), at_least_float32(B), scaling=self.scaling[adapter])

    def get_transfer_input(self, adapter: str) -> Tensor:
        """Z = g·BA, the input of φ, in the layout of the base weight."""
        A, B = (at_least_float32(factor) for factor in self._factors(adapter)[:2])
        return self._in_layout(input_gain(A, B, self.input_gain[adapter]) * (B @ A))

    def _in_layout(self, matrix: Tensor) -> Tensor:
        """View a matrix (m, n) in the layout of the base weight."""
        return matrix

    def _factors(self, adapter: str) -> tuple[Tensor, Tensor, Form]:
        """(A, B, φ)."""
        modules: list[Any] = [self.lrlora_A[adapter], self.lrlora_B[adapter], self.lrlora_phi[adapter]]
        if modules[0].weight.is_meta or modules[1].weight.is_meta:
            modules = [_onload(module, adapter) for module in modules]
        A, B, phi = modules
        phi.prepare_forward()
        return A.weight, B.weight, phi

    def adapter_parameters(self, adapter: str) -> Iterator[nn.Parameter]:
        """A, B and the parameters of φ; empty if this layer lacks the adapter."""
        for attribute in self.adapter_layer_names:
            modules = getattr(self, attribute)
            if adapter in modules:
                # `parameters()` also traverses submodules, a noticeable cost per generated token.
                yield from (p for p in modules[adapter]._parameters.values() if p is not None)

    def _adapter_output(self, x: Tensor, adapter: str) -> Tensor:
        """Compute x ΔWᵀ, to add to the base output."""
        raise NotImplementedError

    def _add_update(self, result: Tensor, x: Tensor, adapter: str) -> Tensor:
        """Base output plus an adapter's output, in the wider of their dtypes."""
        return result + self._adapter_output(x, adapter)

    def _fused_output(self, x: Tensor, adapter: str) -> Tensor:
        """Compute x (W + ΔW)ᵀ + b without the base layer."""
        raise NotImplementedError

    # Base layer types whose forward `_fused_output` can replace.
    plain_types: tuple[type[nn.Module], ...] = ()
    # Whether products of thin factors are also added to W. Linear layers multiply with the factors instead.
    adds_products = False

    def _can_fuse(self, dtype: torch.dtype, adapters: list[str]) -> bool:
        """Whether the output for an input of `dtype` can be computed from W + ΔW without calling the base layer.

        False if the base layer does more than apply its weight (a subclass, a hook, an offloaded or sharded weight), or
        if the adapter's input differs from the base layer's (dropout).
        """
        base = self.base_layer
        return (
            len(adapters) == 1
            and (self.adds_products or not self.lrlora_phi[adapters[0]].is_product)
            and type(base) in self.plain_types
            and "forward" not in vars(base)
            and not (base._forward_hooks or base._forward_pre_hooks or base._backward_hooks or base._backward_pre_hooks)
            and type(base.weight) in (nn.Parameter, Tensor)
            and not base.weight.is_meta
            and base.weight.dtype == dtype
            and dtype.is_floating_point
            and not (self.training and getattr(self.lrlora_dropout[adapters[0]], "p", 0) > 0)
        )

    def _adapters_to_apply(self) -> list[str]:
        """Active adapters to add in this forward. As in PEFT, disabling adapters unmerges first."""
        if self.disable_adapters and self.merged:
            self.unmerge()
        if self.disable_adapters or self.merged:
            return []
        return [name for name in self.active_adapters if name in self.lrlora_A]

    def forward(self, x: Tensor, *args: Any, adapter_names: list[str] | None = None, **kwargs: Any) -> Tensor:
        """Run the base layer with W + ΔW of the active adapters, or of one adapter per sample.

        Args:
            x: input of the base layer.
            adapter_names: one adapter per sample, "__base__" for none; default: the active ones.
            *args: passed to the base layer.
            **kwargs: passed to the base layer.

        Returns:
            Same shape and dtype as the base layer's output.

        """
        if adapter_names is not None:
            return self._forward_mixed(x, adapter_names, *args, **kwargs)
        adapters = self._adapters_to_apply()
        base_input, x = x, _as_autocast(x)
        if adapters and self._can_fuse(x.dtype, adapters):
            return self._fused_output(x, adapters[0])
        result = self.base_layer(base_input, *args, **kwargs)
        dtype = result.dtype
        for adapter in adapters:
            # No dropout on token ids: as in PEFT, embeddings ignore it.
            adapter_input = self.lrlora_dropout[adapter](x) if x.is_floating_point() else x
            result = self._add_update(result, adapter_input, adapter)
        return result.to(dtype)

    def _forward_mixed(self, x: Tensor, adapter_names: list[str], *args: Any, **kwargs: Any) -> Tensor:
        if len(x) != len(adapter_names):
            raise ValueError(
                f"adapter_names must have one entry per sample: got {len(adapter_names)} names for a batch of "
                f"{len(x)}. For generate, pass num_beams and num_return_sequences as arguments."
            )
        if self.merged:
            raise ValueError(
                f"adapter_names={adapter_names} requires unmerged adapters, but {', '.join(self.merged_adapters)} is "
                "merged into the base weights. Call unmerge_adapter() first."
            )
        result = self.base_layer(x, *args, **kwargs)
        if self.disable_adapters:
            return result
        x = _as_autocast(x)
        for adapter in sorted(set(adapter_names) & set(self.lrlora_A)):
            rows = torch.tensor([i for i, name in enumerate(adapter_names) if name == adapter], device=x.device)
            result = result.index_add(0, rows, self._adapter_output(x[rows], adapter).to(result.dtype))
        return result

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Add ΔW of the given adapters (default: the active ones) to the base weight.

        The sum is computed in float32 and rounded once to the dtype of the weight; a quantized weight is dequantized
        before and requantized after. The original weight is kept (a plain one on the CPU), so that `unmerge` restores
        it exactly. A weight shared with another module is left unchanged, and this layer gets its own copy. Non-finite
        results raise before the base weight changes if `safe_merge`, and warn otherwise.

        Raises:
            ValueError: the merged weight would not be finite.
            NotImplementedError: the quantization of the base weight does not support merging.

        """
        adapters = [name for name in check_adapters_to_merge(self, adapter_names) if name in self.lrlora_A]
        if not adapters:
            return
        backend = self.quantization_backend
        can_merge = backend is None or backend.supports_merge
        base = self.get_base_layer()
        if backend is not None and can_merge:
            quantized = self._before_merge or (copy.deepcopy(base),)
            # On some CPUs, bitsandbytes packs 4-bit weights for inference in a layout that dequantization, here and in
            # PEFT, misreads as the usual one. Requesting the state unpacks them.
            base.state_dict()
        weight: Tensor = self.get_base_weight() if can_merge else torch.empty(())
        if not can_merge or weight.dtype not in _MERGEABLE:
            kind = backend.backend_name if backend is not None else weight.dtype
            raise NotImplementedError(
                f"Cannot merge into a base layer quantized as {kind}. Load the base model unquantized to merge, or "
                "keep the adapter unmerged."
            )
        merged = weight.to(torch.promote_types(weight.dtype, torch.float32), copy=True)
        for adapter in adapters:
            merged += self.get_delta_weight(adapter).to(merged.device)
        merged = merged.to(weight.dtype)
        if not torch.isfinite(merged).all():
            names = ", ".join(adapters)
            if safe_merge:
                raise ValueError(
                    f"Merging {names} would produce non-finite values in a base weight, so nothing was merged into "
                    "this layer. Training has diverged: go back to an earlier checkpoint."
                )
            warnings.warn(
                f"Merging {names} produces non-finite values in a base weight. Pass safe_merge=True to raise an error "
                "instead.",
                stacklevel=2,
            )
        if backend is not None:
            self._before_merge = quantized
            self.set_base_weight(merged)
        elif self.shares_weight:
            parameter: Any = base.weight
            self._before_merge = self._before_merge or (parameter,)
            base.weight = nn.Parameter(merged, requires_grad=parameter.requires_grad)
        else:
            self._before_merge = self._before_merge or (weight.data.to("cpu", copy=True),)
            weight.data.copy_(merged)
        self.merged_adapters.extend(adapters)

    def unmerge(self) -> None:
        """Restore the exact base weight."""
        if self._before_merge is None:
            warnings.warn("Already unmerged; nothing to do.", stacklevel=2)
            return
        (original,), base = self._before_merge, self.get_base_layer()
        if isinstance(original, nn.Module):
            # Keep the module itself and its trainable bias, which an optimizer may reference.
            bias = getattr(base, "bias", None)
            vars(base).update(vars(original))
            if bias is not None:
                base.bias = bias
        elif isinstance(original, nn.Parameter):
            base.weight = original
        else:
            self.get_base_weight().copy_(original)
        self._before_merge = None
        self.merged_adapters.clear()

    def extra_repr(self) -> str:
        return quantization_extra_repr(self)

    def __repr__(self) -> str:
        return "lrlora." + super().__repr__()


def _onload(module: nn.Module, adapter: str) -> nn.Module:
    """An offloaded part of an adapter, with its weights on the execution device.

    Raises:
        RuntimeError: the weights were never loaded, or are trainable and would get no gradient.

    """
    with align_module_device(module):
        onloaded = copy.copy(module)
        onloaded._parameters = dict(module._parameters)
    is_trained = any(parameter.requires_grad for parameter in module.parameters())
    # Custom operators return uninitialized memory for meta tensors.
    if is_trained or any(parameter.is_meta for parameter in onloaded.parameters()):
        raise RuntimeError(
            f"The weights of adapter {adapter!r} are on the meta device: they were not loaded, or are offloaded "
            "although trainable. Load the adapter, or offload the base model before adding the adapter."
        )
    return onloaded


def _as_autocast(x: Tensor) -> Tensor:
    """Cast the input to the autocast dtype of the base layer's matmul."""
    return x.to(torch.get_autocast_dtype(x.device.type)) if autocasts(x.dtype, x.device.type) else x


def autocasts(dtype: torch.dtype, device: str) -> bool:
    """Whether autocast is enabled on `device` and casts this dtype; it leaves float64."""
    is_cast = dtype.is_floating_point and dtype != torch.float64
    return is_cast and has_autocast(device) and torch.is_autocast_enabled(device)
