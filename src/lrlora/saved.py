"""Saved adapters, checked: PEFT leaves out of them what does not fit, and says little of it."""

from __future__ import annotations

import os
from typing import Any

from peft import PeftModel, get_peft_model_state_dict
from peft.utils import load_peft_weights

from .files import readable
from .tuner.skeleton import load_on_skeleton

EXPECTED = "Expected are the adapter_config.json and adapter_model.safetensors that save_pretrained wrote."


def load_measurable(adapter: str | os.PathLike[str], *, with_base_weights: bool = False) -> PeftModel:
    """What `load_on_skeleton` makes of a saved adapter, if its files are whole.

    Raises:
        ValueError: they are not.

    """
    name = os.fspath(adapter)
    with readable(name, EXPECTED):
        model = load_on_skeleton(name, with_base_weights=with_base_weights)
        require_all_weights(model, name)
    return model


def require_all_weights(model: PeftModel, name: str) -> None:
    """Raise a ValueError unless a saved LR-LoRA adapter holds the weights of the model made of it, and no more.

    What is missing would stay as it starts, and what has another name would be left out.
    """
    config: Any = model.peft_config["default"]
    if config.peft_type.value != "LRLORA":
        return  # other methods have had other names for their weights
    wanted = set(get_peft_model_state_dict(model, save_embedding_layers=False))
    there = set(load_peft_weights(name, device="cpu"))
    for what, keys in (
        ("lacks", wanted - there),
        ("does not fit its configuration, which knows no", {key for key in there - wanted if ".lrlora_" in key}),
    ):
        if keys:
            raise ValueError(f"The adapter {name} {what} {min(keys)} ({len(keys)} of such weights). {EXPECTED}")
