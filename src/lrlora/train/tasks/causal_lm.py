"""Next-token prediction for texts, answers and chats, with TRL."""

from __future__ import annotations

import importlib
import math
from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np
from datasets import Dataset, Value
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from ..chat import (
    FORMATS,
    as_trl_reads,
    count_tokens,
    format_of,
    rendering_of,
    require_marks,
    require_roles,
    shown_tokens,
    with_answers_apart,
)
from ..row_checks import counted, is_conversation, require_rows, require_text
from .base import Task, plain_metrics

_LARGEST_EXPONENT = 700

# Common names of columns → role.
_ROLES = {
    **dict.fromkeys(("chat", "chats", "dialog", "dialogue", "dialogs", "turns", "conversation"), "messages"),
    **dict.fromkeys(("question", "query", "input", "inputs"), "prompt"),
    **dict.fromkeys(("answer", "response", "output", "target", "targets"), "completion"),
    **dict.fromkeys(("content", "document", "body"), "text"),
}


def _hint(columns: list[str]) -> str:
    """Options that map columns with common names to their roles."""
    names_by_role = {_ROLES[name.lower()]: name for name in reversed(columns) if name.lower() in _ROLES}
    format_roles = next(
        (roles for roles in (("messages",), ("prompt", "completion"), ("text",)) if roles[0] in names_by_role), ()
    )
    likely = {role: names_by_role[role] for role in format_roles if role in names_by_role} or {"prompt": "NAME"}
    return " ".join(f"--column {role}={name}" for role, name in likely.items())


class CausalLm(Task):
    """Next-token prediction for texts, answers to prompts, or chats; TRL encodes and trains."""

    name = "causal-lm"
    roles = ("messages", "prompt", "completion", "text")
    optional_roles = ("group", "tools", "chat_template_kwargs")
    answers = ("completion",)
    text_roles = ("prompt", "completion", "text")
    metrics = ("loss", "mean_token_accuracy", "entropy")
    has_head = False
    generates = True
    adapter_fields: ClassVar[Mapping[str, Any]] = {"task_type": "CAUSAL_LM"}
    batch_size = 8
    pipeline = "text-generation"
    rate = 5e-4
    model_class = AutoModelForCausalLM
    architectures = MODEL_FOR_CAUSAL_LM_MAPPING

    def columns(self, mapping: Mapping[str, str], available: list[str], *, with_label: bool) -> dict[str, str]:
        names = {role: mapping.get(role, role) for role in self.roles}
        # Columns named by the user take precedence.
        formats = sorted(FORMATS, key=lambda candidate: not set(candidate.roles) & set(mapping))
        format_ = next((candidate for candidate in formats if names[candidate.prompt] in available), None)
        if format_ is None:
            raise ValueError(
                "The task causal-lm reads TRL's formats: the columns messages (lists of role and content), or prompt "
                f"and completion, or text; but the data has {', '.join(available)}. Map them: {_hint(available)}; or "
                "convert ShareGPT, Alpaca and the like to messages first."
            )
        if with_label and format_.answer is not None and names[format_.answer] not in available:
            raise ValueError(
                f"The data has {names[format_.prompt]} but no {format_.answer}, which the format "
                f"{format_.name} needs. Available columns: {', '.join(available)}. Map it: "
                f"--column {format_.answer}=NAME"
            )
        return {role: names[role] for role in format_.roles if names[role] in available}

    def check(self, data: Dataset, where: str, *, with_label: bool) -> None:
        format_ = format_of(data.column_names)
        for role in format_.roles if with_label else (format_.prompt,):
            if isinstance(data.features[role], Value) and role != "messages":
                require_text(data, role, where)
            else:
                rule = f"{role} must be lists of messages, with role and content, in {where}"
                require_rows(map(is_conversation, data[role]), rule, data[role])
                require_roles(data, role, where)

    def lengths(self, data: Dataset, processor: Any) -> list[int]:
        def count(batch: dict[str, list[Any]]) -> list[int]:
            rows = zip(*batch.values(), strict=True)
            return [count_tokens(dict(zip(batch, row, strict=True)), processor) for row in rows]

        return counted(as_trl_reads(data, rendering_of(data, processor)), count)

    def rows(self, lengths: list[int], max_length: int, training: Mapping[str, Any]) -> int:
        if not training.get("packing"):
            return len(lengths)
        # TRL's packing depends only on the numbers of tokens.
        tokens = Dataset.from_dict({"tokens": [np.zeros(length, dtype=np.int8) for length in lengths]})
        strategy = training.get("packing_strategy", "bfd")
        return len(importlib.import_module("trl").pack_dataset(tokens, max_length, strategy))

    def encode(self, data: Dataset, processor: Any, max_length: int | None) -> Dataset:
        return as_trl_reads(data, rendering_of(data, processor))

    def reported(self, values: Mapping[str, float]) -> dict[str, float]:
        """With the perplexity, the exponential of the mean token loss, omitted on overflow."""
        metrics = plain_metrics(values)
        has_one = metrics["loss"] < _LARGEST_EXPONENT
        return metrics | ({"perplexity": math.exp(metrics["loss"])} if has_one else {})

    def shown(self, row: dict[str, Any], processor: Any, labels: list[str]) -> str:
        return f"Example, with the loss on the tokens in ⟦ ⟧: {shown_tokens(row, processor, marked=True)!r}"

    def arguments_class(self) -> type[TrainingArguments]:
        return importlib.import_module("trl").SFTConfig  # lazy: TRL is slow to import

    def arguments(self, max_length: int | None, batch: int) -> dict[str, Any]:
        # Some versions of TRL default to a loss whose forward gives no logits, which cuts by loss read.
        fixed = {"max_length": max_length, "loss_type": "nll", "assistant_only_loss": True}
        return {"per_device_eval_batch_size": 4 * batch, "bf16": False, **fixed}

    def trainer(self, processor: Any, **arguments: Any) -> Trainer:
        from .sft import TokenMeanTrainer  # lazy, too

        args, names = arguments["args"], ("train_dataset", "eval_dataset")
        if args.assistant_only_loss:
            arguments |= zip(names, with_answers_apart([arguments[name] for name in names]), strict=True)
            args.assistant_only_loss = any("messages" in arguments[name].column_names for name in names)
        if args.assistant_only_loss:
            require_marks(processor)
        return TokenMeanTrainer(processing_class=processor, **arguments)
