"""The tuner: which layers get an adapter, which of them share a φ, and what may be saved and loaded."""

from __future__ import annotations

import warnings
from typing import Any, cast

import torch
from peft import PeftConfig
from peft.tuners.tuners_utils import BaseTuner
from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
from peft.utils.error import NoMatchingPeftModuleError
from peft.utils.other import get_pattern_key
from torch import Tensor, nn
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
        try:
            super().inject_adapter(model, adapter_name, *args, **kwargs)
        except NoMatchingPeftModuleError as error:
            names = {key.rpartition(".")[2] for key, module in model.named_modules() if _is_supported(module)}
            raise NoMatchingPeftModuleError(
                f"{error} The linear layers of this model are named: {', '.join(sorted(names)) or '(it has none)'}."
            ) from None

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
        transfer = self._find_shared_transfer(peft_config, adapter_name, current_key)
        transfer = transfer or Transfer(peft_config.transfer_spec)
        if isinstance(target, Linear):
            target.update_layer(adapter_name, transfer, r, alpha, peft_config)
            return
        if peft_config.fan_in_fan_out and not isinstance(target, Conv1D):
            warnings.warn(f"fan_in_fan_out=True is ignored for {current_key!r}, a torch.nn.Linear.", stacklevel=2)
        adapted = Linear(target, adapter_name, transfer, r, alpha, peft_config)
        if adapter_name not in self.active_adapters:
            adapted.requires_grad_(False)
        self._replace_module(parent, target_name, adapted, target)

    def _find_shared_transfer(self, config: LrLoraConfig, adapter_name: str, key: str) -> Transfer | None:
        """The φ of an earlier layer that the layer `key` shares by `config.sharing`, if there is one."""
        if config.sharing == "module":
            return None
        for other_key, module in self.model.named_modules():
            if not isinstance(module, LrLoraLayer) or adapter_name not in module.lrlora_phi:
                continue
            if config.sharing == "global" or module_type(other_key) == module_type(key):
                return cast(Transfer, module.lrlora_phi[adapter_name])
        return None

    @classmethod
    def _get_adapter_state_dict(cls, model: nn.Module, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        state_dict = super()._get_adapter_state_dict(model, *args, **kwargs)
        _require_finite(state_dict, "saved", "Training has diverged: go back to an earlier checkpoint.")
        return state_dict

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: PeftConfig, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        _require_finite(state_dict, "loaded", "The file is damaged: use another copy or an earlier checkpoint.")
        return super()._remap_adapter_state_dict_for_load(model, config, adapter_name, state_dict)


def _is_supported(module: nn.Module) -> bool:
    return isinstance(module, (Linear, nn.Linear, Conv1D))


def _require_finite(state_dict: dict[str, Tensor], verb: str, remedy: str) -> None:
    for name, tensor in state_dict.items():
        if not tensor.is_meta and not torch.isfinite(tensor).all():
            raise ValueError(f"The adapter cannot be {verb}: {name} holds NaN or infinite values. {remedy}")
