"""Chats and prompts, in the words of the model's own template."""

from __future__ import annotations

from typing import Any

import jinja2
from transformers import PreTrainedTokenizerBase


def count_tokens(example: dict[str, Any], tokenizer: PreTrainedTokenizerBase) -> int:
    """The length of a text, of a prompt with its answer, or of a chat, in tokens, as TRL counts it."""
    if "messages" in example or ("prompt" in example and not isinstance(example["prompt"], str)):
        chat = example["messages"] if "messages" in example else example["prompt"] + example["completion"]
        return len(tokenizer(render_chat(tokenizer, chat, example), add_special_tokens=False)["input_ids"])
    text = example["text"] if "text" in example else example["prompt"] + example["completion"]
    return len(tokenizer(text)["input_ids"]) + 1  # TRL adds the end of the sequence


def render_chat(
    tokenizer: PreTrainedTokenizerBase, chat: list[dict[str, Any]], example: dict[str, Any], **options: Any
) -> str:
    """A chat in the words of the model's own template, with the example's tools.

    Raises:
        ValueError: the tokenizer has no template, or it refuses the chat.

    """
    options |= {"tools": example.get("tools"), **(example.get("chat_template_kwargs") or {})}
    try:
        return str(tokenizer.apply_chat_template(chat, tokenize=False, **options))
    except (jinja2.TemplateError, ValueError) as error:
        raise ValueError(f"The model's chat template refuses the chat {str(chat)[:200]}: {error}") from None
