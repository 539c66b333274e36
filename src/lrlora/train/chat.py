"""Chats and prompts: data formats, and their rendering, which is the same in training and inference.

Rows have TRL's formats: `prompt` and `completion`, `messages`, or `text`. With a chat template, prompts and answers
become chat turns, because servers send chats; without one, they are plain text.
"""

from __future__ import annotations

import functools
import importlib.util
import json
from collections.abc import Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from ..checks import require_known
from ..learned.moments import IGNORED
from ..run_folder import CHAT, PLAIN, TEXT
from .row_checks import require_rows

NO_TEMPLATE = "none"
_SHOWN = 600  # characters of an example
# For models without a template or special tokens for one; an assistant's turn ends with the EOS token.
SIMPLE_TEMPLATE = (
    "{% for message in messages %}{{ message['role'] | capitalize }}: {% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] }}{{ eos_token }}{% endgeneration %}{% else %}{{ message['content'] }}"
    "{% endif %}\n\n{% endfor %}{% if add_generation_prompt %}Assistant:{% endif %}"
)
_ROLES = ("system", "developer", "user", "assistant", "tool", "function", "ipython")


class Format(NamedTuple):
    """A format of chats and prompts, one of TRL's.

    Attributes:
        name: common name.
        prompt: role of the column with the prompt.
        answer: role of the answer column; None if the answer is in the column of the prompt.

    """

    name: str
    prompt: str
    answer: str | None = None

    @property
    def roles(self) -> tuple[str, ...]:
        return (self.prompt,) if self.answer is None else (self.prompt, self.answer)


def _prompt(row: dict[str, Any], is_chat: bool) -> dict[str, Any]:
    prompt, answer = row["prompt"], row.get("completion")
    if not is_chat:
        return {"prompt": prompt} | ({} if answer is None else {"completion": answer})
    asked = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else _without_nulls(prompt)
    if isinstance(answer, str):
        return {"prompt": asked, "completion": [{"role": "assistant", "content": answer.strip()}]}
    return {"prompt": asked} | ({} if answer is None else {"completion": _without_nulls(answer)})


