"""Tasks on which rank binds: LoRA's own loss falls steeply with its r, so that a gain of rank can be seen.

    labels      random labels for real texts. Only the MLP of MiniLM's last layer is adapted, before a fixed random
                head, and what is measured is the loss on the labels themselves: how much the update can hold. `texts`
                and `classes` say how much is asked: texts · log2(classes) bits
    transfer    a byte-level language model, pretrained on English, goes on to another `corpus`; test loss in nats a
                byte

What is tuned is the learning rate η and the scale s = α/r. Under Adam without weight decay, which takes no notice of
the scale of a gradient, these two are also all that LoRA+ (a rate of B's own) and another initial norm of A could
change: with A k times as large, ΔW = s·B·(kA) moves as with A as it was, at the rate η/k for A and the scale s·k.
"""

from __future__ import annotations

import math
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
import torch.nn.functional as F
from peft import get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModel, AutoTokenizer, get_cosine_schedule_with_warmup

from ...checks import require_known, require_type
from ...files import cache_folder, replacing
from ...rank import rank_report
from ..inputs import MINILM, checkpoint
from ..methods import ALPHA, adapter_config
from ..tasks import MOVIE_REVIEW_TASK
from .byte_model import base_model, mean_loss, sample_batch
from .corpora import load_corpus
from .methods import Method

KINDS = ("labels", "transfer")
CORPORA = ("german", "source-code")
WARMUP_STEPS = 50
CLIP_NORM = 1.0
TOKENS = 8  # of a text of `labels`: what a step costs
HEAD_SCALE = 4.0  # of its logits: high enough that the labels can be learned by heart
EVALUATED_AT_ONCE = 256  # texts
TEST_WINDOWS = 512


@dataclass(frozen=True)
class CapacityTask:
    """One task.

    Args:
        kind: one of `KINDS`.
        steps, batch_size: of training, in texts or windows of 128 bytes.
        texts, classes: of "labels".
        corpus: of "transfer".
        methods: what is trained on it unless asked for otherwise.
        rates: learning rates that adapters try first. Full fine-tuning tries a tenth of them, and adapters without a
            scale, HiRA and VeRA, eight times as much: the rate alone has to do what both do for the others.
        scales: values of s = α/r that may be tried, the first at first.

    Raises:
        ValueError: a value is unknown, or out of range.

    """

    kind: str
    steps: int
    batch_size: int
    texts: int = 2_048
    classes: int = 64
    corpus: str = "german"
    methods: tuple[str, ...] = ()
    rates: tuple[float, ...] = (5e-3, 1e-2, 2e-2)
    scales: tuple[float, ...] = (4.0, 0.25, 1.0, 16.0, 64.0)

    def __post_init__(self) -> None:
        for name in ("methods", "rates", "scales"):  # JSON and YAML know lists alone
            object.__setattr__(self, name, tuple(getattr(self, name)))
        require_type(self, CapacityTask, "task")
        require_known("kind of task on which rank binds", self.kind, KINDS)
        require_known("corpus", self.corpus, CORPORA)
        for name in ("steps", "batch_size", "texts", "classes"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be a whole number ≥ 1, and is {getattr(self, name)}.")

    def first_rates(self, method: Method) -> tuple[float, ...]:
        """The learning rates that a method tries first."""
        if method.train == "full":
            return tuple(rate / 10 for rate in self.rates)
        return self.rates if method.train in ALPHA else tuple(8 * rate for rate in self.rates)


class LabelModel(nn.Module):
    """The MLP of MiniLM's last layer, and a fixed random head on its standardised, mean-pooled output.

    Forward: the input of the MLP (texts, tokens, 384) → logits (texts, classes).

    Args:
        layer: of the encoder.
        inputs: of all texts, to standardise by.
        head: (classes, 384).

    """

    head: Tensor
    mean: Tensor
    deviation: Tensor

    def __init__(self, layer: Any, inputs: Tensor, head: Tensor) -> None:
        super().__init__()
        self.intermediate, self.output, self.norm = layer.intermediate.dense, layer.output.dense, layer.output.LayerNorm
        self.register_buffer("head", head)
        with torch.no_grad():
            pooled = torch.cat([self._pooled(some) for some in inputs.split(EVALUATED_AT_ONCE)])
        self.register_buffer("mean", pooled.mean(0))
        self.register_buffer("deviation", pooled.std(0))

    def _pooled(self, x: Tensor) -> Tensor:
        return self.norm(self.output(F.gelu(self.intermediate(x))) + x).mean(1)

    def forward(self, x: Tensor) -> Tensor:
        return ((self._pooled(x) - self.mean) / self.deviation) @ self.head.T


def _label_inputs(encoder: Any, count: int) -> Tensor:
    """What the MLP of the last layer sees of the first `count` film reviews of 8 tokens: (count, 8, 384), float32.

    Computed once, and kept in the cache.
    """
    path = cache_folder() / "capacity" / f"labels-{count}-{TOKENS}.safetensors"
    if path.exists():
        return load_file(path)["inputs"]
    tokenizer = AutoTokenizer.from_pretrained(checkpoint(MINILM))
    texts = list(MOVIE_REVIEW_TASK.load()["train"]["text"])
    tokens = tokenizer(texts, truncation=True, max_length=TOKENS)["input_ids"]
    long_enough = [ids for ids in tokens if len(ids) == TOKENS]
    if len(long_enough) < count:
        raise ValueError(
            f"texts must be at most {len(long_enough):,}, the reviews of {TOKENS} tokens, and is {count:,}."
        )
    seen: list[Tensor] = []
    dense = encoder.encoder.layer[-1].intermediate
    handle = dense.register_forward_pre_hook(lambda module, arguments: seen.append(arguments[0]))
    with torch.no_grad():
        for some in torch.tensor(long_enough[:count]).split(EVALUATED_AT_ONCE):
            encoder(some)
    handle.remove()
    path.parent.mkdir(parents=True, exist_ok=True)
    inputs = torch.cat(seen)
    with replacing(path) as partial:
        save_file({"inputs": inputs}, partial)
    return inputs


@dataclass
class _Setting:
    """A task with one seed: a model, the loss of its batches in turn, and what to measure at the end."""

    model: Any
    targets: str  # the modules to adapt, a regular expression
    losses: Callable[[Any], Iterator[Tensor]]
    validation: Callable[[Any], float]
    test: Callable[[Any], float]


def _labels(task: CapacityTask, seed: int) -> _Setting:
    encoder = AutoModel.from_pretrained(checkpoint(MINILM)).eval()
    inputs = _label_inputs(encoder, task.texts)
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, task.classes, (task.texts,), generator=generator)
    width = inputs.shape[-1]
    head = torch.randn(task.classes, width, generator=generator) * (HEAD_SCALE / math.sqrt(width))

    def losses(model: Any) -> Iterator[Tensor]:
        while True:
            order = torch.randperm(task.texts, generator=generator)
            for some in order.split(task.batch_size):
                yield F.cross_entropy(model(inputs[some]), labels[some])

    @torch.no_grad()
    def whole(model: Any) -> float:
        logits = torch.cat([model(some) for some in inputs.split(EVALUATED_AT_ONCE)])
        return F.cross_entropy(logits, labels).item()

    model = LabelModel(encoder.encoder.layer[-1], inputs, head)
    return _Setting(model, "intermediate|output", losses, whole, whole)


