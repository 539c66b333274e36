"""Hosts of LoRA layers: PEFT's models, and models of transformers and diffusers after `add_adapter`."""

from __future__ import annotations

from typing import Any

from accelerate.utils import is_compiled_module
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from transformers import PreTrainedModel

from ..naming import PEFT_PREFIX

# Remedy where LoRA layers train without a call of their lora_A.
WITHOUT_KERNELS = (
    "Disable it (axolotl: lora_mlp_kernel, lora_qkv_kernel, lora_o_kernel; unsloth: lora_dropout above 0, with "
    "UNSLOTH_FUSED_LORA_DROPOUT=0 and UNSLOTH_COMPILE_DISABLE=1), or leave the module out of target_modules."
)


def host_of(model: Any) -> Any:
    """The host itself, or inside of a wrapper such as DDP, torch.compile, DeepSpeed or sentence-transformers.

    Raises:
        ValueError: there is none, or FSDP1 or DataParallel is around it.

    """
    modules = list(model.modules()) if isinstance(model, nn.Module) else []
    if any(isinstance(module, nn.DataParallel) for module in modules):
        raise ValueError("Fitted ranks do not support DataParallel, which copies the model. Use DDP (torchrun).")
    host: Any = next((module for module in modules if isinstance(module, PeftModel)), None)
    host = host or next((module for module in modules if getattr(module, "_hf_peft_config_loaded", False)), None)
    if host is None:
        raise ValueError(
            "Fitted ranks need a model with LoRA. Wrap the model with get_peft_model, or call "
            "model.add_adapter(LoraConfig(...)) of transformers or diffusers."
        )
    if any(hasattr(parameter, "_fsdp_flattened") for parameter in model.parameters()):
        raise ValueError(
            "Fitted ranks do not support FSDP1 (FullyShardedDataParallel), which flattens parameters. Use FSDP2 "
            "(fully_shard, or fsdp_version: 2)."
        )
    return host


def without_wrapper(model: Any) -> Any:
    """The model inside of DDP, DeepSpeed or torch.compile, whatever the names of a model's own submodules are."""
    while True:
        if is_compiled_module(model):
            model = model._orig_mod
        elif isinstance(model, DistributedDataParallel) or type(model).__module__.startswith("deepspeed."):
            model = model.module
        else:
            return model


def base_of(host: Any) -> nn.Module:
    """Module whose submodules have the names of the base model."""
    return host.get_base_model() if isinstance(host, PeftModel) else host


def prefix_of(host: Any) -> str:
    """Prefix of these names in the host's state dict."""
    return PEFT_PREFIX if isinstance(host, PeftModel) else ""


def active_adapters(host: Any) -> list[str]:
    """Names of the active adapters."""
    active = host.active_adapters
    return list(active() if callable(active) else active)


def saves_adapter(host: Any) -> bool:
    """Whether `save_pretrained` writes the adapter alone; of diffusers, it writes the whole model."""
    return isinstance(host, (PeftModel, PreTrainedModel))


def tuner_layers(model: nn.Module) -> list[tuple[str, Any]]:
    """Paths and adapted layers, without tokens and modules trained beside them, which are not a module's update."""
    wrappers = [module for module in model.modules() if isinstance(module, AuxiliaryTrainingWrapper)]
    auxiliary = {module for wrapper in wrappers for module in wrapper.modules()}
    return [
        (path.removeprefix(PEFT_PREFIX), module)
        for path, module in model.named_modules()
        if module not in auxiliary and isinstance(module, BaseTunerLayer)
    ]
