"""Multiple choice by a language model: the answer is the most likely choice after the question.

A decoder needs no multiple-choice head. It is trained on the right choices as continuations, and its logits are
log-likelihoods, as in EleutherAI's lm-evaluation-harness: log p(choice | prompt) = Σ log p(token | all before);
`acc_norm` divides each by the length of the choice in characters.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from datasets import Dataset
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedTokenizerBase, Trainer, TrainingArguments

from ...learned.moments import IGNORED
from ..row_checks import mapped


def encode_continuations(data: Dataset, tokenizer: PreTrainedTokenizerBase, max_length: int | None = None) -> Dataset:
    """Tokenize prompt and choice, for every choice of every example.

    Sequences longer than `max_length` are truncated at the start of the prompt. Examples with fewer choices are padded
    with empty choices.

    Returns:
        `input_ids`, and per choice `choice_tokens`, its number of tokens, and `characters`, its length.

    """
    max_choices, limit = max(map(len, data["choices"])), max_length or sys.maxsize

    def encode(batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
        rows: dict[str, list[Any]] = {"input_ids": [], "choice_tokens": [], "characters": []}
        for row, choices in enumerate(batch["choices"]):
            prompts = (
                batch["prompts"][row] if "prompts" in batch else [f"{batch['question'][row]}\nAnswer:"] * len(choices)
            )
            # A space between prompt and choice belongs to the choice.
            prompt_lengths = [len(ids) for ids in tokenizer([prompt.rstrip() for prompt in prompts])["input_ids"]]
            # Tokenized together, because some tokenizers add a leading space to every text.
            texts = [f"{prompt} {choice}" for prompt, choice in zip(prompts, choices, strict=True)]
            sequences, missing = tokenizer(texts)["input_ids"], max_choices - len(choices)
            tokens = [
                max(1, min(len(ids) - start, limit - 1)) for ids, start in zip(sequences, prompt_lengths, strict=True)
            ]
            rows["input_ids"].append([ids[-limit:] for ids in sequences] + [sequences[0][:1]] * missing)
            rows["choice_tokens"].append(tokens + [0] * missing)
            rows["characters"].append([len(choice) for choice in choices] + [1] * missing)
        return rows

    return mapped(data, encode)


def collate_choices(examples: list[dict[str, Any]]) -> dict[str, Tensor]:
    """Collate examples with equal numbers of choices.

    Returns:
        `input_ids`, `attention_mask` and `targets` of shape (examples, choices, tokens), int64, `targets` −100 outside
        of the choices; `characters` (examples, choices); `labels` (examples,).

    """
    choices = len(examples[0]["input_ids"])
    rows = [torch.tensor(ids) for example in examples for ids in example["input_ids"]]
    counts = [count for example in examples for count in example["choice_tokens"]]
    targets = [
        F.pad(ids[len(ids) - count :], (len(ids) - count, 0), value=IGNORED)
        for ids, count in zip(rows, counts, strict=True)
    ]

    def stack(tensors: list[Tensor], value: int) -> Tensor:
        padded = pad_sequence(tensors, batch_first=True, padding_value=value)
        return padded.view(len(examples), choices, -1)

    return {
        "input_ids": stack(rows, 0),
        "attention_mask": stack([torch.ones_like(ids) for ids in rows], 0),
        "targets": stack(targets, IGNORED),
        "characters": torch.tensor([example["characters"] for example in examples]),
        "labels": torch.tensor([example["labels"] for example in examples]),
    }


def token_log_likelihoods(model: Any, batch: dict[str, Tensor]) -> Tensor:
    """Log p of each target token given its prefix, 0 without a target, (sequences, tokens − 1), float32.

    Args:
        model: causal language model.
        batch: `input_ids`, `attention_mask` and `targets`, each (sequences, tokens).

    """
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1].float()
    return -F.cross_entropy(logits.transpose(1, 2), batch["targets"][:, 1:], reduction="none", ignore_index=IGNORED)


def _right_indices(batch: Mapping[str, Tensor]) -> Tensor:
    """Indices of the right choices among all choices of all examples, (examples,)."""
    labels = batch["labels"]
    return torch.arange(len(labels), device=labels.device) * batch["input_ids"].shape[1] + labels


def right_choices(batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Right choices as continuations for a causal language model: each (examples, tokens)."""
    right = _right_indices(batch)
    names = {"input_ids": "input_ids", "attention_mask": "attention_mask", "targets": "labels"}
    return {name: batch[key].flatten(0, 1)[right] for key, name in names.items()}


class ChoiceTrainer(Trainer):
    """Trains on the right choice as a continuation, per token; evaluates the log-likelihood of every choice."""

    def __init__(self, args: TrainingArguments, **arguments: Any) -> None:
        args.remove_unused_columns = False  # the collator needs columns that the model does not
        super().__init__(args=args, data_collator=collate_choices, **arguments)
        self.model_accepts_loss_kwargs = False  # the loss is a mean, which the Trainer averages over accumulation

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        if not return_outputs:
            return model(**right_choices(inputs)).loss  # the model's own loss, with AdaLoRA's penalty
        shape = inputs["input_ids"].shape
        right = _right_indices(inputs)
        flat = {name: inputs[name].flatten(0, 1) for name in ("input_ids", "attention_mask", "targets")}
        scores, is_target = token_log_likelihoods(model, flat), flat["targets"][:, 1:] != IGNORED
        loss = -scores[right].sum() / is_target[right].sum()
        sums = torch.where(is_target.any(1), scores.sum(1), -math.inf).view(shape[:2])
        return loss, {"logits": sums, "per_character": sums / inputs["characters"]}
