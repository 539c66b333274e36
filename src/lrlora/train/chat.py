"""Chats and prompts: data formats, and their rendering, which is the same in training and inference.

Every row is converted to TRL's format: `prompt` and `completion`, `messages`, or `text`. With a chat template, prompts
and answers in any format become chat turns, because servers send chats; without one, they are plain text.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import json
from collections.abc import Callable, Iterable, Mapping
from itertools import groupby, takewhile
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
MARK = "⟦turn⟧"  # in place of a turn's content
# For models without a template or special tokens for one; an assistant's turn ends with the EOS token.
SIMPLE_TEMPLATE = (
    "{% for message in messages %}{{ message['role'] | capitalize }}: {{ message['content'] }}"
    "{{ eos_token if message['role'] == 'assistant' else '' }}\n\n{% endfor %}"
    "{% if add_generation_prompt %}Assistant:{% endif %}"
)
_SENDERS = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "chatgpt": "assistant"}
_SENDERS |= {"system": "system", "observation": "tool", "tool": "tool", "function_call": "function_call"}
_ROLES = ("system", "developer", "user", "assistant", "tool", "function", "ipython")


class Format(NamedTuple):
    """A storage format of chats and prompts.

    Attributes:
        name: common name.
        prompt_roles: roles of the prompt columns.
        answer: role of the answer column; None if the answer is in the prompt column.
        convert: (row, whether it becomes a chat) → TRL's format.

    """

    name: str
    prompt_roles: tuple[str, ...]
    answer: str | None
    convert: Callable[[dict[str, Any], bool], dict[str, Any]]

    @property
    def roles(self) -> tuple[str, ...]:
        return self.prompt_roles if self.answer is None else (*self.prompt_roles, self.answer)

    @property
    def has_turns(self) -> bool:
        """Whether its single column holds chats."""
        return self.prompt_roles in (("messages",), ("conversations",))


def _prompt(row: dict[str, Any], is_chat: bool) -> dict[str, Any]:
    prompt, answer = row["prompt"], row.get("completion")
    if not is_chat:
        return {"prompt": prompt} | ({} if answer is None else {"completion": answer})
    answer = answer if answer is None or isinstance(answer, str) else _without_nulls(answer)
    return _chat_with_answer(row, [_user(prompt)] if isinstance(prompt, str) else _without_nulls(prompt), answer)


def _alpaca(row: dict[str, Any], is_chat: bool) -> dict[str, Any]:
    question = "\n".join(text for text in (row["instruction"], row.get("input")) if text)
    if not is_chat:
        return {"prompt": f"{question}\n"} | ({} if row.get("output") is None else {"completion": row["output"]})
    history = [turn for prompt, answer in row.get("history") or () for turn in (_user(prompt), _assistant(answer))]
    return _chat_with_answer(row, [*history, _user(question)], row.get("output"))


def _user(content: str) -> dict[str, Any]:
    return {"role": "user", "content": content}


def _assistant(content: str) -> dict[str, Any]:
    return {"role": "assistant", "content": content.strip()}


def _chat_with_answer(
    row: dict[str, Any], turns: list[dict[str, Any]], answer: str | list[dict[str, Any]] | None
) -> dict[str, Any]:
    prompt = _chat(row, turns, "prompt")
    if answer is None:
        return prompt
    return prompt | {"completion": [_assistant(answer)] if isinstance(answer, str) else answer}


def _chat(row: dict[str, Any], turns: Iterable[dict[str, Any]], name: str = "messages") -> dict[str, Any]:
    """Turns under a name, after the row's system message."""
    return {name: [*([{"role": "system", "content": row["system"]}] if row.get("system") else []), *turns]}


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


def _turn(turn: dict[str, Any]) -> dict[str, Any]:
    """Convert a ShareGPT turn, with `from` and `value`, or `role` and `content`."""
    sender, content = turn.get("from") or turn.get("role"), turn.get("value")
    content = turn.get("content") if content is None else content
    role = _SENDERS.get(str(sender))
    if role is None:
        raise ValueError(f"A turn of a conversation is from {sender!r}. Known: {', '.join(_SENDERS)}.")
    if role == "function_call":
        call = _json("A turn that calls a function", str(content))
        return {"role": "assistant", "tool_calls": [{"type": "function", "function": call}]}
    return {"role": role, "content": _as_text(content)}


def _json(what: str, text: str) -> Any:
    """Parse a JSON text in the data."""
    try:
        return json.loads(text)
    except ValueError as error:
        raise ValueError(f"{what} must hold JSON, and holds {text!r:.100}: {error}.") from None


_EXTRAS = ("tools", "chat_template_kwargs")
# The first format whose columns exist is used.
FORMATS = (
    Format("messages", ("messages",), None, lambda row, is_chat: _chat(row, _without_nulls(row["messages"]))),
    Format("ShareGPT", ("conversations",), None, lambda row, is_chat: _chat(row, map(_turn, row["conversations"]))),
    Format("prompt and completion", ("prompt",), "completion", _prompt),
    Format("Alpaca", ("instruction",), "output", _alpaca),
    Format("text", ("text",), None, lambda row, is_chat: {"text": row["text"]}),
)


def format_of(columns: Mapping[str, Any] | list[str]) -> Format:
    """Format of data whose columns are named by role."""
    return next(format_ for format_ in FORMATS if set(format_.prompt_roles) <= set(columns))


