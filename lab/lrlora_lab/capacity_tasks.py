"""Model, batches and losses of a capacity task for one seed: labels and bytes."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModel, AutoTokenizer

from lrlora.files import cache_folder, replacing
from lrlora.train.embedded import MINILM, checkpoint, load_movie_reviews

from .byte_model import base_model, load_corpus, mean_loss, sample_batch
from .inputs import load_animals, vision_model

TOKENS = 8  # tokens per text of `labels`, which determine the cost of a step
PICTURE = 42  # pixels: 3 × 3 patches, and one token for the whole image
HEAD_SCALE = 4.0  # scale of its logits: large enough to memorize the labels
EVALUATED_AT_ONCE = 256  # texts per batch
TEST_WINDOWS = 512


@dataclass
class Setting:
    """A task with one seed: model, losses of successive batches, and final measurements."""

    model: Any
    targets: str  # regular expression of the modules to adapt
    losses: Callable[[Any], Iterator[Tensor]]
    validation: Callable[[Any], float]
    test: Callable[[Any], dict[str, float]]


class LabelModel(nn.Module):
    """MLP of an encoder's last layer, and a fixed random head on its standardized, mean-pooled output.

    Forward: the MLP's input (examples, tokens, 384) → logits (examples, classes).
    """

    head: Tensor
    mean: Tensor
    deviation: Tensor

    def standardize(self, inputs: Tensor, head: Tensor) -> None:
        """Set the head, (classes, 384), and the statistics of all examples."""
        self.register_buffer("head", head)
        with torch.no_grad():
            pooled = torch.cat([self.pooled(some) for some in inputs.split(EVALUATED_AT_ONCE)])
        self.register_buffer("mean", pooled.mean(0))
        self.register_buffer("deviation", pooled.std(0))

    def pooled(self, x: Tensor) -> Tensor:
        """(examples, tokens, 384) → (examples, 384)."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        return ((self.pooled(x) - self.mean) / self.deviation) @ self.head.T


class TextLabels(LabelModel):
    """Last MLP of MiniLM."""

    def __init__(self, encoder: Any) -> None:
        super().__init__()
        layer = encoder.encoder.layer[-1]
        self.intermediate, self.output, self.norm = layer.intermediate.dense, layer.output.dense, layer.output.LayerNorm

    def pooled(self, x: Tensor) -> Tensor:
        return self.norm(self.output(F.gelu(self.intermediate(x))) + x).mean(1)


class PictureLabels(LabelModel):
    """Last MLP of the vision transformer, with norms before it and after the last layer."""

    def __init__(self, encoder: Any) -> None:
        super().__init__()
        layer = encoder.encoder.layer[-1]
        self.first, self.scale, self.norm = layer.norm2, layer.layer_scale2, encoder.layernorm
        self.intermediate, self.output = layer.mlp.fc1, layer.mlp.fc2

    def pooled(self, x: Tensor) -> Tensor:
        return self.norm(x + self.scale(self.output(F.gelu(self.intermediate(self.first(x)))))).mean(1)


def _text_inputs(encoder: Any, count: int) -> Tensor:
    """Inputs of the last MLP for the first `count` film reviews with 8 tokens: (count, 8, 384), float32."""
    tokenizer = AutoTokenizer.from_pretrained(checkpoint(MINILM))
    texts = list(load_movie_reviews()["train"]["text"])
    tokens = tokenizer(texts, truncation=True, max_length=TOKENS)["input_ids"]
    long_enough = [ids for ids in tokens if len(ids) == TOKENS]
    if len(long_enough) < count:
        raise ValueError(
            f"texts must be at most {len(long_enough):,}, the number of reviews with {TOKENS} tokens, got {count:,}."
        )
    return _seen_by(encoder, encoder.encoder.layer[-1].intermediate, torch.tensor(long_enough[:count]))


