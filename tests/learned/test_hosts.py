"""Learned ranks and `shrink` on every host of LoRA layers; each adapter is loaded by the host's own library."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import LlamaForCausalLM, Trainer

from lrlora import LearnedRanks, LearnedRanksCallback, rank_report, shrink
from lrlora.learned import model_loss

from ..conftest import TinyModel
from .test_learned_ranks import trained
from .test_shrinking import Pairs, loss_of, trainer_of

STEPS, CUT = 40, 12
CONFIG: dict[str, Any] = {"r": 8, "lora_alpha": 16, "target_modules": ["q_proj", "v_proj", "up_proj", "down_proj"]}


@dataclass
class MoreFields(LoraConfig):
    """As frameworks add fields to PEFT's configuration."""

    lora_dtype: str | None = None


def with_adapter(folder: Path) -> Any:
    """A saved transformers model with an adapter that it added itself."""
    if not folder.exists():
        TinyModel("llama").build().save_pretrained(folder)
    model = LlamaForCausalLM.from_pretrained(folder)
    torch.manual_seed(1)
    model.add_adapter(LoraConfig(**CONFIG))
    for name, parameter in model.named_parameters():
        parameter.requires_grad = "lora_" in name
    return model


def batches(step: int) -> dict[str, Tensor]:
    ids = Pairs(16, step).ids
    return {"input_ids": ids, "labels": ids}


def fit(model: Any, optimizer: Any, steps: range) -> None:
    model.train()
    for step in steps:
        model(**batches(step)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def test_transformers_add_adapter(tmp_path: Path) -> None:
    model = with_adapter(tmp_path / "base")
    optimizer = torch.optim.AdamW(trained(model), lr=1e-2)
    learned = LearnedRanks(model, optimizer, size="r2", steps=STEPS)
    fit(model, optimizer, range(CUT + 3))
    # Saved after the cut, and stopped.
    model.save_pretrained(tmp_path / "half")
    state = (model.state_dict(), optimizer.state_dict(), learned.state_dict())
    stored = load_file(tmp_path / "half" / "adapter_model.safetensors")
    assert sum(len(v) for name, v in stored.items() if "lora_A" in name) == sum(learned.ranks.values())  # type: ignore[union-attr]
    state = tuple(torch.utils._pytree.tree_map(lambda v: v.clone() if isinstance(v, Tensor) else v, s) for s in state)  # type: ignore[assignment]
    fit(model, optimizer, range(CUT + 3, STEPS))
    again = with_adapter(tmp_path / "base")
    other = torch.optim.AdamW(trained(again), lr=1e-2)
    resumed = LearnedRanks(again, other, size="r2", steps=STEPS)
    again.load_state_dict(state[0])
    other.load_state_dict(state[1])
    resumed.load_state_dict(state[2])
    fit(again, other, range(CUT + 3, STEPS))
    tiny = TinyModel("llama")
    assert torch.allclose(tiny.logits(again.eval()), tiny.logits(model.eval()), atol=1e-6)
    assert sum(p.numel() for p in trained(model)) == learned.parameters
    model.save_pretrained(tmp_path / "adapter")
    loaded = LlamaForCausalLM.from_pretrained(tmp_path / "base")
    loaded.load_adapter(str(tmp_path / "adapter"))
    assert torch.allclose(tiny.logits(loaded.eval()), tiny.logits(model), atol=1e-6)
    by_peft = PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(tmp_path / "base"), tmp_path / "adapter")
    assert torch.allclose(tiny.logits(by_peft.eval()), tiny.logits(model), atol=1e-6)
    assert len(rank_report(model).rows) == sum(rank > 0 for rank in (learned.ranks or {}).values())


