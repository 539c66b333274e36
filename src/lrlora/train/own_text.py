"""Examples of a language model's adapter without data: text that the adapted model writes.

It is sampled from the adapted model, so its gradients give the model's Fisher information; and the gain on it, the loss
without the adapter minus that with it, is the divergence KL(adapted ‖ base) in nats.
"""

from __future__ import annotations

from typing import Any

import torch
from datasets import Dataset

from ..learned.moments import IGNORED
from ..progress_bar import progress_bar
from .chat import MARK, render_chat
from .loaded import LoadedRun
from .models import max_positions

_TEXTS, _TOKENS, _AT_ONCE = 192, 64, 32


@torch.no_grad()
def own_text(run: LoadedRun) -> Dataset:
    """Text of an adapted language model.

    Returns:
        Token sequences of one length, with `input_ids`, `attention_mask` and `labels`.

    Raises:
        ValueError: the tokenizer has no token to begin with.

    """
    start = _start(run)
    length = min(_TOKENS, max_positions(run.model.config) - len(start))
    rows: list[list[int]] = []
    with torch.random.fork_rng():
        torch.manual_seed(0)
        for _ in progress_bar(range(0, _TEXTS, _AT_ONCE), desc="Writing text", leave=False):
            # Not by `generate`: the model's own settings, such as a repetition penalty, would change the distribution.
            tokens, past = torch.tensor([start] * _AT_ONCE, device=run.model.device), None
            for _ in range(length):
                cache: dict[str, Any] = {} if past is None else {"past_key_values": past}
                outputs = run.model(input_ids=tokens[:, -1:] if cache else tokens, use_cache=True, **cache)
                past = getattr(outputs, "past_key_values", None)  # not of state-space models
                drawn = torch.distributions.Categorical(logits=outputs.logits[:, -1].float()).sample()
                tokens = torch.cat([tokens, drawn[:, None]], dim=1)
            rows += tokens.tolist()
    return Dataset.from_dict(
        {
            "input_ids": rows,
            "attention_mask": [[1] * len(row) for row in rows],
            "labels": [[IGNORED] * len(start) + row[len(start) :] for row in rows],
        }
    )


def _start(run: LoadedRun) -> list[int]:
    """Tokens that a text begins with: those of a user's turn in a chat, or the beginning of a sequence."""
    tokenizer = run.processor
    if tokenizer.chat_template is not None:
        turn = render_chat(tokenizer, [{"role": "user", "content": MARK}], {}, add_generation_prompt=False)
        if begin := turn.partition(MARK)[0]:
            return list(tokenizer(begin, add_special_tokens=False)["input_ids"])
    first = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    if first is None:
        raise ValueError("The tokenizer has no token to begin a text with. Pass examples (--data).")
    return [first]