def _picture_inputs(encoder: Any, count: int) -> Tensor:
    """Residual inputs of the last MLP for the first `count` animals: (count, 10, 384), float32."""
    pictures = load_animals()["train"]
    if count > len(pictures):
        raise ValueError(f"texts must be at most {len(pictures):,}, the number of pictures, got {count:,}.")
    pixels = torch.stack([torch.from_numpy(np.array(row["image"])) for row in pictures.select(range(count))])
    spread = F.interpolate(pixels[:, None].float() / 255, size=(PICTURE, PICTURE), mode="bilinear")
    return _seen_by(encoder, encoder.encoder.layer[-1].norm2, (2 * spread - 1).expand(-1, 3, -1, -1))


def _seen_by(encoder: Any, module: nn.Module, examples: Tensor) -> Tensor:
    """Inputs of an encoder's module for these examples."""
    seen: list[Tensor] = []
    handle = module.register_forward_pre_hook(lambda module, arguments: seen.append(arguments[0]))
    with torch.no_grad():
        for some in examples.split(EVALUATED_AT_ONCE):
            encoder(some)
    handle.remove()
    return torch.cat(seen)


def _kept(name: str, compute: Callable[[], Tensor]) -> Tensor:
    """Compute a tensor once and cache it on disk."""
    path = cache_folder() / "capacity" / f"{name}.safetensors"
    if path.exists():
        return load_file(path)["inputs"]
    path.parent.mkdir(parents=True, exist_ok=True)
    inputs = compute()
    with replacing(path) as partial:
        save_file({"inputs": inputs}, partial)
    return inputs


def shuffled(count: int, batch_size: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Batches of indices, reshuffled for every pass."""
    while True:
        yield from torch.randperm(count, generator=generator).split(batch_size)


def labels(texts: int, classes: int, batch_size: int, seed: int) -> Setting:
    """Random labels of film reviews."""
    encoder = AutoModel.from_pretrained(checkpoint(MINILM)).eval()
    inputs = _kept(f"labels-{texts}-{TOKENS}", lambda: _text_inputs(encoder, texts))
    return _random_labels(TextLabels(encoder), inputs, classes, batch_size, seed)


def picture_labels(pictures: int, classes: int, batch_size: int, seed: int) -> Setting:
    """Random labels of pictures of animals."""
    encoder = AutoModel.from_pretrained(vision_model()).eval()
    inputs = _kept(f"picture-labels-{pictures}-{PICTURE}", lambda: _picture_inputs(encoder, pictures))
    return _random_labels(PictureLabels(encoder), inputs, classes, batch_size, seed)


def _random_labels(model: LabelModel, inputs: Tensor, classes: int, batch_size: int, seed: int) -> Setting:
    count = len(inputs)
    generator = torch.Generator().manual_seed(seed)
    targets = torch.randint(0, classes, (count,), generator=generator)
    width = inputs.shape[-1]
    model.standardize(inputs, torch.randn(classes, width, generator=generator) * (HEAD_SCALE / math.sqrt(width)))

    def losses(model: Any) -> Iterator[Tensor]:
        for some in shuffled(count, batch_size, generator):
            yield F.cross_entropy(model(inputs[some]), targets[some])

    @torch.no_grad()
    def whole(model: Any) -> float:
        logits = torch.cat([model(some) for some in inputs.split(EVALUATED_AT_ONCE)])
        return F.cross_entropy(logits, targets).item()

    return Setting(model, "intermediate|output", losses, whole, lambda model: {"loss": whole(model)})


def transfer(corpus: str, batch_size: int, seed: int, architecture: str = "opt") -> Setting:
    """Continued byte-model training."""
    data, generator = load_corpus(corpus), torch.Generator().manual_seed(seed)
    of_base = load_corpus("english").test

    def losses(model: Any) -> Iterator[Tensor]:
        while True:
            windows = sample_batch(data.train, generator, batch_size)
            yield model(input_ids=windows, labels=windows).loss

    return Setting(
        base_model(architecture),
        r".*\.(\w+_proj|fc\d|c_\w+)",
        losses,
        lambda model: mean_loss(model, data.validation, TEST_WINDOWS),
        lambda model: {
            "loss": mean_loss(model, data.test, TEST_WINDOWS),
            "base": mean_loss(model, of_base, TEST_WINDOWS),
        },
    )
