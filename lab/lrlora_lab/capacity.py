"""Tasks on which rank is the bottleneck: LoRA's loss falls steeply with r, so that a gain in rank is visible.

    labels      random labels of real texts. Adapts only the MLP of MiniLM's last layer, before a fixed random head,
                and measures the loss on the training labels: the capacity of the update. `texts` and `classes` set
                the demand: texts · log2(classes) bits
    picture-labels  the same for images of animals and the last MLP of a vision transformer
    phone-book  phone numbers, ten random digits each, of `texts` people. Adapts only the MLP of one late layer of
                SmolLM2, and measures the loss on the training numbers and the share recalled in full
    transfer    continued training of a byte-level English language model on another `corpus`; test loss in nats per
                byte
    language    continued training of SmolLM2, pretrained mostly on English, on another corpus; test loss in nats per
                token

Tuned are the learning rate η and the scale s = α/r. Under Adam without weight decay, which is invariant to the
gradient's scale, these two also cover LoRA+ (a separate rate of B) and another initial norm of A: with A k times as
large, ΔW = s·B·(kA) moves as with the original A, at the rate η/k for A and the scale s·k.
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
from transformers.pytorch_utils import Conv1D

from lrlora.checks import require_known, require_type
from lrlora.learned import FittedRanks
from lrlora.ranks import rank_report
from lrlora.train.adapter_config import adapter_config
from lrlora.train.methods import METHODS
from lrlora.train.progress import DivergedError

from .byte_model import ARCHITECTURES
from .capacity_tasks import Setting, labels, picture_labels, transfer
from .methods import Method
from .rivals import CRITERIA
from .smollm2 import language, phone_book

CORPORA = ("german", "source-code")
WARMUP_STEPS = 50
CLIP_NORM = 1.0


@dataclass(frozen=True)
class CapacityTask:
    """One task.

    Args:
        task: one of `KINDS`.
        steps, batch_size: of training; the batch counts texts or corpus windows.
        texts, classes: for "labels"; `texts` is also the number of images of "picture-labels" and names of a
            "phone-book".
        corpus: for "transfer" and "language".
        architecture: of the byte model of "transfer".
        methods: default methods.
        rates: initial learning rates of adapters; a single one with a single scale is not tuned. Full fine-tuning uses
            a tenth of them, and adapters without a scale, HiRA and VeRA, eight times as much, because their rate
            replaces both.
        scales: candidate values of s, initial one first.
        climbs_diagonally: also try half the rate with the next larger scale, and twice the rate with the next smaller
            one: Adam's steps make them similar, and the optimum may lie further along.

    Raises:
        ValueError: a value is unknown or out of range.

    """

    task: str
    steps: int
    batch_size: int
    texts: int = 2_048
    classes: int = 64
    corpus: str = "german"
    architecture: str = "opt"
    methods: tuple[str, ...] = ()
    rates: tuple[float, ...] = (5e-3, 1e-2, 2e-2)
    scales: tuple[float, ...] = (4.0, 0.25, 1.0, 16.0, 64.0)
    climbs_diagonally: bool = False

    def __post_init__(self) -> None:
        for name in ("methods", "rates", "scales"):  # JSON and YAML have only lists
            object.__setattr__(self, name, tuple(getattr(self, name)))
        require_type(self, CapacityTask, "task")
        require_known("kind of task on which rank binds", self.task, KINDS)
        require_known("corpus", self.corpus, CORPORA)
        require_known("architecture", self.architecture, ARCHITECTURES)
        for name in ("steps", "batch_size", "texts", "classes"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be an integer ≥ 1, got {getattr(self, name)}.")

    def first_rates(self, method: Method) -> tuple[float, ...]:
        """Initial learning rates of a method."""
        if method.train == "full":
            return tuple(rate / 10 for rate in self.rates)
        has_scale = METHODS[method.train].alpha and method.tunes_scale
        return self.rates if has_scale else tuple(8 * rate for rate in self.rates)


KINDS: dict[str, Callable[[CapacityTask, int], Setting]] = {
    "labels": lambda task, seed: labels(task.texts, task.classes, task.batch_size, seed),
    "picture-labels": lambda task, seed: picture_labels(task.texts, task.classes, task.batch_size, seed),
    "phone-book": lambda task, seed: phone_book(task.texts, task.batch_size, seed),
    "transfer": lambda task, seed: transfer(task.corpus, task.batch_size, seed, task.architecture),
    "language": lambda task, seed: language(task.corpus, task.batch_size, seed),
}


def train_capacity(
    task: CapacityTask, method: Method, rank: int, scale: float, *, learning_rate: float, seed: int
) -> dict[str, Any]:
    """Train one method on one task.

    The seed determines labels, head, batches and factors; all methods see the same labels and batches.

    Args:
        task: the task.
        method: the method; "full" trains the weights that adapters would adapt.
        rank: r of the comparison.
        scale: s.
        learning_rate: peak rate η.
        seed: ≥ 0.

    Returns:
        `seconds` of processor time per step, `trainable` parameters, `validation` and `test` loss, `criterion`, and
        `ranks` if the method has them.

    Raises:
        DivergedError: the loss is not finite.
        ValueError: the method cannot work.

    """
    setting = KINDS[task.task](task, seed)
    torch.manual_seed(seed)
    options = method.adapter(rank, scale)
    if method.train == "lr-lora":
        options = {**options, "pattern_seed": seed}
    model = _adapted(setting, task, method, options)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=learning_rate, weight_decay=0.0)
    schedule = get_cosine_schedule_with_warmup(optimizer, min(WARMUP_STEPS, task.steps // 10), task.steps)
    if size := method.size(rank):
        cut = dict(method.cut)
        if "by" in cut:
            cut["criterion"] = CRITERIA[cut.pop("by")]
        FittedRanks(model, optimizer, size=size, steps=task.steps, **cut)
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
        "trainable": sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad),
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
        if isinstance(module, (nn.Linear, Conv1D)) and re.fullmatch(setting.targets, name):
            module.weight.requires_grad_(True)
    return model
