"""Plugin for axolotl: `adapter: lrlora`.

    plugins: [lrlora.axolotl.LrLoraPlugin]
    adapter: lrlora
    lora_r: 16
    lora_alpha: 16
    lora_target_linear: true
    lrlora_size: r4

With `lrlora_size`, axolotl trains its own LoRA, whose ranks are fitted (`lrlora.FittedRanksCallback`); with
`lrlora_keep: 0.99`, its own LoRA, which is shrunk at the end (`lrlora.shrink`); without them, an LR-LoRA. The other
settings are axolotl's: `lora_r`, `lora_alpha`, `lora_target_modules`.
"""

from __future__ import annotations

from typing import Any

from axolotl.integrations.base import AdapterCapabilities, BasePlugin
from peft import LoraConfig, PeftModel, get_peft_model
from pydantic import BaseModel, Field, model_validator
from transformers import TrainerCallback

from .checks import check_truncation, require_known
from .learned import FittedRanksCallback, Size
from .tuner import LrLoraConfig

_NAME = "lrlora"
_KERNELS = ("lora_mlp_kernel", "lora_qkv_kernel", "lora_o_kernel")


class LrLoraArgs(BaseModel):
    """Settings of the plugin."""

    lrlora_size: str | None = Field(
        default=None, description="Size of the adapter after its ranks are fitted: r4, 200k parameters, or 4MiB."
    )
    lrlora_keep: float | None = Field(
        default=None,
        description="Share of the gain on the evaluation data to keep after training: 0.99.",
    )
    lrlora_config: dict[str, Any] | None = Field(
        default=None,
        description="Fields of LrLoraConfig, such as form: expansion. Not with the others.",
    )

    @model_validator(mode="before")
    @classmethod
    def _check_names(cls, settings: Any) -> Any:
        """Refuse misspelled settings, which axolotl ignores."""
        for name in settings if isinstance(settings, dict) else ():
            if name.startswith(_NAME):
                require_known("setting", name, cls.model_fields)
            if name in _KERNELS and settings[name] and ("lrlora_size" in settings or "lrlora_keep" in settings):
                raise ValueError(f"{name}: true replaces LoRA's forward, whose values fitted ranks need. Remove it.")
        return settings

    @model_validator(mode="after")
    def _check_together(self) -> LrLoraArgs:
        names = [name for name in ("lrlora_size", "lrlora_keep", "lrlora_config") if getattr(self, name) is not None]
        if len(names) > 1:
            raise ValueError(
                f"lrlora_size and lrlora_keep learn the ranks of a plain LoRA; got {' and '.join(names)}. Keep one of "
                "them, or lrlora_config for an LR-LoRA."
            )
        if self.lrlora_keep is not None:
            check_truncation(keep=self.lrlora_keep)
        if self.lrlora_size is not None:
            Size.parse(self.lrlora_size, "lrlora_size")
        if self.lrlora_config is not None:
            LrLoraConfig(**self.lrlora_config)
        return self


class LrLoraPlugin(BasePlugin):
    """Fitted ranks, or LR-LoRA, in axolotl."""

    def get_input_args(self) -> str:
        return f"{__name__}.{LrLoraArgs.__name__}"

    def get_adapter_capabilities(self) -> list[Any]:
        return [AdapterCapabilities(name=_NAME, lora_like=True)]

    def load_adapter(self, model: Any, cfg: Any, inference: bool = False, config_only: bool = False) -> Any:
        """LR-LoRA and its configuration; None, for axolotl's own LoRA, if ranks are fitted."""
        if cfg.adapter != _NAME or cfg.lrlora_size or cfg.lrlora_keep:
            return None
        from axolotl.loaders.adapter import load_adapter

        _, lora = load_adapter(model, cfg, "lora", config_only=True)
        config = LrLoraConfig(**_changed_fields(lora) | (cfg.lrlora_config or {}))
        if config_only:
            return None, config
        if cfg.lora_model_dir:
            return PeftModel.from_pretrained(model, cfg.lora_model_dir, is_trainable=not inference), config
        return get_peft_model(model, config), config

    def add_callbacks_pre_trainer(self, cfg: Any, model: Any) -> list[TrainerCallback]:
        return [FittedRanksCallback(cfg.lrlora_size)] if cfg.adapter == _NAME and cfg.lrlora_size else []

    def add_callbacks_post_trainer(self, cfg: Any, trainer: Any) -> list[TrainerCallback]:
        is_shrunk = cfg.adapter == _NAME and cfg.lrlora_keep
        return [FittedRanksCallback(keep=cfg.lrlora_keep, trainer=trainer)] if is_shrunk else []


def _changed_fields(config: LoraConfig) -> dict[str, Any]:
    """Fields that differ from their defaults, where axolotl sets [] for None; `LrLoraConfig` refuses what it lacks."""
    default = LoraConfig().to_dict()
    return {name: value for name, value in config.to_dict().items() if (value or None) != (default[name] or None)}
