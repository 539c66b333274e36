"""Methods of `lrlora train`. Imports neither torch nor PEFT, for the command line."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

if TYPE_CHECKING:
    from peft import PeftConfig
    from transformers import TrainerCallback

DEFAULT_RANK = 8


@dataclass(frozen=True)
class PeftMethod:
    """A method in PEFT.

    Args:
        config_name: module and name of its configuration class; None for full fine-tuning.
        fixed: fields that define the method.
        rank: field name of the rank.
        alpha: field name of α, or None.
        scale: default α/r.
        has_ranks: whether a run records its ranks.

    Attributes:
        can_resume: whether a run can be resumed.
        has_penalty: whether the model adds a penalty to its loss, for which it must be loaded as trainable.

    """

    config_name: str | None
    fixed: Mapping[str, Any] = field(default_factory=dict)
    rank: str = "r"
    alpha: str | None = None
    scale: int = 1
    has_ranks: bool = False
    can_resume: ClassVar[bool] = True
    has_penalty: ClassVar[bool] = False

    @property
    def config(self) -> type[PeftConfig] | None:
        """Configuration class; None for full fine-tuning."""
        module, _, name = (self.config_name or "").rpartition(".")
        return getattr(importlib.import_module(module), name) if module else None

    def defaults(self, rank: int, total_steps: int) -> dict[str, Any]:
        """Default fields of the configuration."""
        return {self.rank: rank} | ({self.alpha: self.scale * rank} if self.alpha else {})

    def callbacks(self) -> list[TrainerCallback]:
        """Callbacks that its training needs."""
        return []

    def finish(self, model: Any) -> None:
        """Prepare a trained model for being saved."""


_LR_LORA, _LORA = "lrlora.tuner.LrLoraConfig", "peft.LoraConfig"
METHODS = {
    "lr-lora": PeftMethod(_LR_LORA, alpha="lora_alpha", has_ranks=True),
    "expansion": PeftMethod(_LR_LORA, {"form": "expansion"}, alpha="lora_alpha", scale=4, has_ranks=True),
    "lora": PeftMethod(_LORA, alpha="lora_alpha", has_ranks=True),
    "dora": PeftMethod(_LORA, {"use_dora": True}, alpha="lora_alpha"),
}
LEARNED = "fitted"  # LoRA whose ranks are fitted
