"""Fitted ranks and `shrink` on every host of LoRA layers; each adapter is loaded by the host's own library.

A new host is a subclass of `Host` in `HOSTS`, and its row in docs/compatibility.md.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict, inject_adapter_in_model
from torch import Tensor, nn
from transformers import LlamaForCausalLM, Trainer

from lrlora import FittedRanks, FittedRanksCallback, rank_report, shrink
from lrlora.learned import model_loss

from ..conftest import TinyModel
from ..train.small import save_encoder
from .test_fitted_ranks import trained
from .test_shrinking import Pairs, loss_of, trainer_of

STEPS = 40


class Host:
    """A model with LoRA layers, as its library builds, runs, saves and loads it; here a Llama of PEFT.

    Args:
        folder: where its base model is, or may be, saved.

    """

    # Fields of the LoRA. α is not r, so that a library that takes one for the other fails.
    fields: ClassVar[dict[str, Any]] = {
        **{"r": 8, "lora_alpha": 16, "target_modules": ["q_proj", "v_proj", "up_proj", "down_proj"]}
    }
    saves_while_training = True

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def base(self) -> Any:
        """The base model, the same each time."""
        return TinyModel("llama").build()

    def adapt(self, base: Any) -> Any:
        """A new adapter on it."""
        return get_peft_model(base, LoraConfig(**self.fields))

    def batch(self, seed: int) -> Any:
        """A batch of 8 examples."""
        ids = Pairs(8, seed).ids
        return {"input_ids": ids, "labels": ids}

    def loss(self, model: nn.Module, batch: Any) -> tuple[Tensor, Tensor]:
        """Sum and number of the loss terms of each example."""
        return model_loss(model, batch)

    def output(self, model: Any) -> Tensor:
        """Output for an input that is always the same."""
        return TinyModel("llama").output(model)

    def save(self, model: Any, path: Path) -> None:
        model.save_pretrained(path)

    def loaded(self, path: Path) -> Iterator[Any]:
        """The saved adapter on its base model, by each library that loads it."""
        yield PeftModel.from_pretrained(self.base(), path)


@dataclass
class MoreFields(LoraConfig):
    """As frameworks add fields to PEFT's configuration."""

    lora_dtype: str | None = None


class SubclassOfLoraConfig(Host):
    """It is saved as a plain LoRA."""

    def adapt(self, base: Any) -> Any:
        return get_peft_model(base, MoreFields(**self.fields, lora_dtype="float32"))

    def save(self, model: Any, path: Path) -> None:
        super().save(model, path)
        assert "lora_dtype" not in (path / "adapter_config.json").read_text()


class Transformers(Host):
    """After `add_adapter`, loaded by transformers and by PEFT."""

    def base(self) -> Any:
        if not self.folder.exists():
            super().base().save_pretrained(self.folder)
        return LlamaForCausalLM.from_pretrained(self.folder)

    def adapt(self, base: Any) -> Any:
        base.add_adapter(LoraConfig(**self.fields))
        return base

    def loaded(self, path: Path) -> Iterator[Any]:
        model = self.base()
        model.load_adapter(str(path))
        yield from (model, *super().loaded(path))


class SentenceTransformers(Host):
    """After `add_adapter`."""

    fields: ClassVar[dict[str, Any]] = {
        **{"r": 8, "lora_alpha": 16, "target_modules": ["query", "value"], "task_type": "FEATURE_EXTRACTION"}
    }
    words = ("good", "bad", "clever", "plot", "film")

    def base(self) -> Any:
        if not self.folder.exists():
            save_encoder(self.folder)
        return pytest.importorskip("sentence_transformers").SentenceTransformer(str(self.folder), device="cpu")

    def adapt(self, base: Any) -> Any:
        base.add_adapter(LoraConfig(**self.fields))
        return base

    def batch(self, seed: int) -> Any:
        numbers = torch.randint(len(self.words), (8, 2), generator=torch.Generator().manual_seed(seed))
        return [f"a {self.words[first]} {self.words[second]}" for first, second in numbers]

    def loss(self, model: Any, batch: Any) -> tuple[Tensor, Tensor]:
        errors = (self.embed(model, batch) - self.embed(model, [text.split()[1] for text in batch])).square()
        return errors.sum(1), torch.full((len(errors),), errors.shape[1])

    def embed(self, model: Any, texts: list[str]) -> Tensor:
        return model(dict(model.tokenize(texts)))["sentence_embedding"]

    def output(self, model: Any) -> Tensor:
        return self.embed(model, ["a good film", "a bad film", "the plot is clever"])

    def loaded(self, path: Path) -> Iterator[Any]:
        yield pytest.importorskip("sentence_transformers").SentenceTransformer(str(path), device="cpu")


