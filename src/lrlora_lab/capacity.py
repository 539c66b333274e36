"""Tasks on which rank binds: LoRA's own loss falls steeply with its r, so that a gain of rank can be seen.

    labels      random labels for real texts. Only the MLP of MiniLM's last layer is adapted, before a fixed random
                head, and what is measured is the loss on the labels themselves: how much the update can hold. `texts`
                and `classes` say how much is asked: texts · log2(classes) bits
    picture-labels  the same for pictures of animals, and the last MLP of a vision transformer
    phone-book  the telephone numbers, ten random digits each, of `texts` people's names. Only the MLP of one late layer
                of SmolLM2 is adapted, and what is measured is the loss on the numbers themselves and how many are
                recalled whole
    transfer    a byte-level language model, pretrained on English, goes on to another `corpus`; test loss in nats a
                byte
    language    SmolLM2, pretrained mostly on English, goes on to one; test loss in nats a token

What is tuned is the learning rate η and the scale s = α/r. Under Adam without weight decay, which takes no notice of
the scale of a gradient, these two are also all that LoRA+ (a rate of B's own) and another initial norm of A could
change: with A k times as large, ΔW = s·B·(kA) moves as with A as it was, at the rate η/k for A and the scale s·k.
"""

from __future__ import annotations

import math
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from peft import get_peft_model
from torch import nn
from transformers import get_cosine_schedule_with_warmup

from lrlora.checks import require_known, require_type
from lrlora.ranks import rank_report
from lrlora.train.methods import METHODS, adapter_config
from lrlora.train.progress import DivergedError

from .capacity_tasks import Setting, labels, picture_labels, transfer
from .methods import Method
from .smollm2 import language, phone_book

CORPORA = ("german", "source-code")
WARMUP_STEPS = 50
CLIP_NORM = 1.0


@dataclass(frozen=True)
class CapacityTask:
    """One task.

    Args:
        task: one of `KINDS`.
        steps, batch_size: of training, in texts or windows of a corpus.
        texts, classes: of "labels"; `texts` are the pictures of "picture-labels", and the names of a "phone-book".
        corpus: of "transfer" and "language".
        methods: what is trained on it unless asked for otherwise.
        rates: learning rates that adapters try first. Full fine-tuning tries a tenth of them, and adapters without a
            scale, HiRA and VeRA, eight times as much: the rate alone has to do what both do for the others.
        scales: values of s that may be tried, the first at first.
        climbs_diagonally: whether half the rate is tried with the next larger scale too, and twice the rate with the
            next smaller one: Adam's steps make the two alike, and the best may lie further along.

    Raises:
        ValueError: a value is unknown, or out of range.

    """

    task: str
    steps: int
    batch_size: int
    texts: int = 2_048
    classes: int = 64
    corpus: str = "german"
    methods: tuple[str, ...] = ()
    rates: tuple[float, ...] = (5e-3, 1e-2, 2e-2)
    scales: tuple[float, ...] = (4.0, 0.25, 1.0, 16.0, 64.0)
    climbs_diagonally: bool = False

    def __post_init__(self) -> None:
        for name in ("methods", "rates", "scales"):  # JSON and YAML know lists alone
            object.__setattr__(self, name, tuple(getattr(self, name)))
        require_type(self, CapacityTask, "task")
        require_known("kind of task on which rank binds", self.task, KINDS)
        require_known("corpus", self.corpus, CORPORA)
        for name in ("steps", "batch_size", "texts", "classes"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be a whole number ≥ 1, and is {getattr(self, name)}.")

    def first_rates(self, method: Method) -> tuple[float, ...]:
        """The learning rates that a method tries first."""
        if method.train == "full":
            return tuple(rate / 10 for rate in self.rates)
        return self.rates if METHODS[method.train].alpha else tuple(8 * rate for rate in self.rates)


KINDS: dict[str, Callable[[CapacityTask, int], Setting]] = {
    "labels": lambda task, seed: labels(task.texts, task.classes, task.batch_size, seed),
    "picture-labels": lambda task, seed: picture_labels(task.texts, task.classes, task.batch_size, seed),
    "phone-book": lambda task, seed: phone_book(task.texts, task.batch_size, seed),
    "transfer": lambda task, seed: transfer(task.corpus, task.batch_size, seed),
    "language": lambda task, seed: language(task.corpus, task.batch_size, seed),
}


def train_capacity(
    task: CapacityTask, method: Method, options: dict[str, Any], *, learning_rate: float, seed: int
) -> dict[str, Any]:
    """Train one method on one task.

    The seed draws labels, head, batches and factors; all methods see the same labels and batches.

    Args:
        task: what is trained on.
        method: what is trained; "full" trains the weights that adapters would adapt.
        options: fields of its PEFT configuration.
        learning_rate: η, the peak.
        seed: ≥ 0.

    Returns:
        `seconds` of processor time a step, `trainable` parameters, `validation` and `test` loss, `criterion`, the
        `ranks` of methods that have them.

    Raises:
        DivergedError: the loss is not finite.
        ValueError: the method cannot work.

    """
    setting = KINDS[task.task](task, seed)
    torch.manual_seed(seed)
    if method.train == "lr-lora":
        options = {**options, "pattern_seed": seed}
    model = _adapted(setting, task, method, options)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=learning_rate, weight_decay=0.0)
    schedule = get_cosine_schedule_with_warmup(optimizer, min(WARMUP_STEPS, task.steps // 10), task.steps)
    started = time.process_time()
    model.train()
    for loss in islice(setting.losses(model), task.steps):
        if not math.isfinite(loss.item()):
            raise DivergedError("Training has diverged: the loss is not finite.")
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(trained, CLIP_NORM)
        optimizer.step()
        schedule.step()
    seconds = (time.process_time() - started) / task.steps
    model.eval()
    validation = setting.validation(model)
    if not math.isfinite(validation):
        raise DivergedError("Training has diverged: the loss is not finite.")
    return {
        "seconds": seconds,
        "trainable": sum(parameter.numel() for parameter in trained),
        "validation": {"loss": validation},
        "criterion": validation,
        "test": setting.test(model),
        "ranks": rank_report(model) if method.has_ranks else None,
    }


def _adapted(setting: Setting, task: CapacityTask, method: Method, options: dict[str, Any]) -> Any:
    model = setting.model.requires_grad_(False)
    given = {} if method.train == "full" else {"target_modules": setting.targets, **options}
    config = adapter_config(method.train, {}, task.steps, given)
    if config is not None:
        return get_peft_model(model, config)
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and re.fullmatch(setting.targets, name):
            module.weight.requires_grad_(True)
    return model
