"""Models and data of the studies: the byte model on corpora, and MiniLM on texts with labels."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from lrlora.train.embedded import EMBEDDED_DATA, MINILM, checkpoint

from .byte_model import CONTEXT, base_model, load_corpus, mean_loss, sample_batch

_HELD_OUT = 320
_TEXTS = 48  # tokens


@dataclass(frozen=True)
class Data:
    """Model and data of a seed.

    Attributes:
        model: the base, without an adapter.
        targets: modules to adapt.
        batches: training batches, endless.
        held_out: batches for the cut.
        test: returns loss, and accuracy where there is one.
        kept: modules trained besides.

    """

    model: Any
    targets: str
    batches: Callable[[], Iterator[Any]]
    held_out: list[Any]
    test: Callable[[Any], dict[str, float]]
    kept: list[str] | None = None


def bytes_task(corpus: str, size: int = 8) -> Callable[[int], Data]:
    """Byte model and a corpus, in batches of a size; of a seed."""

    def load(seed: int) -> Data:
        data, generator = load_corpus(corpus), torch.Generator().manual_seed(seed)

        def batch(of: Tensor, size: int, source: torch.Generator) -> dict[str, Tensor]:
            windows = sample_batch(of, source, size)
            return {"input_ids": windows, "labels": windows}

        def batches() -> Iterator[Any]:
            while True:
                yield batch(data.train, size, generator)

        other = torch.Generator().manual_seed(1_000 + seed)
        held_out = [batch(data.validation, 16, other) for _ in range(_HELD_OUT // 16)]
        windows = min(512, len(data.test) // CONTEXT)
        return Data(
            base_model(),
            r".*\.(\w+_proj|fc\d)",
            batches,
            held_out,
            lambda model: {"loss": mean_loss(model, data.test, windows)},
        )

    return load


def texts_task(name: str, size: int = 16, *, are_random: bool = False) -> Callable[[int], Data]:
    """MiniLM and texts with labels, in batches of a size; of a seed."""

    def load(seed: int) -> Data:
        splits, generator = EMBEDDED_DATA[name].load(), torch.Generator().manual_seed(seed)
        tokenizer = AutoTokenizer.from_pretrained(checkpoint(MINILM))
        classes = splits["train"].features["label"].num_classes
        train = splits["train"].shuffle(seed=seed)
        labels = torch.tensor(list(train["label"]))
        if are_random:
            labels = torch.randint(classes, (len(labels),), generator=generator)
        texts, count = list(train["text"]), len(train) - _HELD_OUT

        def batch(rows: list[int]) -> Any:
            encoded = tokenizer([texts[row] for row in rows], truncation=True, max_length=_TEXTS, padding=True)
            return {**{key: torch.tensor(value) for key, value in encoded.items()}, "labels": labels[rows]}

        def batches() -> Iterator[Any]:
            while True:
                for rows in torch.randperm(count, generator=generator)[: count // size * size].split(size):
                    yield batch(rows.tolist())

        @torch.no_grad()
        def test(model: Any) -> dict[str, float]:
            found, right, total = 0.0, 0, min(2_000, len(splits["test"]))
            for rows in splits["test"].shuffle(seed=0).select(range(total)).batch(50):
                encoded = tokenizer(rows["text"], truncation=True, max_length=_TEXTS, padding=True, return_tensors="pt")
                logits, correct = model(**encoded).logits, torch.tensor(rows["label"])
                found += nn.functional.cross_entropy(logits, correct, reduction="sum").item()
                right += int((logits.argmax(1) == correct).sum())
            return {"loss": found / total, "accuracy": right / total}

        torch.manual_seed(seed)
        model = AutoModelForSequenceClassification.from_pretrained(checkpoint(MINILM), num_labels=classes)
        held_out = [batch(list(range(first, first + 16))) for first in range(count, count + _HELD_OUT, 16)]
        return Data(model, r".*layer.*(query|key|value|dense)", batches, held_out, test, ["classifier"])

    return load