class PeftInSentenceTransformers(SentenceTransformers):
    """`get_peft_model` inside."""

    def adapt(self, base: Any) -> Any:
        base[0].model = get_peft_model(base[0].model, LoraConfig(**self.fields))
        return base

    def save(self, model: Any, path: Path) -> None:
        model[0].model.save_pretrained(path)

    def loaded(self, path: Path) -> Iterator[Any]:
        model = self.base()
        model[0].model = PeftModel.from_pretrained(model[0].model, path)
        yield model


class Diffusers(Host):
    """After `add_adapter`, saved as its training scripts do: `get_peft_model_state_dict`, `save_lora_weights`."""

    fields: ClassVar[dict[str, Any]] = {
        **{"r": 4, "lora_alpha": 8, "init_lora_weights": "gaussian", "target_modules": ["to_k", "to_q", "to_v"]}
    }
    saves_while_training = False

    def base(self) -> Any:
        diffusers = pytest.importorskip("diffusers")
        torch.manual_seed(0)
        model = diffusers.UNet2DConditionModel(
            sample_size=8,
            **{"in_channels": 4, "out_channels": 4, "layers_per_block": 1, "block_out_channels": (8, 16)},
            **{"down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"), "cross_attention_dim": 16},
            **{"up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"), "attention_head_dim": 4, "norm_num_groups": 4},
        )
        return model.requires_grad_(False)

    def adapt(self, base: Any) -> Any:
        base.add_adapter(LoraConfig(**self.fields))
        return base

    def batch(self, seed: int) -> Any:
        generator = torch.Generator().manual_seed(seed)
        noisy = torch.randn(4, 4, 8, 8, generator=generator)
        return noisy, torch.tensor([10, 200, 500, 900]), torch.randn(4, 6, 16, generator=generator)

    def loss(self, model: Any, batch: Any) -> tuple[Tensor, Tensor]:
        terms = model(*batch).sample.square().flatten(1)
        return terms.sum(1), torch.full((len(terms),), terms.shape[1])

    def output(self, model: Any) -> Tensor:
        return model(*self.batch(99)).sample

    def save(self, model: Any, path: Path) -> None:
        from diffusers import StableDiffusionPipeline
        from diffusers.utils import convert_state_dict_to_diffusers

        layers = convert_state_dict_to_diffusers(get_peft_model_state_dict(model))
        metadata = model.peft_config["default"].to_dict()
        StableDiffusionPipeline.save_lora_weights(path, layers, unet_lora_adapter_metadata=metadata)

    def loaded(self, path: Path) -> Iterator[Any]:
        from diffusers import StableDiffusionPipeline

        model = self.base()
        state, alphas, metadata = StableDiffusionPipeline.lora_state_dict(path, return_lora_metadata=True)
        StableDiffusionPipeline.load_lora_into_unet(state, alphas, model, metadata=metadata)
        yield model


HOSTS = (
    Host,
    SubclassOfLoraConfig,
    Transformers,
    SentenceTransformers,
    PeftInSentenceTransformers,
    pytest.param(Diffusers, marks=pytest.mark.integration),
)


@pytest.fixture(params=HOSTS)
def host(request: pytest.FixtureRequest, tmp_path: Path) -> Host:
    return request.param(tmp_path / "base")


def built(host: Host) -> tuple[Any, torch.optim.Optimizer]:
    """A model with a new adapter, the same each time, and its optimizer."""
    base = host.base()
    torch.manual_seed(1)
    model = host.adapt(base).eval()
    return model, torch.optim.AdamW(trained(model), lr=1e-2)


def fit(host: Host, model: Any, optimizer: Any, steps: range) -> None:
    for step in steps:
        sums, numbers = host.loss(model, host.batch(step))
        (sums.sum() / numbers.sum()).backward()
        optimizer.step()
        optimizer.zero_grad()


def require_same_when_loaded(host: Host, model: Any, path: Path) -> None:
    host.save(model, path)
    with torch.no_grad():
        expected = host.output(model)
        for loaded in host.loaded(path):
            torch.testing.assert_close(host.output(loaded.eval()), expected, rtol=0, atol=1e-6)


def test_it_is_cut_while_it_trains(host: Host, tmp_path: Path) -> None:
    model, optimizer = built(host)
    assert trained(model) == [p for name, p in model.named_parameters() if ".lora_" in name]
    wide = sum(p.numel() for p in trained(model))
    learned = FittedRanks(model, optimizer, size="r2", steps=STEPS)
    fit(host, model, optimizer, range(learned.cut_step + 3))
    assert learned.ranks is not None
    if host.saves_while_training:
        require_same_when_loaded(host, model, tmp_path / "early")
    fit(host, model, optimizer, range(learned.cut_step + 3, STEPS))
    assert sum(p.numel() for p in trained(model)) == learned.parameters <= wide * 2 / host.fields["r"]
    require_same_when_loaded(host, model, tmp_path / "small")
    assert len(rank_report(model).rows) == sum(rank > 0 for rank in learned.ranks.values())


