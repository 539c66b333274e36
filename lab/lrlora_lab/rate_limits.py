"""The largest learning rate that a form bears: two linear layers, random labels, 100 steps, five seeds.

python -m lrlora_lab.rate_limits
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from lrlora import LrLoraConfig

from .sections import table

TARGETS: dict[str, Any] = {"r": 8, "target_modules": ["0", "2"]}
FORMS: dict[str, Callable[[], Any]] = {
    "LoRA": lambda: LoraConfig(**TARGETS),
    "φ": lambda: LrLoraConfig(**TARGETS),
    "φ, phi_lr_multiplier=1": lambda: LrLoraConfig(**TARGETS, phi_lr_multiplier=1.0),
    "φ, input_gain=300": lambda: LrLoraConfig(**TARGETS, input_gain=300.0),
    "the paper's form": lambda: LrLoraConfig.paper(**TARGETS),
    "expansion": lambda: LrLoraConfig(**TARGETS, form="expansion", num_terms=4),
}
RATES = [10 ** (half / 2) for half in range(-6, 5)]
SEEDS, STEPS = 5, 100


def bears(form: str, optimizer: type[torch.optim.Optimizer], rate: float, seed: int) -> bool:
    """Whether training ends below the loss of the start."""
    torch.manual_seed(seed)
    model: Any = get_peft_model(nn.Sequential(nn.Linear(10, 20), nn.ReLU(), nn.Linear(20, 2)), FORMS[form]())
    inputs, labels = torch.randn(64, 10), torch.randint(0, 2, (64,))
    steps = optimizer((p for p in model.parameters() if p.requires_grad), lr=rate)  # type: ignore[call-arg]
    losses = []
    for _ in range(STEPS + 1):
        loss = nn.functional.cross_entropy(model(inputs), labels)
        losses.append(loss.item())
        if not math.isfinite(losses[-1]):
            return False
        loss.backward()
        steps.step()
        steps.zero_grad()
    return losses[-1] < losses[0]


def limits() -> str:
    """Table: the largest of `RATES` up to which every seed ends below its start."""
    rows = []
    for form in FORMS:
        limits_of_form = []
        for optimizer in (torch.optim.SGD, torch.optim.AdamW):
            best = 0.0
            for rate in RATES:
                if not all(bears(form, optimizer, rate, seed) for seed in range(SEEDS)):
                    break
                best = rate
            limits_of_form.append(f"{best:.2g}")
        rows.append([form, *limits_of_form])
    return table(["form", "SGD", "AdamW"], rows)


if __name__ == "__main__":
    print(limits())