def require_roles(data: Dataset, role: str, where: str) -> None:
    """Raise ValueError unless every message is from a known role; those of ShareGPT are converted elsewhere."""
    allowed = ("assistant", "tool") if role == "completion" else _ROLES
    unknown = [", ".join(str(m.get("role")) for m in chat if m.get("role") not in allowed) for chat in data[role]]
    require_rows(
        (not names for names in unknown), f"the roles in {role} must be among {', '.join(allowed)} in {where}", unknown
    )


def without_answer(data: Dataset) -> int:
    """Number of chats that do not end with an answer."""
    format_ = format_of(data.column_names)
    return sum(not _is_answer(chat[-1]) for chat in data[format_.prompt_roles[0]]) if format_.has_turns else 0


def _is_answer(message: dict[str, Any]) -> bool:
    role = _SENDERS.get(str(message.get("role") or message.get("from")))
    content = message.get("content") or message.get("value") or message.get("tool_calls")
    return role in ("assistant", "function_call") and bool(content.strip() if isinstance(content, str) else content)


def holds_chats(data: Dataset) -> bool:
    """Whether the rows contain messages instead of plain text."""
    format_ = format_of(data.column_names)
    return format_.has_turns or any(isinstance(data[0].get(role), list) for role in format_.roles)


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
    for role in ("system", "history") if rendering != CHAT else ():
        if role in data.column_names:
            require_rows(
                (not row for row in data[role]),
                f"{role} must be empty for a model without a chat template (remove the column, or give a template in "
                "training: --chat-template simple)",
                data[role],
            )

    def convert(row: dict[str, Any]) -> dict[str, Any]:
        extras = {name: row[name] for name in _EXTRAS if name in row}
        if "tools" in extras:
            tools = extras["tools"]
            # Text stays text, or the table would add to each tool the parameters of all others, as null.
            parsed = _json("The column tools", tools or "null") if isinstance(tools, str) else tools
            extras["tools"] = tools if parsed else None
        if "chat_template_kwargs" in extras:
            extras["chat_template_kwargs"] = extras["chat_template_kwargs"] or {}
        try:
            return format_.convert(row, rendering == CHAT) | extras
        except (AttributeError, KeyError, TypeError) as error:
            raise ValueError(f"A row is not of the format {format_.name} ({error}): {str(row)[:200]}") from None

    return data.map(convert, remove_columns=data.column_names, desc="Reading")


def with_answers_marked(rows: Dataset, tokenizer: PreTrainedTokenizerBase) -> Dataset:
    """Tokenize chats to `input_ids`, and `labels` of the answers only, else -100. Other rows are unchanged.

    An answer is the template's output for an assistant's turn, including its end token.
    """
    if "messages" not in rows.column_names:
        return rows

    def mark(row: dict[str, Any]) -> dict[str, Any]:
        chat = row["messages"]
        text = render_chat(tokenizer, chat, row)
        encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        spans = _answers_in(text, chat, row, tokenizer)
        labels = [
            token if any(start <= first and last <= end for start, end in spans) else IGNORED
            for token, (first, last) in zip(encoded["input_ids"], encoded["offset_mapping"], strict=True)
        ]
        return {"input_ids": encoded["input_ids"], "labels": labels}

    return rows.map(mark, remove_columns=rows.column_names, desc="Marking answers")


def _answers_in(
    text: str, chat: list[dict[str, Any]], row: dict[str, Any], tokenizer: PreTrainedTokenizerBase
) -> list[tuple[int, int]]:
    """(start, end) of each assistant's turn in the rendered chat.

    Found by rendering the chat up to the turn, and with it. Some templates refuse a part of a chat, or change a turn
    once others follow, such as by dropping its reasoning: there, by rendering the chat with another answer.
    """

    def render(turns: list[dict[str, Any]], **options: Any) -> str | None:
        with contextlib.suppress(ValueError):
            return render_chat(tokenizer, turns, row, **options)
        return None

    spans = []
    for number, message in enumerate(chat):
        if message["role"] != "assistant":
            continue
        before, after = render(chat[:number], add_generation_prompt=True), render(chat[: number + 1])
        if before is not None and after is not None and text.startswith(before) and text.startswith(after):
            spans.append((len(before), len(after.rstrip())))
            continue
        marked_chat = [*chat[:number], {"role": "assistant", "content": MARK}, *chat[number + 1 :]]
        marked = render(marked_chat) or ""
        start = _common_length(text, marked)
        end = len(text) - _common_length(text[start:][::-1], marked[start:][::-1])
        eos = str(tokenizer.eos_token or "")
        if eos and eos in text[start : end + len(eos)]:
            end = text.index(eos, start) + len(eos)
        # Some templates write what a tool says within the turn that calls it.
        other_contents = [str(turn.get("content")) for turn in chat[number + 1 :] if turn["role"] != "assistant"]
        has_other_content = any(
            content in text[start:end] and content not in text[end:] for content in other_contents if content
        )
        if MARK not in marked or has_other_content:
            raise ValueError(
                f"The answer {message.get('content')!r:.60} is not found in what the chat template writes, to take the "
                "loss of it alone. Give --training assistant_only_loss=false, to take it of the whole chat."
            )
        spans.append((start, end))
    return spans


def _common_length(text: str, other_text: str) -> int:
    """Number of characters with which both begin."""
    return sum(takewhile(bool, map(str.__eq__, text, other_text)))


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
