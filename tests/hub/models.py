"""Tiny models with random weights, and their tokenizers, saved as the real ones of the same names are."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .data import DATA

# A larger range of the first weights than is usual, so that so small a model does not say the same of everything.
_SMALL: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "initializer_range": 0.3,
}
_DECODER: dict[str, Any] = {**_SMALL, "num_key_value_heads": 2, "max_position_embeddings": 2048}


def _texts() -> Iterator[str]:
    """What is said in the sets: their strings, with those of their lists."""

    def strings(value: Any) -> Iterator[str]:
        if isinstance(value, str):
            yield value
        elif isinstance(value, dict | list):
            for part in value.values() if isinstance(value, dict) else value:
                yield from strings(part)

    for configurations in DATA.values():
        for splits in configurations.values():
            for data in splits.values():
                yield from strings(data[:])


def _byte_pairs(texts: list[str], special: list[str], size: int = 600) -> Tokenizer:
    """Pairs of bytes, merged as the texts have them."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def _llama(texts: list[str], tied: bool) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    begin, end = "<|begin_of_text|>", "<|end_of_text|>"
    trained = _byte_pairs(texts, [begin, end])
    trained.post_processor = processors.TemplateProcessing(
        single=f"{begin} $A", pair=f"{begin} $A {begin}:1 $B:1", special_tokens=[(begin, 0)]
    )
    # There is no token for padding, as in the real one.
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=trained,
        bos_token=begin,
        eos_token=end,
        clean_up_tokenization_spaces=False,
        model_input_names=["input_ids", "attention_mask"],
    )
    ids: dict[str, Any] = {"bos_token_id": 0, "eos_token_id": 1, "tie_word_embeddings": tied}
    config = transformers.LlamaConfig(**_DECODER, **ids, vocab_size=len(tokenizer))
    return transformers.LlamaForCausalLM(config), tokenizer


def save_models(root: Path) -> None:
    """Write each model to the folder of its main branch, in the precision of the real one."""
    texts = list(_texts())
    recipes: dict[str, tuple[Any, torch.dtype]] = {
        "meta-llama/Llama-3.2-1B": (lambda: _llama(texts, tied=True), torch.bfloat16),
        "meta-llama/Meta-Llama-3-8B": (lambda: _llama(texts, tied=False), torch.bfloat16),
    }
    for seed, (name, (build, dtype)) in enumerate(recipes.items()):
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            model, tokenizer = build()
        folder = root / name / "main"
        model.to(dtype).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
