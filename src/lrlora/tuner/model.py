"""The tuner: which layers get an adapter, which of them share a φ, and what may be saved and loaded."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any, cast

import torch
from peft import PeftConfig
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
from peft.utils.error import NoMatchingPeftModuleError
from peft.utils.other import get_pattern_key
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from transformers.pytorch_utils import Conv1D

from ..rank import module_type
from ..transfer import Transfer
from .config import LrLoraConfig
from .layer import Linear, LrLoraLayer


class LrLoraModel(BaseTuner):
    """Puts LR-LoRA adapters on a model. Used through `peft.get_peft_model(model, LrLoraConfig(...))`.

    Raises:
        NoMatchingPeftModuleError: `target_modules` matches nothing; the message lists what the model has.
        ValueError: a targeted module is of a kind that has no adapter.

    """

    prefix = "lrlora_"
    tuner_layer_cls = LrLoraLayer
    target_module_mapping = cast(dict[str, list[str]], TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING)

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        # What layers of this injection share; a later one, even of the same name, starts anew.
        self._shared_transfers: dict[str, Transfer] = {}
        try:
            super().inject_adapter(model, adapter_name, *args, **kwargs)
        except NoMatchingPeftModuleError as error:
            names = sorted({path.rpartition(".")[2] for path, _ in _adaptable_modules(model)})
            raise NoMatchingPeftModuleError(
                f"{error} The linear layers of this model are named: {', '.join(names) or '(it has none)'}."
            ) from None

    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> AbstractContextManager[None]:
        # Without this PEFT would take the argument, drop it, and run every sample through the active adapter.
        if kwargs.get("adapter_names") is not None:
            raise NotImplementedError(
                "adapter_names= (another adapter for each sample of a batch) is not supported by LR-LoRA. Run the "
                "samples of each adapter in a batch of their own, after set_adapter."
            )
        return nullcontext()

    def _create_and_replace(
        self,
        peft_config: Any,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        if not _is_supported(target):
            raise ValueError(
                f"target_modules matches {current_key!r}, a {type(target).__name__}. LR-LoRA adapts torch.nn.Linear "
                "and transformers' Conv1D: name only such modules, or add this one to exclude_modules."
            )
        r_key = get_pattern_key(list(peft_config.rank_pattern), current_key)
        r = peft_config.rank_pattern.get(r_key, peft_config.r)
        alpha_key = get_pattern_key(list(peft_config.alpha_pattern), current_key)
        alpha = peft_config.alpha_pattern.get(alpha_key, peft_config.lora_alpha)
        transfer = self._transfer_of(peft_config, current_key)
        if isinstance(target, Linear):
            target.update_layer(adapter_name, transfer, r, alpha, peft_config)
            return
        if peft_config.fan_in_fan_out and not isinstance(target, Conv1D):
            warnings.warn(f"fan_in_fan_out=True is ignored for {current_key!r}, a torch.nn.Linear.", stacklevel=2)
        adapted = Linear(target, adapter_name, transfer, r, alpha, peft_config)
        if adapter_name not in self.active_adapters:
            adapted.requires_grad_(False)
        self._replace_module(parent, target_name, adapted, target)

    def _transfer_of(self, config: LrLoraConfig, key: str) -> Transfer:
        """The φ of the layer `key`: a new one, or that of an earlier layer it shares one with."""
        sharers = {"module": key, "type": module_type(key), "global": ""}[config.sharing]
        return self._shared_transfers.setdefault(sharers, Transfer(config.transfer_spec))

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
        in_full = {name: t for name, t in state_dict.items() if f".modules_to_save.{adapter_name}." in name}
        remedy = "Training has diverged: go back to an earlier checkpoint."
        _require_finite({**selected, **in_full}, "saved", remedy)
        return selected

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: PeftConfig, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        _require_finite(state_dict, "loaded", "The file is damaged: use another copy or an earlier checkpoint.")
        return super()._remap_adapter_state_dict_for_load(model, config, adapter_name, state_dict)


def _is_supported(module: nn.Module) -> bool:
    # nn.MultiheadAttention reads the weight of its output projection without ever calling the module.
    return isinstance(module, (Linear, nn.Linear, Conv1D)) and not isinstance(module, NonDynamicallyQuantizableLinear)


def _adaptable_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Path and module of every layer that can be adapted, without the insides of adapted ones."""
    adapted: tuple[str, ...] = ()
    for path, module in model.named_modules():
        if path.startswith(adapted):
            continue
        if isinstance(module, BaseTunerLayer):
            adapted = (*adapted, f"{path}.")
        if _is_supported(module):
            yield path, module


def _require_finite(state_dict: dict[str, Tensor], verb: str, remedy: str) -> None:
    for name, tensor in state_dict.items():
        if not tensor.is_meta and not torch.isfinite(tensor).all():
            raise ValueError(f"The adapter cannot be {verb}: {name} holds NaN or infinite values. {remedy}")
