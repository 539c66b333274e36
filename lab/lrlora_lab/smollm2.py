"""Capacity tasks for SmolLM2-135M, in bfloat16: memorizing a phone book, and another language."""

from __future__ import annotations

import random
from collections.abc import Iterator
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from lrlora.train.embedded import SMOLLM2, checkpoint, fetch

from .byte_model import load_corpus, sample_batch
from .capacity_tasks import EVALUATED_AT_ONCE, Setting, shuffled
from .inputs import NAMES

LAYER = 24  # of 30; its MLP learns the phone book
DIGITS = 10  # of a number
NAME_TOKENS = 7  # of a name with its colon and space: constant, so that no text is padded
CONTEXT = 64  # tokens of a window
TEST_WINDOWS = 128


def _base_model() -> Any:
    return AutoModelForCausalLM.from_pretrained(checkpoint(SMOLLM2), dtype=torch.bfloat16).eval()


@cache
def _tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(checkpoint(SMOLLM2))


class PhoneBookModel(nn.Module):
    """Layers of SmolLM2 from `LAYER` on, with logits of the ten digits only.

    Forward: input of the first layer (pairs, tokens, 576) → logits (pairs, 10, 10), float32, of the digits after the
    last ten tokens.

    Args:
        model: SmolLM2; its lower layers are removed.
        digits: token ids, (10,).

    """

    head: Tensor

    def __init__(self, model: Any, digits: Tensor) -> None:
        super().__init__()
        self.decoder = model.model
        self.decoder.layers = self.decoder.layers[LAYER:]
        self.register_buffer("head", model.lm_head.weight[digits].detach().clone())

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.decoder(inputs_embeds=x, use_cache=False).last_hidden_state[:, -DIGITS:]
        return (hidden @ self.head.T).float()


class LanguageModel(nn.Module):
    """Forward: windows (batch, tokens), int64 → mean loss of their tokens after the first, float32."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.decoder, self.head = model.model, model.lm_head

    def forward(self, windows: Tensor) -> Tensor:
        hidden = self.decoder(windows, use_cache=False).last_hidden_state[:, :-1]
        # 2D matmul: in 3D, a slice is far slower on a CPU in bfloat16.
        logits = self.head(hidden.reshape(-1, hidden.shape[-1]))
        return F.cross_entropy(logits.float(), windows[:, 1:].flatten())


def draw_phone_book(pairs: int, seed: int) -> tuple[Tensor, Tensor]:
    """Token ids (pairs, `NAME_TOKENS` + 9) of "Mary Johnson: 555867530", and the digits (pairs, 10), int64."""

    def read(name: str) -> list[str]:
        return [line.split()[0].title() for line in (fetch(NAMES) / name).read_text(encoding="utf-8").splitlines()]

    first, last = read("dist.female.first") + read("dist.male.first"), read("dist.all.last")
    tokenizer, draw, found = _tokenizer(), random.Random(seed), dict[str, tuple[list[int], list[int]]]()
    while len(found) < pairs:
        name = f"{draw.choice(first)} {draw.choice(last)}"
        number = [draw.randrange(10) for _ in range(DIGITS)]
        ids = tokenizer(f"{name}: {''.join(map(str, number))}")["input_ids"]
        if len(ids) == NAME_TOKENS + DIGITS and name not in found:
            found[name] = ids[:-1], number
    tokens, digits = ([pair[i] for pair in found.values()] for i in range(2))
    return torch.tensor(tokens), torch.tensor(digits)


def phone_book(pairs: int, batch_size: int, seed: int) -> Setting:
    """Names and numbers; `recalled` is the share that greedy decoding over the ten digits recalls in full."""
    model, generator = _base_model(), torch.Generator().manual_seed(seed)
    tokens, digits = draw_phone_book(pairs, seed)
    with torch.no_grad():
        # The lower layers are frozen, so their outputs are computed once.
        inputs = torch.cat(
            [
                model.model(some, output_hidden_states=True, use_cache=False).hidden_states[LAYER]
                for some in tokens.split(EVALUATED_AT_ONCE)
            ]
        )

    def losses(model: Any) -> Iterator[Tensor]:
        for some in shuffled(pairs, batch_size, generator):
            yield F.cross_entropy(model(inputs[some]).flatten(0, 1), digits[some].flatten())

    @torch.no_grad()
    def whole(model: Any) -> dict[str, float]:
        logits = torch.cat([model(some) for some in inputs.split(EVALUATED_AT_ONCE)])
        # If each digit is the argmax after the true ones before it, decoding reproduces the number.
        recalled = (logits.argmax(-1) == digits).all(-1).double().mean().item()
        return {"loss": F.cross_entropy(logits.flatten(0, 1), digits.flatten()).item(), "recalled": recalled}

    ids = torch.tensor([_tokenizer().convert_tokens_to_ids(str(digit)) for digit in range(10)])
    shown = PhoneBookModel(model, ids)
    return Setting(shown, r"decoder\.layers\.0\.mlp\.\w+_proj", losses, lambda model: whole(model)["loss"], whole)


def language(corpus: str, batch_size: int, seed: int) -> Setting:
    """Continued training of SmolLM2, with the linear layers of its last six layers."""
    generator, tokenizer = torch.Generator().manual_seed(seed), _tokenizer()
    train, validation, test, of_base = (
        torch.tensor(tokenizer(part.numpy().tobytes().decode(errors="replace"), verbose=False)["input_ids"])
        for part in (*load_corpus(corpus), load_corpus("english").test)
    )

    def losses(model: Any) -> Iterator[Tensor]:
        while True:
            yield model(sample_batch(train, generator, batch_size, CONTEXT))

    @torch.no_grad()
    def mean_loss(model: Any, data: Tensor) -> float:
        held = len(data) // CONTEXT
        windows = data[: held * CONTEXT].view(held, CONTEXT)[torch.arange(TEST_WINDOWS) * held // TEST_WINDOWS]
        return torch.stack([model(some) for some in windows.split(16)]).mean().item()

    return Setting(
        LanguageModel(_base_model()),
        r"decoder\.layers\.2[4-9]\..*_proj",
        losses,
        lambda model: mean_loss(model, validation),
        lambda model: {"loss": mean_loss(model, test), "base": mean_loss(model, of_base)},
    )
