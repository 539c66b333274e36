"""PEFT configuration of a run."""

from __future__ import annotations

import copy
import inspect
import re
from collections.abc import Mapping
from typing import Any

from peft import PeftConfig

from ..checks import require_float32, require_known
from ..tuner.config import require_module_names
from .methods import DEFAULT_RANK, METHODS


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
    peft_method = METHODS[method]
    cls = peft_method.config
    if cls is None:
        return None
    names = fields_of(cls)
    for name in options:
        require_known(f"field of {cls.__name__}", name, names)
    if peft_method.rank != "r" and "r" in options:  # inherited from LoRA's configuration
        raise ValueError(f"The method {method} ignores r. Set {peft_method.rank}={options['r']} instead.")
    if isinstance(targets := options.get("target_modules"), str) and targets != "all-linear":
        # Module names; a regular expression would have to match full paths.
        are_names = re.fullmatch(r"\s*[\w.-]+(\s*,\s*[\w.-]+)*\s*", targets)
        options = {**options, "target_modules": re.findall(r"[\w.-]+", targets) if are_names else targets}
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
    defaults |= peft_method.defaults(
        options.get(peft_method.rank, DEFAULT_RANK), options.get("total_step", total_steps)
    )
    return cls(**{**defaults, **peft_method.fixed, **options})
