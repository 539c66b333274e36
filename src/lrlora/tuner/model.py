"""Tuner: selects the layers to adapt, shares φ between them, and validates saving and loading."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, cast

import torch
from peft import PeftConfig
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
from peft.utils.error import NoMatchingPeftModuleError
from peft.utils.other import AuxiliaryTrainingWrapper
from peft.utils.quantization_utils import (
    QuantizationBackend,
    TorchaoBackend,
    get_quantization_kwargs,
    resolve_quantization_backend,
)
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from transformers.pytorch_utils import Conv1D

from ..naming import pattern_key
from ..ops.form import Form
from .config import LrLoraConfig
from .layer import LrLoraLayer
from .layers import Conv, Embedding, Linear

BASE_MODEL = "__base__"  # PEFT's name for "no adapter" in `adapter_names`


class LrLoraModel(BaseTuner):
    """Adds LR-LoRA adapters to a model. Use it through `peft.get_peft_model(model, LrLoraConfig(...))`.

    Raises:
        NoMatchingPeftModuleError: `target_modules` matches nothing; the message lists the model's modules.
        ValueError: a targeted module has an unsupported type.

    Examples:
        >>> import torch
        >>> from peft import get_peft_model
        >>> from lrlora import LrLoraConfig
        >>> model = get_peft_model(torch.nn.Sequential(torch.nn.Linear(16, 8)), LrLoraConfig(r=2, target_modules=["0"]))
        >>> model.print_trainable_parameters()
        trainable params: 64 || all params: 200 || trainable%: 32.0000

    """

    prefix = "lrlora_"
    tuner_layer_cls = LrLoraLayer
    target_module_mapping = cast(dict[str, list[str]], TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING)

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        # Forms shared within this injection; a later one starts fresh, even with the same name.
        self._shared: dict[str, Form] = {}
        try:
            super().inject_adapter(model, adapter_name, *args, **kwargs)
        except NoMatchingPeftModuleError as error:
            modules = dict(model.named_modules())
            inside_adapted = tuple(f"{path}." for path, module in modules.items() if isinstance(module, BaseTunerLayer))
            names = sorted(
                {
                    path.rpartition(".")[2]
                    for path, module in modules.items()
                    if not path.startswith(inside_adapted)
                    and (isinstance(module, Linear) or _layer_class(module) is Linear)
                }
            )
            raise NoMatchingPeftModuleError(
                f"{error} The linear layers of this model are named: {', '.join(names) or '(it has none)'}."
            ) from None

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        # PEFT wraps forward and generate of the model in this context. It passes per-sample adapter names to every
        # adapted layer.
        names = kwargs.get("adapter_names")
        if names is None:
            yield
            return
        self._check_adapter_names(names)
        # `generate` repeats samples for beams or multiple sequences, but not in an encoder, which runs before.
        settings = (kwargs, getattr(kwargs.get("generation_config"), "__dict__", {}))
        copies = max(options.get(name) or 1 for options in settings for name in ("num_beams", "num_return_sequences"))
        has_encoder = copies > 1 and self.model.config.is_encoder_decoder
        within_encoder = set(self.model.get_encoder().modules()) if has_encoder else set()
        repeated = [name for name in names for _ in range(copies)]
        handles = [
            module.register_forward_pre_hook(
                partial(_pass_adapter_names, names if module in within_encoder else repeated), with_kwargs=True
            )
            for module in self.modules()
            if isinstance(module, (LrLoraLayer, AuxiliaryTrainingWrapper))
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _check_adapter_names(self, names: Any) -> None:
        if not isinstance(names, (list, tuple)):
            raise TypeError(f"adapter_names must be a list of names, one per sample, got {names!r}.")
        if self.training:
            raise ValueError("adapter_names is only supported for inference. Call model.eval() first.")
        unknown = sorted(set(names) - set(self.peft_config) - {BASE_MODEL})
        if unknown:
            raise ValueError(
                f"Unknown adapters in adapter_names: {', '.join(unknown)}. Available: {', '.join(self.peft_config)} "
                f"(and {BASE_MODEL} for no adapter)."
            )

    def add_weighted_adapter(self, *args: Any, **kwargs: Any) -> None:
        """Not supported: a weighted sum of LR-LoRA updates is not φ of one product."""
        raise NotImplementedError(
            "A weighted sum of LR-LoRA adapters cannot be stored as one LR-LoRA adapter. Export each as plain LoRA "
            "(`lrlora export`) and call add_weighted_adapter(..., combination_type='cat') on these, or merge both "
            "with weight 1: `model.merge_and_unload(adapter_names=['first', 'second'])`."
        )

    def merge_adapter(self, adapter_names: list[str] | None = None, safe_merge: bool = False) -> None:
        self._prepare_merge(adapter_names, safe_merge)
        super().merge_adapter(adapter_names=adapter_names, safe_merge=safe_merge)

    def merge_and_unload(
        self, progressbar: bool = False, safe_merge: bool = False, adapter_names: list[str] | None = None
    ) -> nn.Module:
        self._prepare_merge(adapter_names, safe_merge)
        return super().merge_and_unload(progressbar, safe_merge, adapter_names)

    def _prepare_merge(self, adapter_names: list[str] | None, safe_merge: bool) -> None:
        """Mark shared weights; with `safe_merge`, reject non-finite adapters before merging any layer."""
        layers = {path: module for path, module in self.model.named_modules() if isinstance(module, LrLoraLayer)}
        for path, layer in layers.items() if safe_merge else ():
            for name in adapter_names or layer.active_adapters:
                if not all(torch.isfinite(p).all() for p in layer.adapter_parameters(name)):
                    raise ValueError(
                        f"Merging {name} would produce non-finite values in the base weight of {path}, so nothing was "
                        "merged. Training has diverged: go back to an earlier checkpoint."
                    )
        users: dict[int, set[int]] = {}
        for module in self.model.modules():
            for parameter in module.parameters(recurse=False):
                users.setdefault(id(parameter), set()).add(id(module))
        for layer in layers.values():
            weight = getattr(layer.get_base_layer(), "weight", None)
            layer.shares_weight = len(users.get(id(weight), ())) > 1

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        # Keep the adapter on the device where its base layer computes. PEFT would move it to the device of the base
        # weight, which is meta if offloaded, and expect a `weight` in every wrapper when unloading.
        setattr(parent, child_name, new_module)

    def _create_and_replace(
        self,
        peft_config: Any,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,  # PEFT passes it for target_parameters only
    ) -> None:
        r_key = pattern_key(peft_config.rank_pattern, current_key)
        r = peft_config.rank_pattern.get(r_key, peft_config.r)
        alpha_key = pattern_key(peft_config.alpha_pattern, current_key)
        alpha = peft_config.alpha_pattern.get(alpha_key, peft_config.lora_alpha)
        adapter = (adapter_name, self._phi_of(peft_config, current_key), r, alpha, peft_config)
        if isinstance(target, LrLoraLayer):
            target.update_layer(*adapter)
            return
        if hasattr(getattr(target, "weight", None), "device_mesh"):
            raise ValueError(
                f"The weight of {current_key!r} is sharded over processes, by a tensor-parallel plan or FSDP2. Load "
                "the model without tp_plan, add the adapter, and then shard the model with FSDP2 or ZeRO-3."
            )
        backend = _quantization_backend(target, self.model)
        kind = _layer_class(target, backend)
        if kind is None:
            raise ValueError(_unsupported_message(target, current_key))
        if peft_config.fan_in_fan_out and not isinstance(target, Conv1D):
            warnings.warn(f"fan_in_fan_out=True is ignored for {current_key!r}, a torch.nn.Linear.", stacklevel=2)
        adapted = kind(target, *adapter, backend)
        if adapter_name not in self.active_adapters:
            adapted.requires_grad_(False)
        self._replace_module(parent, target_name, adapted, target)

    def _phi_of(self, config: LrLoraConfig, key: str) -> Form:
        """Return the form of layer `key`: new, or shared with an earlier layer."""
        group = key if config.sharing == "module" else ""
        if group not in self._shared:
            self._shared[group] = config.new_phi()
        return self._shared[group]

    @classmethod
    def _get_adapter_state_dict(
        cls,
        model: nn.Module,
        config: PeftConfig,
        adapter_name: str,
        state_dict: dict[str, Tensor],
        unwanted_adapter_names: list[str],
    ) -> dict[str, Tensor]:
        selected = super()._get_adapter_state_dict(model, config, adapter_name, state_dict, unwanted_adapter_names)
        modules, tokens = f".modules_to_save.{adapter_name}.", f".trainable_tokens_delta.{adapter_name}"
        full_weights = {name: t for name, t in state_dict.items() if modules in name or name.endswith(tokens)}
        remedy = "Training has diverged: go back to an earlier checkpoint."
        _require_finite({**selected, **full_weights}, "saved", remedy)
        return selected

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: PeftConfig, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        _require_finite(state_dict, "loaded", "The file is damaged: use another copy or an earlier checkpoint.")
        return super()._remap_adapter_state_dict_for_load(model, config, adapter_name, state_dict)


def _pass_adapter_names(
    names: list[str], module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    return args, {**kwargs, "adapter_names": names}


def _layer_class(module: nn.Module, backend: QuantizationBackend | None = None) -> type[LrLoraLayer] | None:
    """Adapter class for a module, or None."""
    # nn.MultiheadAttention reads its output projection's weight without calling the module.
    if isinstance(module, NonDynamicallyQuantizableLinear):
        return None
    if isinstance(module, nn.Embedding):
        return Embedding
    if isinstance(module, Conv.plain_types):
        return Conv
    is_linear = isinstance(module, (nn.Linear, Conv1D)) or (backend is not None and backend.layer_type == "linear")
    return Linear if is_linear else None


def _unsupported_message(module: nn.Module, key: str) -> str:
    if isinstance(module, BaseTunerLayer):
        method = type(module).__module__.removeprefix("peft.tuners.").split(".")[0]
        return (
            f"target_modules matches {key!r}, which {method} already adapts. LR-LoRA cannot be added on top of "
            "another method. Merge that adapter first (merge_and_unload)."
        )
    return (
        f"target_modules matches {key!r}, a {type(module).__name__}. LR-LoRA supports torch.nn.Linear, Embedding and "
        "Conv1d to Conv3d, quantized linear layers and transformers' Conv1D. Select only such modules, or add this "
        "one to exclude_modules."
    )


def _quantization_backend(module: nn.Module, model: nn.Module) -> QuantizationBackend | None:
    """PEFT's backend to read and write a quantized weight; None if not quantized."""
    # To merge, PEFT needs torchao's quantization settings. A manually quantized model does not record them, so it
    # supports training but not merging.
    arguments = get_quantization_kwargs(model)
    backend = resolve_quantization_backend(module, **{"get_apply_tensor_subclass": NotImplemented, **arguments})
    if isinstance(backend, TorchaoBackend) and not arguments:
        backend.supports_merge = False
    return backend


def _require_finite(state_dict: dict[str, Tensor], verb: str, remedy: str) -> None:
    for name, tensor in state_dict.items():
        if not tensor.is_meta and not torch.isfinite(tensor).all():
            raise ValueError(f"The adapter cannot be {verb}: {name} contains NaN or infinite values. {remedy}")