def test_a_trainer_of_a_model_with_an_added_adapter(tmp_path: Path) -> None:
    tiny = TinyModel("llama")
    model = with_adapter(tmp_path / "base")
    trainer = trainer_of(tmp_path / "out", model)
    trainer.train()
    whole = loss_of(model, Pairs(400, 2))
    found = shrink(trainer, keep=0.9)
    assert sum(p.numel() for p in trained(model)) == found.parameters < found.whole
    trainer.save_model(str(tmp_path / "small"))
    base = LlamaForCausalLM.from_pretrained(tmp_path / "base")
    without = loss_of(base, Pairs(400, 2))
    base.load_adapter(str(tmp_path / "small"))
    assert torch.allclose(tiny.logits(base.eval()), tiny.logits(model.eval()), atol=1e-6)
    assert without - loss_of(base, Pairs(400, 2)) > 0.85 * (without - whole)
    kept = LlamaForCausalLM.from_pretrained(tmp_path / "base")
    kept.load_adapter(str(tmp_path / "out" / "whole"))
    assert loss_of(kept, Pairs(400, 2)) == pytest.approx(whole, rel=1e-5)
    early = with_adapter(tmp_path / "base")
    callback = LearnedRanksCallback("r2")
    other = Trainer(early, trainer.args, train_dataset=Pairs(512, 0), eval_dataset=Pairs(192, 1), callbacks=[callback])
    other.train()
    assert callback.learned is not None
    assert sum(p.numel() for p in trained(early)) == callback.learned.parameters


def test_sentence_transformers_add_adapter(tmp_path: Path) -> None:
    st = pytest.importorskip("sentence_transformers")
    from ..train.small import save_encoder

    model = st.SentenceTransformer(str(save_encoder(tmp_path / "base")), device="cpu")
    model.add_adapter(LoraConfig(r=4, lora_alpha=8, target_modules=["query", "value"], task_type="FEATURE_EXTRACTION"))
    optimizer = torch.optim.AdamW(trained(model), lr=1e-2)
    learned = LearnedRanks(model, optimizer, size="r1", steps=20)
    texts = ["a good film", "a bad film", "the plot is clever"]
    for _ in range(20):
        features = model.tokenize(texts)
        model(dict(features))["sentence_embedding"].square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert sum(p.numel() for p in trained(model)) == learned.parameters
    expected = model.encode(texts)
    model.save_pretrained(str(tmp_path / "out"))
    loaded = st.SentenceTransformer(str(tmp_path / "out"), device="cpu")
    assert abs(loaded.encode(texts) - expected).max() < 1e-6


def unet() -> Any:
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    return diffusers.UNet2DConditionModel(
        sample_size=8,
        **{"in_channels": 4, "out_channels": 4, "layers_per_block": 1, "block_out_channels": (8, 16)},
        **{"down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"), "cross_attention_dim": 16},
        **{"up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"), "attention_head_dim": 4, "norm_num_groups": 4},
    )


