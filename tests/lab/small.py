"""Tiny models with tokenizers, saved as a user's would be, and sentences that they can learn."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import BertConfig, BertModel, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

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


def reviews(count: int = 160, seed: int = 0) -> pd.DataFrame:
    """Sentences whose first word, at which the head looks, gives the verdict."""
    chance = random.Random(seed)
    rows = []
    for _ in range(count):
        verdict = chance.choice(("fresh", "rotten"))
        words = [chance.choice(GOOD if verdict == "fresh" else BAD), *chance.choices(WORDS[6:12], k=5)]
        rows.append({"review": " ".join(words), "verdict": verdict})
    return pd.DataFrame(rows)