def _transfer(task: CapacityTask, seed: int) -> _Setting:
    corpus, generator = load_corpus(task.corpus), torch.Generator().manual_seed(seed)

    def losses(model: Any) -> Iterator[Tensor]:
        while True:
            windows = sample_batch(corpus.train, generator, task.batch_size)
            yield model(input_ids=windows, labels=windows).loss

    return _Setting(
        base_model(),
        r".*\.(\w+_proj|fc\d)",
        losses,
        lambda model: mean_loss(model, corpus.validation, TEST_WINDOWS),
        lambda model: mean_loss(model, corpus.test, TEST_WINDOWS),
    )


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
        ValueError: the method cannot work, or training diverged.

    """
    setting = {"labels": _labels, "transfer": _transfer}[task.kind](task, seed)
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
            raise ValueError("Training has diverged: the loss is not finite.")
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(trained, CLIP_NORM)
        optimizer.step()
        schedule.step()
    seconds = (time.process_time() - started) / task.steps
    model.eval()
    validation = setting.validation(model)
    if not math.isfinite(validation):
        raise ValueError("Training has diverged: the loss is not finite.")
    return {
        "seconds": seconds,
        "trainable": sum(parameter.numel() for parameter in trained),
        "validation": {"loss": validation},
        "criterion": validation,
        "test": {"loss": setting.test(model)},
        "ranks": rank_report(model) if method.has_ranks else None,
    }


def _adapted(setting: _Setting, task: CapacityTask, method: Method, options: dict[str, Any]) -> Any:
    model = setting.model.requires_grad_(False)
    given = {} if method.train == "full" else {"target_modules": setting.targets, **options}
    config = adapter_config(method.train, {}, task.steps, given)
    if config is not None:
        return get_peft_model(model, config)
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and re.fullmatch(setting.targets, name):
            module.weight.requires_grad_(True)
    return model
