"""What must not change σ²: padding, batches, the attention, the order of tokens; the unit: `test_directions`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from ..conftest import TinyModel
from .test_moments import curve_of, language_batches


@pytest.fixture(scope="module")
def subject() -> tuple[TinyModel, Any]:
    tiny = TinyModel("llama")
    model = get_peft_model(tiny.build(), LoraConfig(r=4, lora_alpha=8, **tiny.targets))
    tiny.train(model, 10)
    return tiny, model


def rises(model: Any, batches: list[Any], **options: Any) -> Tensor:
    """Of all directions of all modules."""
    return torch.cat([of.rises for of in curve_of(model, batches, **options).modules])


def require_equal(found: Tensor, expected: Tensor) -> None:
    """To 1e-5; for the least of them, of what rounding leaves of the largest."""
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-7 * expected.max().item())


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding(subject: tuple[TinyModel, Any], side: str) -> None:
    tiny, model = subject
    expected = rises(model, language_batches(tiny))
    require_equal(rises(model, language_batches(tiny, 5, side)), expected)


def test_the_kind_of_attention(subject: tuple[TinyModel, Any]) -> None:
    tiny, model = subject
    found = []
    for kind in ("eager", "sdpa"):
        model.get_base_model().set_attn_implementation(kind)
        found.append(rises(model, language_batches(tiny)))
    require_equal(*found)


def split(batch: dict[str, Tensor]) -> list[dict[str, Tensor]]:
    return [{name: part[i : i + 1] for name, part in batch.items()} for i in range(2)]


@pytest.mark.parametrize("order", [split, lambda batch: split(batch)[::-1]])
def test_batches_and_their_order(subject: tuple[TinyModel, Any], order: Callable[[Any], list[Any]]) -> None:
    tiny, model = subject
    (batch,) = language_batches(tiny)
    require_equal(rises(model, order(batch)), rises(model, [batch]))


class Bytes(nn.Module):
    """Tokens that do not see each other."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(8, 16), nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.tanh(self.first(x)))


def test_the_order_of_tokens() -> None:
    torch.manual_seed(0)
    model = get_peft_model(Bytes(), LoraConfig(r=4, target_modules=["first", "last"], init_lora_weights=False))
    x, labels = torch.randn(64, 8), torch.randint(5, (64,))

    def loss(model: Any, at: Tensor) -> tuple[Tensor, Tensor]:
        return nn.functional.cross_entropy(model(x[at]), labels[at], reduction="none"), torch.ones(len(at))

    found = [rises(model, [order], loss=loss) for order in (torch.arange(64), torch.randperm(64))]
    require_equal(*found)


def test_a_huge_gradient_beside_a_tiny_input_does_not_count() -> None:
    """As that of a pad before the first token, whose embedding is zero: a normalization multiplies its gradient."""
    torch.manual_seed(0)
    model = get_peft_model(Bytes(), LoraConfig(r=4, target_modules=["first", "last"], init_lora_weights=False))
    x = torch.randn(64, 8)
    pad = 1e-6 * torch.randn(1, 8)

    def loss(model: Any, pads: bool) -> tuple[Tensor, Tensor]:
        values = model(x).square().sum(1)
        sums, numbers = torch.cat([values, 1e3 * model(pad).sum(1)]), torch.cat([torch.ones(64), torch.zeros(1)])
        return (sums, numbers) if pads else (values, torch.ones(64))

    expected, found = (rises(model, [pads], loss=loss)[:4] for pads in (False, True))
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=0)
