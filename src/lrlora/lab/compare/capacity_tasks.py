"""What a task on which rank binds consists of, with one seed: model, batches and losses. Here: labels, bytes."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModel, AutoTokenizer

from ...files import cache_folder, replacing
from ..inputs import MINILM, checkpoint
from ..tasks import MOVIE_REVIEW_TASK
from .byte_model import base_model, mean_loss, sample_batch
from .corpora import load_corpus

TOKENS = 8  # of a text of `labels`: what a step costs
HEAD_SCALE = 4.0  # of its logits: high enough that the labels can be learned by heart
EVALUATED_AT_ONCE = 256  # texts
TEST_WINDOWS = 512


@dataclass
class Setting:
    """A task with one seed: a model, the loss of its batches in turn, and what to measure at the end."""

    model: Any
    targets: str  # the modules to adapt, a regular expression
    losses: Callable[[Any], Iterator[Tensor]]
    validation: Callable[[Any], float]
    test: Callable[[Any], dict[str, float]]


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


def shuffled(count: int, batch_size: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Batches of indices, one pass after the other, each in a new order."""
    while True:
        yield from torch.randperm(count, generator=generator).split(batch_size)


def labels(texts: int, classes: int, batch_size: int, seed: int) -> Setting:
    """Random labels of film reviews."""
    encoder = AutoModel.from_pretrained(checkpoint(MINILM)).eval()
    inputs = _label_inputs(encoder, texts)
    generator = torch.Generator().manual_seed(seed)
    targets = torch.randint(0, classes, (texts,), generator=generator)
    width = inputs.shape[-1]
    head = torch.randn(classes, width, generator=generator) * (HEAD_SCALE / math.sqrt(width))

    def losses(model: Any) -> Iterator[Tensor]:
        for some in shuffled(texts, batch_size, generator):
            yield F.cross_entropy(model(inputs[some]), targets[some])

    @torch.no_grad()
    def whole(model: Any) -> float:
        logits = torch.cat([model(some) for some in inputs.split(EVALUATED_AT_ONCE)])
        return F.cross_entropy(logits, targets).item()

    model = LabelModel(encoder.encoder.layer[-1], inputs, head)
    return Setting(model, "intermediate|output", losses, whole, lambda model: {"loss": whole(model)})


def transfer(corpus: str, batch_size: int, seed: int) -> Setting:
    """The byte-level model goes on to a corpus."""
    data, generator = load_corpus(corpus), torch.Generator().manual_seed(seed)

    def losses(model: Any) -> Iterator[Tensor]:
        while True:
            windows = sample_batch(data.train, generator, batch_size)
            yield model(input_ids=windows, labels=windows).loss

    return Setting(
        base_model(),
        r".*\.(\w+_proj|fc\d)",
        losses,
        lambda model: mean_loss(model, data.validation, TEST_WINDOWS),
        lambda model: {"loss": mean_loss(model, data.test, TEST_WINDOWS)},
    )
