"""SmolLM2 on questions with choices: trained on the right choices, tested by the likelihood of each choice.

The choices of a question share its prompt: they follow it one after another in one sequence, each at the positions
right after the prompt, and see the prompt and themselves alone. An update is merged before the tests.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from statistics import fmean
from typing import Any

import torch
import torch.nn.functional as F
from datasets import Dataset
from peft import get_peft_model
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, get_linear_schedule_with_warmup

from lrlora.ranks import rank_report
from lrlora.train.adapter_config import adapter_config
from lrlora.train.embedded import SMOLLM2, checkpoint
from lrlora.train.progress import DivergedError

from .capacity_tasks import shuffled
from .hub_data import load_hub_data
from .methods import Method
from .worker import ranks_of

TRAINED_ON = "science"
TESTS = ("arc-easy", "arc-challenge", "openbookqa", "social-iqa")  # the last one is transfer
STEPS, BATCH, HELD_OUT, TESTED_AT_ONCE = 300, 8, 300, 16
CLIP_NORM = 1.0
OUTSIDE = -1  # segment of padding


@dataclass(frozen=True)
class Question:
    """Token ids of a prompt and of its choices, the characters of each choice, and the index of the right one."""

    prompt: list[int]
    choices: list[list[int]]
    characters: list[int]
    label: int

    @property
    def right(self) -> Question:
        """The question with its right choice alone."""
        return replace(self, choices=[self.choices[self.label]], characters=[self.characters[self.label]], label=0)


def questions(data: Dataset, tokenizer: Any) -> list[Question]:
    """Encode `question`, `choices` and `label`; a space before a choice belongs to it."""
    encoded = []
    for row in data:
        prompt = tokenizer(row["question"])["input_ids"]
        texts = [f"{row['question']} {choice}" for choice in row["choices"]]
        choices = [ids[len(prompt) :] for ids in tokenizer(texts)["input_ids"]]
        encoded.append(Question(prompt, choices, list(map(len, row["choices"])), row["label"]))
    return encoded


def log_likelihoods(model: Any, batch: Sequence[Question]) -> list[list[Tensor]]:
    """Log-probability of each token of each choice, given the prompt and the tokens before it, in nats."""
    start = max(len(question.prompt) for question in batch)  # column of the first choices
    length = start + max(sum(map(len, question.choices)) for question in batch)
    ids, positions = torch.zeros(2, len(batch), length, dtype=torch.long)
    segments = torch.full((len(batch), length), OUTSIDE)
    targets, predictors = [], []  # tokens of all choices, and the columns that predict them
    for row, question in enumerate(batch):
        size, column = len(question.prompt), start
        ids[row, start - size : start] = torch.tensor(question.prompt)
        positions[row, start - size : start] = torch.arange(size)
        segments[row, start - size : start] = 0
        for number, choice in enumerate(question.choices, start=1):
            place = slice(column, column + len(choice))
            ids[row, place], segments[row, place] = torch.tensor(choice), number
            positions[row, place] = torch.arange(size, size + len(choice))
            targets += choice
            predictors += [(row, 0), *((row, each - start + 1) for each in range(column, column + len(choice) - 1))]
            column += len(choice)
    keys, queries = segments[:, None, :], segments[:, :, None]
    visible = torch.ones(length, length).tril().bool() & ((keys == 0) & (queries != OUTSIDE) | (keys == queries))
    logits = model(
        input_ids=ids, attention_mask=visible[:, None], position_ids=positions, logits_to_keep=length - start + 1
    ).logits
    rows, columns = torch.tensor(predictors).T
    scores = -F.cross_entropy(logits[rows, columns].float(), torch.tensor(targets), reduction="none")
    parts = iter(scores.split([len(choice) for question in batch for choice in question.choices]))
    return [[next(parts) for _ in question.choices] for question in batch]


def mean_loss(scores: Iterable[Sequence[Tensor]]) -> Tensor:
    """Mean loss in nats of the tokens of all choices."""
    return -torch.cat([choice for choices in scores for choice in choices]).mean()


@torch.no_grad()
def evaluate(model: Any, data: Sequence[Question]) -> dict[str, float]:
    """Accuracy by likelihood divided by characters, that of guessing, and the loss of the right choices."""
    ordered, right, losses = sorted(data, key=lambda question: len(question.prompt)), 0, []
    for first in range(0, len(ordered), TESTED_AT_ONCE):
        batch = ordered[first : first + TESTED_AT_ONCE]
        for question, scores in zip(batch, log_likelihoods(model, batch), strict=True):
            shares = [score.sum().item() / size for score, size in zip(scores, question.characters, strict=True)]
            right += shares.index(max(shares)) == question.label
            losses.append([scores[question.label]])
    guess = fmean(1 / len(question.choices) for question in data)
    return {"score": right / len(data), "guess": guess, "loss": mean_loss(losses).item()}


def train_questions(
    method: Method, rank: int, learning_rate: float, seed: int, *, tests: Sequence[str] = TESTS
) -> dict[str, Any]:
    """Train a method on the mixture, and test it.

    Returns:
        `criterion`, the loss of held-out questions; `seconds` of processor time of a step; `trainable` parameters;
        `ranks` of its modules, or None; and `test`, by data set.

    Raises:
        DivergedError: the loss is not finite.

    """
    tokenizer = AutoTokenizer.from_pretrained(checkpoint(SMOLLM2))
    mixture = questions(load_hub_data(f"commonsense:{TRAINED_ON}")["train"].shuffle(seed=0), tokenizer)
    train, held_out = ([question.right for question in part] for part in (mixture[HELD_OUT:], mixture[:HELD_OUT]))
    torch.manual_seed(seed)
    config = adapter_config(method.train, {"task_type": "CAUSAL_LM"}, STEPS, method.adapter(rank))
    assert config is not None
    model: Any = get_peft_model(AutoModelForCausalLM.from_pretrained(checkpoint(SMOLLM2)), config)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=learning_rate, weight_decay=0.0)
    schedule = get_linear_schedule_with_warmup(optimizer, round(0.06 * STEPS), STEPS)
    model.train()
    started = time.process_time()
    for rows in islice(shuffled(len(train), BATCH, torch.Generator().manual_seed(seed)), STEPS):
        loss = mean_loss(log_likelihoods(model, [train[row] for row in rows]))
        if not math.isfinite(loss.item()):
            raise DivergedError("Training has diverged: the loss is not finite.")
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(trained, CLIP_NORM)
        optimizer.step()
        schedule.step()
    seconds = (time.process_time() - started) / STEPS
    ranks = ranks_of(rank_report(model)) if method.has_ranks else None
    merged = model.merge_and_unload().eval()
    return {
        "criterion": evaluate(merged, held_out)["loss"],
        "seconds": seconds,
        "trainable": sum(parameter.numel() for parameter in trained),
        "ranks": ranks,
        "test": {
            name: evaluate(merged, questions(load_hub_data(f"commonsense:{name}")["test"], tokenizer)) for name in tests
        },
    }