def _without_nulls(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Messages without null keys, which a table adds, and with their content as text."""
    kept = [{key: value for key, value in message.items() if value is not None} for message in messages]
    return [{**m, "content": _as_text(m["content"])} if "content" in m else m for m in kept]


def _as_text(content: Any) -> str:
    """Content that is text, or a list of text parts."""
    if isinstance(content, str):
        return content
    parts = content if isinstance(content, list) else [content]
    texts = [part.get("text") if isinstance(part, dict) else None for part in parts]
    if not all(isinstance(text, str) for text in texts):
        raise ValueError(f"The content of a message must be text, or parts of type text, got {content!r:.100}.")
    return "".join(map(str, texts))


def _tools_in(text: str) -> Any:
    """Parse the JSON text of a row's tools."""
    try:
        return json.loads(text or "null")
    except ValueError as error:
        raise ValueError(f"The column tools must hold JSON, and holds {text!r:.100}: {error}.") from None


_EXTRAS = ("tools", "chat_template_kwargs")
# The first format whose columns exist is used.
FORMATS = (
    Format("messages", "messages"),
    Format("prompt and completion", "prompt", "completion"),
    Format("text", "text"),
)


def format_of(columns: Mapping[str, Any] | list[str]) -> Format:
    """Format of data whose columns are named by role."""
    return next(format_ for format_ in FORMATS if format_.prompt in columns)


def require_roles(data: Dataset, role: str, where: str) -> None:
    """Raise ValueError unless every message is from a known role."""
    allowed = ("assistant", "tool") if role == "completion" else _ROLES
    unknown = [", ".join(str(m.get("role")) for m in chat if m.get("role") not in allowed) for chat in data[role]]
    require_rows(
        (not names for names in unknown), f"the roles in {role} must be among {', '.join(allowed)} in {where}", unknown
    )


def without_answer(data: Dataset) -> int:
    """Number of chats that do not end with an answer."""
    return sum(not _is_answer(chat[-1]) for chat in data["messages"]) if "messages" in data.column_names else 0


def _is_answer(message: dict[str, Any]) -> bool:
    content = message.get("content") or message.get("tool_calls")
    return _is_assistant(message) and bool(content.strip() if isinstance(content, str) else content)


def holds_chats(data: Dataset) -> bool:
    """Whether the rows contain messages instead of plain text."""
    return any(isinstance(data[0].get(role), list) for role in format_of(data.column_names).roles)


def rendering_of(data: Dataset, tokenizer: PreTrainedTokenizerBase) -> str:
    """Rendering of the rows: as chats, plain prompts, or texts.

    Raises:
        ValueError: they are chats, and the model has no chat template.

    """
    format_ = format_of(data.column_names)
    if format_.name == "text":
        return TEXT
    if tokenizer.chat_template is not None:
        return CHAT
    if holds_chats(data):
        raise ValueError(
            f"The data holds chats ({format_.name}), and the model has no chat template. Give one: --chat-template "
            "simple, a file (FILE.jinja), or a name that TRL knows, such as qwen3."
        )
    return PLAIN


def as_trl_reads(data: Dataset, rendering: str) -> Dataset:
    """Convert rows to TRL's format: `prompt` and maybe `completion`, `messages`, or `text`.

    Raises:
        ValueError: a row cannot be read.

    """
    format_ = format_of(data.column_names)
    if format_.name == "text":
        return data.select_columns(["text"])

    def convert(row: dict[str, Any]) -> dict[str, Any]:
        extras = {name: row[name] for name in _EXTRAS if name in row}
        if "tools" in extras:
            tools = extras["tools"]
            # Text stays text, or the table would add to each tool the parameters of all others, as null.
            parsed = _tools_in(tools) if isinstance(tools, str) else tools
            extras["tools"] = tools if parsed else None
        if "chat_template_kwargs" in extras:
            extras["chat_template_kwargs"] = extras["chat_template_kwargs"] or {}
        if format_.name == "messages":
            return {"messages": _without_nulls(row["messages"])} | extras
        return _prompt(row, rendering == CHAT) | extras

    return data.map(convert, remove_columns=data.column_names, desc="Reading")


def with_answers_apart(parts: Sequence[Dataset]) -> list[Dataset]:
    """Chats that have an answer, as TRL's `prompt` and `completion` if none has one before its last turn.

    TRL takes the loss of a completion with any template, and that of answers within a chat with few.

    Raises:
        ValueError: no chat of a part has an answer.

    """
    answered = [part.filter(_has_answer) if "messages" in part.column_names else part for part in parts]
    if not all(map(len, answered)):
        raise ValueError("No chat has a turn of the assistant, to take the loss of.")
    chats = (row["messages"] for part in answered if "messages" in part.column_names for row in part)
    if any(_is_assistant(turn) for chat in chats for turn in chat[:-1]):
        return answered

    def split(row: dict[str, Any]) -> dict[str, Any]:
        return {"prompt": row["messages"][:-1], "completion": row["messages"][-1:]}

    return [
        part.map(split, remove_columns="messages", desc="Reading") if "messages" in part.column_names else part
        for part in answered
    ]


def _has_answer(row: Mapping[str, Any]) -> bool:
    return any(map(_is_assistant, row["messages"]))


def _is_assistant(message: Mapping[str, Any]) -> bool:
    return message["role"] == "assistant"


def require_marks(tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise ValueError unless TRL finds the answers within chats that a tokenizer renders."""
    try:
        importlib.import_module("trl").get_training_chat_template(tokenizer)  # lazy: slow to import
    except ValueError as error:
        raise ValueError(
            f"The loss of the answers within these chats cannot be taken (assistant_only_loss): {error} Train with "
            "--chat-template, a template with such markers or of a name that TRL trains with, such as qwen3; or on all "
            "tokens: --training assistant_only_loss=false."
        ) from None


def choose_template(tokenizer: PreTrainedTokenizerBase, template: str | None) -> None:
    """Set the chat template of a tokenizer.

    Args:
        tokenizer: the model's tokenizer.
        template: None for the model's own; "none" for none; "simple"; a Jinja file; or a TRL template name.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: the name is unknown.

    """
    if template is None:
        return
    if template == NO_TEMPLATE:
        tokenizer.chat_template = None
    elif template == "simple":
        tokenizer.chat_template = SIMPLE_TEMPLATE
    elif template.endswith((".jinja", ".j2")):
        if not Path(template).is_file():
            raise FileNotFoundError(f"There is no file {template} with a chat template.")
        tokenizer.chat_template = Path(template).read_text(encoding="utf-8")
        if not tokenizer.chat_template.strip():
            raise ValueError(f"The chat template {template} is empty.")
    else:
        templates = _templates_of_trl()
        require_known("chat template", template, [NO_TEMPLATE, "simple", *templates])
        tokenizer.chat_template = templates[template].read_text(encoding="utf-8")


@functools.cache
def _templates_of_trl() -> dict[str, Path]:
    trl = importlib.util.find_spec("trl")
    folder = Path(trl.origin).parent / "chat_templates" if trl is not None and trl.origin else Path()
    return {path.stem: path for path in sorted(folder.glob("*.jinja")) if not path.stem.endswith("_training")}


def prompt_of(row: dict[str, Any]) -> str | list[dict[str, Any]]:
    """Prompt of a row in TRL's format: everything before the last answer."""
    prompt: Any = next(row[name] for name in ("prompt", "messages", "text") if name in row)
    if not isinstance(prompt, str) and prompt[-1]["role"] == "assistant":
        return prompt[:-1]
    return prompt


def answer_of(row: dict[str, Any]) -> str | None:
    """Answer of a row in TRL's format; None if missing or a tool call."""
    answer: Any = row["completion"] if "completion" in row else row.get("messages", [{}])
    if isinstance(answer, str):
        return answer
    is_answer = answer[-1].get("role") == "assistant" and not answer[-1].get("tool_calls")
    return answer[-1].get("content") if is_answer else None


def count_tokens(row: dict[str, Any], tokenizer: PreTrainedTokenizerBase) -> int:
    """Number of tokens of a row in TRL's format, counted as TRL does."""
    if "messages" in row or ("prompt" in row and not isinstance(row["prompt"], str)):
        chat = row["messages"] if "messages" in row else row["prompt"] + row.get("completion", [])
        return len(tokenizer(render_chat(tokenizer, chat, row), add_special_tokens=False)["input_ids"])
    text = row["text"] if "text" in row else row["prompt"] + row.get("completion", "")
    return len(tokenizer(text)["input_ids"]) + 1  # TRL appends the EOS token


def render_chat(
    tokenizer: PreTrainedTokenizerBase, chat: list[dict[str, Any]], row: dict[str, Any], **options: Any
) -> str:
    """Render a chat with the run's template and the row's tools.

    Raises:
        ValueError: the tokenizer has no template, or it rejects the chat.

    """
    tools = row.get("tools")
    options |= {"tools": json.loads(tools) if isinstance(tools, str) else tools}
    options |= row.get("chat_template_kwargs") or {}
    chat = _without_nulls(chat)
    try:
        return str(tokenizer.apply_chat_template(chat, tokenize=False, **options))
    except Exception as error:  # a template may raise anything
        raise ValueError(f"The chat template refuses the chat {str(chat)[:200]}: {error}") from None


def shown_tokens(row: dict[str, Any], tokenizer: PreTrainedTokenizerBase, *, marked: bool = False) -> str:
    """Decode a tokenized row for display.

    Args:
        row: `input_ids`, and maybe `labels`, -100 outside the loss.
        tokenizer: the row's tokenizer.
        marked: mark text that the loss uses with ⟦ ⟧.

    """
    labels = (row.get("labels") or row["input_ids"]) if marked else [IGNORED] * len(row["input_ids"])
    spans = groupby(zip(row["input_ids"], labels, strict=True), key=lambda pair: pair[1] != IGNORED)
    texts = ((is_trained, str(tokenizer.decode([token for token, _ in pairs]))) for is_trained, pairs in spans)
    shown = "".join(f"⟦{text}⟧" if is_trained else text for is_trained, text in texts)
    return shown if len(shown) <= _SHOWN else f"{shown[:_SHOWN]} …"
