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
        can_shard: whether its factors and gradients can be sharded.
        has_penalty: whether the model adds a penalty to its loss, for which it must be loaded as trainable.

    """

    config_name: str | None
    fixed: Mapping[str, Any] = field(default_factory=dict)
    rank: str = "r"
    alpha: str | None = None
    scale: int = 1
    has_ranks: bool = False
    can_resume: ClassVar[bool] = True
    can_shard: ClassVar[bool] = True
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


class AdaLora(PeftMethod):
    """AdaLoRA, which needs a call in each step, and whose rank allocation PEFT does not save."""

    can_resume, can_shard, has_penalty = False, False, True

    def defaults(self, rank: int, total_steps: int) -> dict[str, Any]:
        # As in the paper: from 1.5 times the rank down to it, between a warm-up and a final phase.
        schedule = {"total_step": total_steps, "tinit": total_steps // 10, "tfinal": total_steps // 2}
        return super().defaults(rank, total_steps) | schedule | {"init_r": round(1.5 * rank)}

    def callbacks(self) -> list[TrainerCallback]:
        from .adalora import AdaLoraCallback

        return [AdaLoraCallback()]

    def finish(self, model: Any) -> None:
        from .adalora import set_rank_pattern

        set_rank_pattern(model)


_LR_LORA, _LORA = "lrlora.tuner.LrLoraConfig", "peft.LoraConfig"
METHODS = {
    "lr-lora": PeftMethod(_LR_LORA, alpha="lora_alpha", has_ranks=True),
    "expansion": PeftMethod(_LR_LORA, {"form": "expansion"}, alpha="lora_alpha", scale=4, has_ranks=True),
    "lora": PeftMethod(_LORA, alpha="lora_alpha", has_ranks=True),
    "dora": PeftMethod(_LORA, {"use_dora": True}, alpha="lora_alpha"),
    "adalora": AdaLora("peft.AdaLoraConfig", rank="target_r", alpha="lora_alpha"),
    "full": PeftMethod(None),
}
LEARNED = "learned"  # LoRA whose ranks are learned
