"""Shared fixtures: tiny random models of each family, and inputs for them. Nothing is downloaded."""

from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

_SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
_TOKENS = {"vocab_size": 100, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}


def _t5() -> nn.Module:
    config = transformers.T5Config(
        d_model=32, d_kv=16, d_ff=64, num_layers=2, num_heads=2, vocab_size=100, decoder_start_token_id=0
    )
    return transformers.T5ForConditionalGeneration(config)


_BUILDERS: dict[str, Callable[[], nn.Module]] = {
    "bert": lambda: transformers.BertForSequenceClassification(transformers.BertConfig(**_SMALL, **_TOKENS)),
    "roberta": lambda: transformers.RobertaForSequenceClassification(transformers.RobertaConfig(**_SMALL, **_TOKENS)),
    "gpt2": lambda: transformers.GPT2LMHeadModel(
        transformers.GPT2Config(n_embd=32, n_layer=2, n_head=2, n_positions=64, **_TOKENS)
    ),
    "llama": lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(**_SMALL, **_TOKENS)),
    "t5": _t5,
    "vit": lambda: transformers.ViTForImageClassification(
        transformers.ViTConfig(**_SMALL, image_size=32, patch_size=8)
    ),
}
FAMILIES = tuple(_BUILDERS)


def _inputs(family: str) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    if family == "vit":
        return {"pixel_values": torch.randn(2, 3, 32, 32, generator=generator)}
    tokens = torch.randint(3, 99, (2, 7), generator=generator)
    return {"input_ids": tokens, "decoder_input_ids": tokens} if family == "t5" else {"input_ids": tokens}


@dataclass(frozen=True)
class TinyModel:
    """A recipe for a tiny model: every `build` gives the same weights."""

    family: str

    def build(self) -> Any:
        torch.manual_seed(0)
        return _BUILDERS[self.family]().eval()

    def logits(self, model: nn.Module) -> Tensor:
        with torch.no_grad():
            return model(**_inputs(self.family)).logits

    def train(self, model: nn.Module, steps: int, lr: float = 1e-2) -> None:
        """AdamW steps on a loss that every module influences."""
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr)
        model.train()
        for _ in range(steps):
            optimizer.zero_grad()
            model(**_inputs(self.family)).logits.square().mean().backward()
            optimizer.step()
        model.eval()


@pytest.fixture(params=FAMILIES)
def tiny(request: pytest.FixtureRequest) -> TinyModel:
    """One tiny model of each family."""
    return TinyModel(request.param)


@pytest.fixture
def tiny_bert() -> TinyModel:
    return TinyModel("bert")