def denoise(model: Any, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    noisy = torch.randn(4, 4, 8, 8, generator=generator)
    text = torch.randn(4, 6, 16, generator=generator)
    return model(noisy, torch.tensor([10, 200, 500, 900]), text).sample


def embed(model: Any, seed: int) -> Tensor:
    texts = [("a good film", "a bad film", "the plot is clever")[(seed + at) % 3] for at in range(2)]
    return model(dict(model.tokenize(texts)))["sentence_embedding"]


@pytest.mark.integration
@pytest.mark.parametrize("step", [8, 20])  # before and after the cut
@pytest.mark.parametrize("host", ["diffusers", "sentence_transformers"])
def test_others_resume(host: str, step: int, tmp_path: Path) -> None:
    pytest.importorskip(host)

    def build() -> tuple[Any, Any, LearnedRanks]:
        torch.manual_seed(2)
        if host == "diffusers":
            model = unet().requires_grad_(False)
            targets, task = ["to_k", "to_q", "to_v"], None
        else:
            model = SentenceTransformer(str(save_encoder(tmp_path / "base")), device="cpu")
            targets, task = ["query", "value"], "FEATURE_EXTRACTION"
        model.add_adapter(LoraConfig(r=4, lora_alpha=8, target_modules=targets, task_type=task))
        optimizer = torch.optim.AdamW(trained(model), lr=1e-2)
        return model.eval(), optimizer, LearnedRanks(model, optimizer, size="r1", steps=30)

    from sentence_transformers import SentenceTransformer

    from ..train.small import save_encoder

    output = denoise if host == "diffusers" else embed

    def fit(model: Any, optimizer: Any, steps: range) -> None:
        for at in steps:
            output(model, at).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()

    whole = build()
    fit(*whole[:2], range(30))
    first = build()
    fit(*first[:2], range(step))
    torch.save([part.state_dict() for part in first], tmp_path / "state.pt")
    again = build()
    for part, state in zip(again, torch.load(tmp_path / "state.pt", weights_only=False), strict=True):
        part.load_state_dict(state)
    fit(*again[:2], range(step, 30))
    assert again[2].ranks == whole[2].ranks
    assert torch.allclose(output(again[0], 99), output(whole[0], 99), atol=1e-6)


@pytest.mark.integration
def test_diffusers(tmp_path: Path) -> None:
    """As its training scripts do: an own loop, `get_peft_model_state_dict`, `save_lora_weights`."""
    diffusers = pytest.importorskip("diffusers")
    from diffusers.utils import convert_state_dict_to_diffusers

    config = LoraConfig(r=4, lora_alpha=8, init_lora_weights="gaussian", target_modules=["to_k", "to_q", "to_v"])

    model = unet().requires_grad_(False)
    model.add_adapter(config)
    optimizer = torch.optim.AdamW(trained(model), lr=1e-2)
    learned = LearnedRanks(model, optimizer, size="r1", steps=30)
    for step in range(30):
        denoise(model, step).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert sum(p.numel() for p in trained(model)) == learned.parameters
    layers = convert_state_dict_to_diffusers(get_peft_model_state_dict(model))
    diffusers.StableDiffusionPipeline.save_lora_weights(
        tmp_path, layers, unet_lora_adapter_metadata=model.peft_config["default"].to_dict()
    )
    loaded = unet().requires_grad_(False)
    state, alphas, metadata = diffusers.StableDiffusionPipeline.lora_state_dict(tmp_path, return_lora_metadata=True)
    diffusers.StableDiffusionPipeline.load_lora_into_unet(state, alphas, loaded, metadata=metadata)
    assert torch.allclose(denoise(loaded.eval(), 99), denoise(model.eval(), 99), atol=1e-6)
    # At the end, by a loss of one's own.
    other = unet().requires_grad_(False)
    other.add_adapter(config)
    optimizer = torch.optim.AdamW(trained(other), lr=1e-2)
    for step in range(30):
        denoise(other, step).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    def loss(model: nn.Module, batch: int) -> tuple[Tensor, Tensor]:
        terms = denoise(model, batch).square().flatten(1)
        return terms.sum(1), torch.full((len(terms),), terms.shape[1])

    found = shrink(other, range(8), range(100, 130), loss=loss, keep=0.9)
    assert sum(p.numel() for p in trained(other)) == found.parameters < found.whole


def test_a_subclass_of_lora_config_is_saved_as_plain_lora(tmp_path: Path) -> None:
    tiny = TinyModel("llama")
    model = get_peft_model(tiny.build(), MoreFields(**CONFIG, lora_dtype="float32"))
    optimizer = torch.optim.AdamW(trained(model), lr=1e-2)
    LearnedRanks(model, optimizer, size="r2", steps=20)
    fit(model, optimizer, range(20))
    model.save_pretrained(tmp_path)
    assert "lora_dtype" not in (tmp_path / "adapter_config.json").read_text()
    loaded = PeftModel.from_pretrained(tiny.build(), tmp_path).eval()
    assert torch.allclose(tiny.logits(loaded), tiny.logits(model.eval()), atol=1e-6)


@pytest.mark.refused
def test_layers_of_others_are_refused() -> None:
    from peft.tuners.lora import Linear

    class Fused(Linear):
        pass

    model: Any = get_peft_model(TinyModel("llama").build(), LoraConfig(**CONFIG))
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    layer.__class__ = Fused
    with pytest.raises(ValueError, match=r"\.q_proj is \S*\.Fused"):
        LearnedRanks(model, torch.optim.AdamW(trained(model)), size="r2", steps=20)
    with pytest.raises(ValueError, match=r"get_peft_model.*add_adapter\("):
        shrink(TinyModel("llama").build(), [batches(0)], [batches(1)], loss=model_loss)
