"""Examples of an adapter without data: text that the adapted model writes, or labels that it gives to a fixed text.

The labels are sampled from the adapted model, so their gradients give its Fisher information; and the gain on them, the
loss without the adapter minus that with it, is the divergence KL(adapted ‖ base) in nats.
"""

from __future__ import annotations

import pydoc_data.topics
import re
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from tqdm import tqdm

from ..learned.moments import IGNORED
from .chat import MARK, render_chat
from .inference import LoadedRun
from .models import max_positions
from .tasks.base import logits

_TEXTS, _TOKENS, _AT_ONCE = 192, 64, 32  # written by a language model
_FIXED_TEXTS, _LENGTH = 640, (80, 400)  # for a classifier, in characters


def own_examples(run: LoadedRun) -> tuple[Dataset, str]:
    """Examples, and their description.

    Returns:
        For a language model, token sequences of one length with `input_ids`, `attention_mask` and `labels`; for a
        classifier, `text` and `label`.

    Raises:
        ValueError: the task has other inputs, or the tokenizer has no token to begin with.

    """
    with torch.random.fork_rng():
        torch.manual_seed(0)
        if run.kind.generates:
            return _written(run), "text that the adapted model wrote itself"
        if run.config.task == "classify":
            return _labelled(run), "a fixed text in English, with labels sampled from the adapted model"
    raise ValueError(f"An adapter for {run.config.task} cannot be cut by loss without examples. Pass --data.")


@torch.no_grad()
def _written(run: LoadedRun) -> Dataset:
    start = _start(run)
    length = min(_TOKENS, max_positions(run.model.config) - len(start))
    rows: list[list[int]] = []
    for _ in tqdm(range(0, _TEXTS, _AT_ONCE), desc="Writing text", leave=False):
        # Not by `generate`: the model's own settings, such as a repetition penalty, would change the distribution.
        tokens, past = torch.tensor([start] * _AT_ONCE, device=run.model.device), None
        for _ in range(length):
            known: dict[str, Any] = {} if past is None else {"past_key_values": past}
            outputs = run.model(input_ids=tokens[:, -1:] if known else tokens, use_cache=True, **known)
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


def _labelled(run: LoadedRun) -> Dataset:
    texts = fixed_texts()[:_FIXED_TEXTS]
    encoded = run.encoded(Dataset.from_dict({"text": texts}))
    predicted = torch.tensor(logits(run.trainer(encoded).predict(encoded))).float()
    labels = torch.distributions.Categorical(logits=predicted).sample()
    return Dataset.from_dict({"text": texts, "label": [run.record.labels[label] for label in labels.tolist()]})


def fixed_texts() -> list[str]:
    """Sentences of Python's own documentation, in a fixed random order."""
    low, high = _LENGTH
    paragraphs = (" ".join(part.split()) for topic in pydoc_data.topics.topics.values() for part in topic.split("\n\n"))
    fitting = (text for text in paragraphs if low <= len(text) <= high and re.match(r"[A-Z][a-z]+ [a-z]", text))
    plain = list(dict.fromkeys(fitting))
    return [plain[place] for place in np.random.default_rng(0).permutation(len(plain))]
