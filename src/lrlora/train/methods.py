"""Methods of `lrlora train`, and the call that AdaLoRA needs in each step."""

from __future__ import annotations

import copy
import inspect
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from peft import AdaLoraConfig, LoraConfig, PeftConfig
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..checks import require_float32, require_known
from ..tuner import LrLoraConfig
from ..tuner.config import EXPANSION, require_module_names


@dataclass(frozen=True)
class PeftMethod:
    """A method in PEFT.

    Args:
        config: configuration class; None for full fine-tuning.
        fixed: fields that define the method.
        alpha: field name of α, or None.
        scale: default α/r.
        has_ranks: whether a run records its ranks.

    """

    config: type[PeftConfig] | None
    fixed: Mapping[str, Any] = field(default_factory=dict)
    alpha: str | None = None
    scale: int = 1
    has_ranks: bool = False


METHODS = {
    "lr-lora": PeftMethod(LrLoraConfig, alpha="lora_alpha", has_ranks=True),
    "expansion": PeftMethod(LrLoraConfig, {"form": EXPANSION}, alpha="lora_alpha", scale=4, has_ranks=True),
    "lora": PeftMethod(LoraConfig, alpha="lora_alpha", has_ranks=True),
    "dora": PeftMethod(LoraConfig, {"use_dora": True}, alpha="lora_alpha"),
    "adalora": PeftMethod(AdaLoraConfig),
    "full": PeftMethod(None),
}
DEFAULT_RANK = 8


def fields_of(config: type[PeftConfig] | None) -> list[str]:
    """Fields of a PEFT configuration; empty for full fine-tuning."""
    return [*inspect.signature(config.__init__).parameters][1:] if config else []


def adapter_config(
    method: str, head: Mapping[str, Any], total_steps: int, options: dict[str, Any]
) -> PeftConfig | None:
    """PEFT configuration of a method; None for full fine-tuning.

    Args:
        method: one of `METHODS`.
        head: configuration fields for the task's head; empty for a model as it is.
        total_steps: number of training steps, for AdaLoRA's schedule.
        options: configuration fields; default: r = 8, α = r (4·r for the expansion), all linear layers.

    Raises:
        ValueError: an unknown field or invalid value.

    """
    known = METHODS[method]
    if known.config is None:
        if options:
            raise ValueError(f"Full fine-tuning has no adapter, got adapter={options!r}. Remove it.")
        return None
    names = fields_of(known.config)
    for name in options:
        require_known(f"field of {known.config.__name__}", name, names)
    if isinstance(targets := options.get("target_modules"), str) and targets != "all-linear":
        # Module names; a regular expression would have to match full paths.
        names_alone = re.fullmatch(r"\s*[\w.-]+(\s*,\s*[\w.-]+)*\s*", targets)
        options = {**options, "target_modules": re.findall(r"[\w.-]+", targets) if names_alone else targets}
    if options.get("init_lora_weights") == "eva":
        raise ValueError(
            "adapter: init_lora_weights='eva' takes a pass over the data before training, which lrlora train does not "
            "make. Remove it, or call peft.initialize_lora_eva_weights in your own script."
        )
    if str(start := options.get("init_lora_weights")).startswith("pissa_niter"):
        raise ValueError(
            f"adapter: init_lora_weights={start!r} takes a randomized SVD out of the base weights, and another one "
            "when the adapter is loaded. Use init_lora_weights=pissa."
        )
    require_module_names(options)
    require_float32(options, "of adapter")
    defaults: dict[str, Any] = {"target_modules": "all-linear", **copy.deepcopy(dict(head))}  # PEFT may modify it
    if method == "adalora":
        if "r" in options:  # inherited from LoRA's configuration
            raise ValueError(f"AdaLoRA ignores r, got r={options['r']}. Set target_r={options['r']} instead.")
        rank = options.get("target_r", DEFAULT_RANK)
        # As in the paper: from 1.5 times the rank down to it, between a warm-up and a final phase.
        defaults |= {"target_r": rank, "init_r": round(1.5 * rank), "lora_alpha": rank, "total_step": total_steps}
        defaults |= {"tinit": total_steps // 10, "tfinal": total_steps // 2}
    else:
        rank = options.get("r", DEFAULT_RANK)
        defaults |= {"r": rank} | ({known.alpha: known.scale * rank} if known.alpha else {})
    return known.config(**{**defaults, **known.fixed, **options})


class AdaLoraCallback(TrainerCallback):
    """Makes AdaLoRA's call in the training loop, which PEFT leaves to its users.

    The rank pattern stays out of the configuration until the end: with it, PEFT would save each checkpoint in the
    shapes of its step, and could not load the best one into the final shapes. Masked singular values are exactly 0, so
    checkpoints in full shapes are equivalent.
    """

    def __init__(self) -> None:
        self._pattern: Any = None

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        # Called before the gradients, which it reads, are zeroed; steps count from 0, as in PEFT's example.
        tuner = kwargs["model"].base_model
        config = tuner.peft_config[tuner.trainable_adapter_name]
        config.rank_pattern = self._pattern
        tuner.update_and_allocate(state.global_step)
        self._pattern, config.rank_pattern = config.rank_pattern, None


def set_rank_pattern(model: Any) -> None:
    """Set AdaLoRA's rank pattern to the nonzero singular values, so that only they are saved."""
    tuner = model.base_model
    tuner.peft_config[tuner.trainable_adapter_name].rank_pattern = {
        name: (values != 0).flatten().tolist() for name, values in tuner.model.named_parameters() if ".lora_E." in name
    }
