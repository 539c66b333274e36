"""The adapter on one layer: what linear layers, embeddings, convolutions and stacked experts share."""

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

from ..ops import at_least_float32
from ..ops.form import Form
from .config import LrLoraConfig

_MERGEABLE = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


class LrLoraLayer(nn.Module, BaseTunerLayer):
    """What every adapted layer holds, by adapter name: ΔW = (s/g)·φ(g·BA) for its weight, seen as a matrix (m, n).

    A is `lrlora_A[adapter].weight` (r, n), B is `lrlora_B[adapter].weight` (m, r), φ is `lrlora_phi[adapter]`. An
    expansion M has φ's place: ΔW = s·M ∘ BA.
    """

    adapter_layer_names = ("lrlora_A", "lrlora_B", "lrlora_phi")
    other_param_names = ("r", "lora_alpha", "scaling", "weights", "input_gain", "lrlora_dropout")

    weight_name = "weight"  # of the base layer's parameter that is adapted

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
        quantization_backend: QuantizationBackend | None = None,
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
        self.weights: dict[str, float] = {}
        self.input_gain: dict[str, float] = {}
        self.merged_adapters: list[str] = []
        # Set by the model before a merge: another module uses the base weight too (tied embeddings).
        self.shares_weight = False
        # Until `unmerge`: the weight on the CPU, the parameter itself if it is shared, or a copy of a quantised base
        # layer. In a tuple, so that it is not registered here as a parameter or module.
        self._before_merge: tuple[Tensor | nn.Module] | None = None
        self._active_adapter = adapter_name
        self.in_features, self.out_features = self._features()
        self.update_layer(adapter_name, phi, r, alpha, config)

    def _features(self) -> tuple[int, int]:
        """(in_features, out_features) as PEFT counts them."""
        raise NotImplementedError

    def _new_factors(self, r: int) -> tuple[nn.Linear, nn.Linear]:
        """(A, B), not initialised, of the shapes that the kind of layer wants."""
        return nn.Linear(self.in_features, r, bias=False), nn.Linear(r, self.out_features, bias=False)

    def update_layer(self, adapter_name: str, phi: Form, r: int, alpha: float, config: LrLoraConfig) -> None:
        """Add an adapter, or replace the one of this name."""
        self.r[adapter_name] = r
        self.lora_alpha[adapter_name] = alpha
        self.scaling[adapter_name] = alpha / math.sqrt(r) if config.use_rslora else alpha / r
        self.weights[adapter_name] = 1.0
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
        """ΔW of one adapter as trained, in the layout of the base weight, float32 or float64."""
        return self._delta(adapter)

    def _delta(self, adapter: str) -> Tensor:
        """ΔW of one adapter in the layout of the base weight, differentiable."""
        A, B, phi = self._factors(adapter)
        return self._in_layout(phi.delta(A, B, scaling=self.scaling[adapter], gain=self.input_gain[adapter]))

    @torch.no_grad()
    def linear_factors(self, adapter: str) -> tuple[Tensor, Tensor]:
        """(s·B, A), of what plain LoRA would make of the same factors: (..., m, r) and (..., r, n)."""
        A, B, _ = self._factors(adapter)
        return self.scaling[adapter] * at_least_float32(B), A

    @torch.no_grad()
    def thin_factors(self, adapter: str) -> tuple[Tensor, Tensor] | None:
        """U (..., m, r·Q) and V (..., r·Q, n) of ΔW = U V, seen as a matrix; None where φ may make it of full rank."""
        A, B, phi = self._factors(adapter)
        return phi.factors(at_least_float32(A), at_least_float32(B), scaling=self.scaling[adapter])

    def get_transfer_input(self, adapter: str) -> Tensor:
        """Z = g·BA, the entries φ acts on, in the layout of the base weight."""
        A, B, _ = self._factors(adapter)
        return self._in_layout(self.input_gain[adapter] * (at_least_float32(B) @ at_least_float32(A)))

    def _in_layout(self, matrix: Tensor) -> Tensor:
        """A matrix (m, n), seen in the layout of the base weight."""
        return matrix

    def _factors(self, adapter: str) -> tuple[Tensor, Tensor, Form]:
        """(A, B, φ)."""
        parts: list[Any] = [self.lrlora_A[adapter], self.lrlora_B[adapter], self.lrlora_phi[adapter]]
        if parts[0].weight.is_meta or parts[1].weight.is_meta:
            parts = [_onloaded(part, adapter) for part in parts]
        A, B, phi = parts
        phi.prepare_forward()
        return A.weight, B.weight, phi

    def adapter_parameters(self, adapter: str) -> Iterator[nn.Parameter]:
        """A, B and the parameters of φ; nothing if this layer does not have the adapter."""
        for part in self.adapter_layer_names:
            modules = getattr(self, part)
            if adapter in modules:
                # `parameters()` looks for submodules too, which is slow enough to be felt at every generated token.
                yield from (p for p in modules[adapter]._parameters.values() if p is not None)

    def _adapter_output(self, x: Tensor, adapter: str) -> Tensor:
        """X ΔWᵀ, which is added to the base layer's output."""
        raise NotImplementedError

    def _add_update(self, result: Tensor, x: Tensor, adapter: str) -> Tensor:
        """The base layer's output plus that of an adapter, in the wider of their dtypes."""
        return result + self.weights[adapter] * self._adapter_output(x, adapter)

    def _fused_output(self, x: Tensor, adapter: str) -> Tensor:
        """X (W + ΔW)ᵀ + b, without a call of the base layer."""
        raise NotImplementedError

    # Kinds of base layers whose forward is known, so that `_fused_output` may stand for it.
    plain_types: tuple[type[nn.Module], ...] = ()
    # Whether a product of thin factors is added to W too. A linear layer multiplies with them instead.
    adds_products = False

    def _can_fuse(self, x: Tensor, adapters: list[str]) -> bool:
        """Whether the output may be formed from W + ΔW without calling the base layer.

        Not so if the base layer does more than its weight says (a subclass, a hook, an offloaded or sharded weight),
        or if the adapter sees another input than the base layer does (dropout).
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
            and base.weight.dtype == x.dtype
            and x.is_floating_point()
            and not (self.training and getattr(self.lrlora_dropout[adapters[0]], "p", 0) > 0)
            and self.weights[adapters[0]] == 1.0
        )

    def _adapters_to_apply(self) -> list[str]:
        """The adapters that this forward adds to the base weight. As in PEFT, disabling undoes a merge first."""
        if self.disable_adapters and self.merged:
            self.unmerge()
        if self.disable_adapters or self.merged:
            return []
        return [name for name in self.active_adapters if name in self.lrlora_A]

    def forward(self, x: Tensor, *args: Any, adapter_names: list[str] | None = None, **kwargs: Any) -> Tensor:
        """The base layer's output with ΔW of the active adapters, or of one adapter for each sample, added to W.

        Args:
            x: as for the base layer.
            adapter_names: an adapter for each sample of the batch, "__base__" for none; default: the active ones.
            *args: of the base layer.
            **kwargs: of the base layer.

        Returns:
            In shape and dtype the base layer's output.

        """
        if adapter_names is not None:
            return self._forward_mixed(x, adapter_names, *args, **kwargs)
        adapters = self._adapters_to_apply()
        given, x = x, _as_autocast(x)
        if adapters and self._can_fuse(x, adapters):
            return self._fused_output(x, adapters[0])
        result = self.base_layer(given, *args, **kwargs)
        dtype = result.dtype
        for adapter in adapters:
            # Token ids have no dropout: as in PEFT, an embedding ignores it.
            seen = self.lrlora_dropout[adapter](x) if x.is_floating_point() else x
            result = self._add_update(result, seen, adapter)
        return result.to(dtype)

    def _forward_mixed(self, x: Tensor, adapter_names: list[str], *args: Any, **kwargs: Any) -> Tensor:
        if len(x) != len(adapter_names):
            raise ValueError(
                f"adapter_names must name one adapter for each of the {len(x)} samples of the batch, and names "
                f"{len(adapter_names)}. When generating, pass num_beams and num_return_sequences as arguments."
            )
        if self.merged:
            raise ValueError(
                f"adapter_names={adapter_names} asks for an adapter of each sample's own, and "
                f"{', '.join(self.merged_adapters)} is merged into the base weights: call unmerge_adapter() first."
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

        ΔW is added in float32 and the sum rounded to the dtype of the weight once; a quantised weight is dequantised
        before and quantised again after. What was there before is kept, a plain weight on the CPU, so that `unmerge`
        restores it to the bit. A weight that another module shares is left to it, and this layer gets one of its own.
        Non-finite results are refused with `safe_merge`, before the base weight is touched, and warned of without.

        Raises:
            ValueError: the merged weight would not be finite.
            NotImplementedError: the base weight is quantised in a way that does not allow it.

        """
        adapters = [name for name in check_adapters_to_merge(self, adapter_names) if name in self.lrlora_A]
        if not adapters:
            return
        backend = self.quantization_backend
        can_merge = backend is None or backend.supports_merge
        base = self.get_base_layer()
        if backend is not None and can_merge:
            quantised = self._before_merge or (copy.deepcopy(base),)
            # On some CPUs, inference makes bitsandbytes pack 4-bit weights in a layout that dequantising, here and in
            # PEFT, takes for the usual one. Asking for the state unpacks them.
            base.state_dict()
        weight: Tensor = self.get_base_weight() if can_merge else torch.empty(())
        if not can_merge or weight.dtype not in _MERGEABLE:
            kind = backend.backend_name if backend is not None else weight.dtype
            raise NotImplementedError(
                f"Cannot merge into a base layer quantised as {kind}. Load the base model unquantised and merge there, "
                "or keep the adapter unmerged."
            )
        merged = weight.to(torch.promote_types(weight.dtype, torch.float32), copy=True)
        for adapter in adapters:
            merged += self.weights[adapter] * self.get_delta_weight(adapter).to(merged.device)
        merged = merged.to(weight.dtype)
        if not torch.isfinite(merged).all():
            names = ", ".join(adapters)
            if safe_merge:
                raise ValueError(
                    f"Merging {names} would put non-finite values into a base weight; nothing was merged into this "
                    "layer. Training has diverged: go back to an earlier checkpoint."
                )
            warnings.warn(
                f"Merging {names} puts non-finite values into a base weight. safe_merge=True refuses to.", stacklevel=2
            )
        if backend is not None:
            self._before_merge = quantised
            self.set_base_weight(merged)
        elif self.shares_weight:
            parameter = getattr(base, self.weight_name)
            self._before_merge = self._before_merge or (parameter,)
            setattr(base, self.weight_name, nn.Parameter(merged, requires_grad=parameter.requires_grad))
        else:
            self._before_merge = self._before_merge or (weight.data.to("cpu", copy=True),)
            weight.data.copy_(merged)
        self.merged_adapters.extend(adapters)

    def unmerge(self) -> None:
        """Restore the base weight to the bit."""
        if self._before_merge is None:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        (before,), base = self._before_merge, self.get_base_layer()
        if isinstance(before, nn.Module):
            # The module itself stays, and with it a bias that is trained: an optimizer may hold it.
            bias = getattr(base, "bias", None)
            vars(base).update(vars(before))
            if bias is not None:
                base.bias = bias
        elif isinstance(before, nn.Parameter):
            setattr(base, self.weight_name, before)
        else:
            self.get_base_weight().copy_(before)
        self._before_merge = None
        self.merged_adapters.clear()

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """Whether PEFT's `convert_to_lora` can factorise ΔW: it handles linear layers."""
        return False

    def extra_repr(self) -> str:
        return quantization_extra_repr(self)

    def __repr__(self) -> str:
        return "lrlora." + super().__repr__()


def _onloaded(part: nn.Module, adapter: str) -> nn.Module:
    """A part of an adapter that accelerate has offloaded, with its weights where it computes.

    Raises:
        RuntimeError: the weights are nowhere, or to be trained, and no gradient would reach them.

    """
    with align_module_device(part):
        onloaded = copy.copy(part)
        onloaded._parameters = dict(part._parameters)
    is_trained = any(parameter.requires_grad for parameter in part.parameters())
    # An operator that meets a meta tensor returns uninitialised memory.
    if is_trained or any(parameter.is_meta for parameter in onloaded.parameters()):
        raise RuntimeError(
            f"The weights of adapter {adapter!r} are on the meta device: they were never loaded, or were offloaded "
            "and are to be trained. Offload the base model before adding the adapter, which then stays on its "
            "device, or load the adapter."
        )
    return onloaded


def _as_autocast(x: Tensor) -> Tensor:
    """The input in the dtype that autocast gives to the base layer's matmul."""
    return x.to(torch.get_autocast_dtype(x.device.type)) if autocasts(x.dtype, x.device.type) else x


def autocasts(dtype: torch.dtype, device: str) -> bool:
    """Whether autocast is on there, and would cast an input of this dtype."""
    return dtype.is_floating_point and torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
