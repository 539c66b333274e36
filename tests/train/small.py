"""Tiny models, saved as a user's would be, and sentences and pictures that they can learn."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from datasets import DatasetDict
from PIL import Image
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    BertConfig,
    BertModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessor,
)

from lrlora.train.data import load_splits
from lrlora.train.settings import TrainConfig

GOOD, BAD = ("splendid", "moving", "clever"), ("dull", "clumsy", "tired")
WORDS = (*GOOD, *BAD, "a", "film", "with", "plot", "and", "actors", "good", "bad", "the", "is", "it", "?")
SPECIAL = ("[PAD]", "[UNK]", "[EOS]", "[USER]", "[BOT]")
SIZES: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
SIZES["initializer_range"] = 0.3  # or so small a model would say the same of every text
CHAT = (
    "{% for m in messages %}{{ '[USER] ' if m['role'] == 'user' else '[BOT] ' }}{{ m['content'] }} "
    "{% if m['role'] == 'assistant' %}[EOS]{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}[BOT] {% endif %}"
)


def tokenizer() -> PreTrainedTokenizerFast:
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate((*SPECIAL, *WORDS))}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=words,
        pad_token="[PAD]",
        unk_token="[UNK]",
        eos_token="[EOS]",
        model_max_length=48,
        chat_template=CHAT,
    )


def save_encoder(folder: Path) -> str:
    torch.manual_seed(0)
    BertModel(BertConfig(**SIZES, vocab_size=64, max_position_embeddings=48)).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return str(folder)


def save_decoder(folder: Path) -> str:
    torch.manual_seed(0)
    config = LlamaConfig(**SIZES, vocab_size=64, max_position_embeddings=48, eos_token_id=2, pad_token_id=0)
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return str(folder)


def save_image_model(folder: Path, classes: int = 5) -> str:
    """A ViT with a head for so many classes, as models that are trained on ImageNet have one."""
    torch.manual_seed(0)
    config = ViTConfig(**SIZES, image_size=16, patch_size=8, num_labels=classes)
    ViTForImageClassification(config).save_pretrained(folder)
    ViTImageProcessor(size={"height": 16, "width": 16}).save_pretrained(folder)
    return str(folder)


def save_pictures(folder: Path, count: int = 24, seed: int = 0) -> Path:
    """So many pictures of each class, in a folder of its name; one tells the class by its colour."""
    chance = np.random.default_rng(seed)
    for channel, name in ((0, "red"), (2, "blue")):
        (folder / name).mkdir(parents=True)
        for number in range(count):
            pixels = chance.integers(0, 150, (20, 24, 3), dtype=np.uint8)
            pixels[..., channel] += 80
            Image.fromarray(pixels).save(folder / name / f"{number}.png")
    return folder


def reviews(count: int = 160, seed: int = 0) -> pd.DataFrame:
    """Sentences whose first word, at which the head looks, gives the verdict."""
    chance = random.Random(seed)
    rows = []
    for _ in range(count):
        verdict = chance.choice(("fresh", "rotten"))
        words = [chance.choice(GOOD if verdict == "fresh" else BAD), *chance.choices(WORDS[6:12], k=5)]
        rows.append({"review": " ".join(words), "verdict": verdict})
    return pd.DataFrame(rows)


def read(data: str) -> DatasetDict:
    """The splits of data for classification."""
    return load_splits(data, TrainConfig("model", data, "classify"))


def size_of(folder: Path) -> int:
    """Parameters of a LoRA's factors, as stored."""
    stored = load_file(folder / "adapter_model.safetensors")
    return sum(value.numel() for name, value in stored.items() if ".lora_" in name)


def losses(run: Path) -> list[float]:
    """Training losses that a run has logged."""
    return [entry["loss"] for entry in json.loads((run / "log_history.json").read_text()) if "loss" in entry]