@pytest.mark.parametrize("after_the_cut", [-3, 3])
def test_it_is_stopped_and_resumed(host: Host, after_the_cut: int, tmp_path: Path) -> None:
    def build() -> tuple[Any, Any, FittedRanks]:
        model, optimizer = built(host)
        return model, optimizer, FittedRanks(model, optimizer, size="r2", steps=STEPS)

    whole = build()
    fit(host, *whole[:2], range(STEPS))
    first = build()
    stop = first[2].cut_step + after_the_cut
    fit(host, *first[:2], range(stop))
    torch.save([part.state_dict() for part in first], tmp_path / "state.pt")
    again = build()
    for part, state in zip(again, torch.load(tmp_path / "state.pt", weights_only=False), strict=True):
        part.load_state_dict(state)
    fit(host, *again[:2], range(stop, STEPS))
    assert again[2].ranks == whole[2].ranks
    torch.testing.assert_close(host.output(again[0]), host.output(whole[0]), rtol=0, atol=1e-6)


def test_it_is_shrunk_at_the_end(host: Host, tmp_path: Path) -> None:
    model, optimizer = built(host)
    training, held_out, new = ([host.batch(seed) for seed in range(at, at + 30)] for at in (0, 100, 200))

    def mean() -> float:
        with torch.no_grad():
            sums, numbers = zip(*(host.loss(model, batch) for batch in new), strict=True)
        return (torch.cat(sums).sum() / torch.cat(numbers).sum()).item()

    before = mean()
    fit(host, model, optimizer, range(STEPS))
    gain = before - mean()
    found = shrink(model, training, held_out, loss=host.loss, keep=0.9)
    assert sum(p.numel() for p in trained(model)) == found.parameters < found.whole
    assert found.parameters <= found.equal_rank * found.parameters_per_rank
    assert before - mean() > 0.85 * gain
    require_same_when_loaded(host, model, tmp_path / "small")


def test_a_trainer_of_a_model_with_an_added_adapter(tmp_path: Path) -> None:
    host, tiny = Transformers(tmp_path / "base"), TinyModel("llama")
    model, _ = built(host)
    trainer = trainer_of(tmp_path / "out", model)
    trainer.train()
    whole = loss_of(model, Pairs(400, 2))
    found = shrink(trainer, keep=0.9)
    assert sum(p.numel() for p in trained(model)) == found.parameters < found.whole
    trainer.save_model(str(tmp_path / "small"))
    for loaded in host.loaded(tmp_path / "small"):
        assert torch.allclose(tiny.logits(loaded.eval()), tiny.logits(model.eval()), atol=1e-6)
    for kept in host.loaded(tmp_path / "out" / "whole"):
        assert loss_of(kept, Pairs(400, 2)) == pytest.approx(whole, rel=1e-5)
    early, _ = built(host)
    callback = FittedRanksCallback("r2")
    other = Trainer(early, trainer.args, train_dataset=Pairs(512, 0), eval_dataset=Pairs(192, 1), callbacks=[callback])
    other.train()
    assert callback.learned is not None
    assert sum(p.numel() for p in trained(early)) == callback.learned.parameters


@pytest.mark.refused
def test_layers_of_others_are_refused() -> None:
    from peft.tuners.lora import Linear

    class Fused(Linear):
        pass

    model: Any = get_peft_model(TinyModel("llama").build(), LoraConfig(**Host.fields))
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    layer.__class__ = Fused
    with pytest.raises(ValueError, match=r"\.q_proj is \S*\.Fused"):
        FittedRanks(model, torch.optim.AdamW(trained(model)), size="r2", steps=20)


@pytest.mark.refused
@pytest.mark.parametrize(
    "build",
    [
        pytest.param(lambda base, config: base, id="base model"),
        pytest.param(lambda base, config: inject_adapter_in_model(config, base), id="injected"),
        pytest.param(lambda base, config: get_peft_model(base, config, mixed=True), id="mixed"),
    ],
)
def test_models_that_are_no_host_are_refused(build: Callable[..., Any], tmp_path: Path) -> None:
    host = Host(tmp_path)
    model = build(host.base(), LoraConfig(**Host.fields))
    with pytest.raises(ValueError, match=r"get_peft_model.*add_adapter\("):
        FittedRanks(model, torch.optim.AdamW(trained(model)), size="r2", steps=20)
    with pytest.raises(ValueError, match=r"get_peft_model.*add_adapter\("):
        shrink(model, [host.batch(0)], [host.batch(1)])
