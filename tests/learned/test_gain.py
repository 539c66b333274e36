"""The share of the gain that a smaller adapter keeps, and its interval."""

from __future__ import annotations

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from torch import Tensor

from lrlora.learned import Gain, model_loss
from lrlora.learned.gain import losses_of

from ..conftest import TinyModel
from .test_moments import language_batches


def draw(count: int, generator: torch.Generator, lost: float = 0.02) -> tuple[Tensor, Tensor, Tensor]:
    """Losses of examples that differ by far more than those of two adapters on one example; the gain is 1."""
    hard = 3 * torch.rand(count, generator=generator).double()
    terms = torch.ones(count).double()
    noise = [torch.randn(count, generator=generator).double() for _ in range(2)]
    without, whole = hard + 1 + 0.3 * noise[0], hard
    return tuple(torch.stack([part, terms], 1) for part in (without, whole, whole + lost + 0.1 * noise[1]))  # type: ignore[return-value]


def test_the_lower_bound_holds_19_times_of_20() -> None:
    generator = torch.Generator().manual_seed(0)
    below = 0
    for _ in range(100):
        without, whole, cut = draw(200, generator)
        kept = Gain(without, whole).kept(cut)
        assert kept.low <= kept.share <= kept.high
        below += kept.low <= 0.98
    assert 0.88 <= below / 100 <= 0.99


def test_the_share_is_a_ratio_of_sums_and_knows_the_whole_and_nothing() -> None:
    without, whole, cut = draw(100, torch.Generator().manual_seed(1))
    gain = Gain(without, whole)
    assert gain.nats == pytest.approx((without - whole)[:, 0].mean().item())
    assert 0 < gain.low < gain.nats
    expected = ((without - cut)[:, 0].sum() / (without - whole)[:, 0].sum()).item()
    assert gain.kept(cut).share == pytest.approx(expected)
    assert gain.kept(whole) == pytest.approx((1, 1, 1))
    assert gain.kept(without) == pytest.approx((0, 0, 0))


def test_without_a_gain_the_lower_bound_is_not_positive() -> None:
    whole = draw(50, torch.Generator().manual_seed(2))[1]
    assert Gain(whole, whole).low <= 0
    worse = whole + torch.tensor([0.1, 0.0])
    assert Gain(whole, worse).low < 0


def test_as_many_examples_as_said_would_do() -> None:
    generator = torch.Generator().manual_seed(3)
    without, whole, cut = draw(60, generator, lost=0.01)
    gain = Gain(without, whole)
    kept = gain.kept(cut)
    keep = kept.share - (kept.share - kept.low) / 3
    assert gain.examples_for(kept, keep) == pytest.approx(9 * 60, rel=0.02)


def test_losses_of_single_examples_are_those_of_their_batch() -> None:
    tiny_llama = TinyModel("llama")
    model = get_peft_model(tiny_llama.build(), LoraConfig(r=2, init_lora_weights=False, **tiny_llama.targets))
    batches = language_batches(tiny_llama)
    batches[0]["labels"][0, 3:] = -100
    losses = losses_of(model, batches)
    assert losses.shape == (sum(len(batch["labels"]) for batch in batches), 2)
    assert losses[0, 1] == 1
    for row in range(2):
        alone = model(**{name: part[row : row + 1] for name, part in batches[0].items()}).loss.item()
        assert (losses[row, 0] / losses[row, 1]).item() == pytest.approx(alone, rel=1e-5)


def test_a_language_model_that_also_reads_images() -> None:
    """Its kind of loss has another name, and its labels are shifted too."""
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1}
    text = {**sizes, "intermediate_size": 32, "head_dim": 8, "vocab_size": 100}
    vision = {**sizes, "intermediate_size": 32, "image_size": 28, "patch_size": 14}
    config = transformers.Gemma3Config(text_config=text, vision_config=vision, image_token_index=99)
    model = transformers.Gemma3ForConditionalGeneration(config).eval()
    batch = {"input_ids": torch.randint(5, 90, (2, 7))}
    batch |= {"attention_mask": torch.ones(2, 7, dtype=torch.long), "labels": batch["input_ids"]}
    sums, numbers = model_loss(model, batch)
    assert numbers.tolist() == [6, 6]
    assert (sums.sum() / 12).item() == pytest.approx(model(**batch).loss.item(), rel=1e-5)


def test_a_model_with_another_loss_needs_a_function() -> None:
    tiny_llama = TinyModel("llama")
    model = tiny_llama.build()
    model.loss_function = lambda logits, labels, **rest: logits.square().mean()
    with pytest.raises(ValueError, match=r"LlamaForCausalLM .*\(loss=\)"):
        losses_of(model, language_batches(tiny_llama))
