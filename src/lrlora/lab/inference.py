"""Evaluate and predict with a finished run."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from peft import PeftModel
from tqdm import tqdm
from transformers import AutoConfig, AutoTokenizer, BatchEncoding, PreTrainedTokenizerBase, Trainer

from ..checks import require_known
from ..files import readable, replacing
from ..run_folder import METRICS_FILE
from ..saved import SavedAdapter, require_all_weights
from ..tuner import cached_weights
from .chat import render_chat
from .config import TrainConfig, read_run
from .data import check_examples, load_splits, only_split, sampled, select_roles
from .kinds import Kind, kind_for, with_class_ids
from .metrics import logits, plain_metrics
from .models import load_model, make_trainer, model_source, training_arguments


def evaluate(
    run: str | Path,
    data: str,
    *,
    split: str | None = None,
    columns: dict[str, str] | None = None,
    limit: int | None = None,
) -> dict[str, float]:
    """Metrics of a trained run on data.

    Args:
        run: the output folder of `train`.
        data: as for `TrainConfig.data`.
        split: of the data; default: `test`, else `validation`, else the only one there is.
        columns: as for `TrainConfig.columns`; default: those of the run.
        limit: use so many examples at most, drawn at random, always the same.

    Raises:
        FileNotFoundError: run or data is missing.
        ValueError: the data cannot be used.

    """
    loaded = _LoadedRun.read(Path(run))
    examples = sampled(loaded.examples(data, split, columns, with_label=True), limit)
    encoded = loaded.kind.encode(examples, loaded.tokenizer, loaded.max_length)
    metrics = plain_metrics(loaded.trainer(encoded).evaluate())
    if loaded.kind.generates and "prompt" in examples.column_names:
        answers = list(loaded.answers(examples))
        wanted = [_content(example["completion"]) for example in examples]
        matches = [got.strip() == want.strip() for got, want in zip(answers, wanted, strict=True)]
        metrics["exact_match"] = float(np.mean(matches))
    return metrics


def predict(
    run: str | Path, data: str, *, split: str | None = None, columns: dict[str, str] | None = None
) -> Iterator[dict[str, Any]]:
    """The predictions of a finished run, example by example: the inputs, and beside them

    `prediction` and `probabilities` (classify: by class name; multiple-choice: by index), `prediction` (regress), or
    `completion` (causal-lm, greedy).

    The arguments are those of `evaluate`; the data needs no labels.
    """
    loaded = _LoadedRun.read(Path(run))
    examples = loaded.examples(data, split, columns, with_label=False)
    if loaded.kind.generates:
        for example, answer in zip(examples, loaded.answers(examples), strict=True):
            yield {**{name: value for name, value in example.items() if name != "completion"}, "completion": answer}
        return
    encoded = loaded.kind.unlabelled(loaded.kind.encode(examples, loaded.tokenizer, loaded.max_length))
    outputs = torch.as_tensor(logits(loaded.trainer(encoded).predict(encoded)))
    for example, said in zip(examples, loaded.kind.predictions(outputs, loaded.labels), strict=True):
        yield {**example, **said}


@dataclass(frozen=True)
class _LoadedRun:
    config: TrainConfig
    labels: list[str]
    max_length: int
    tokenizer: PreTrainedTokenizerBase
    model: Any

    @classmethod
    def read(cls, folder: Path) -> _LoadedRun:
        config, record = read_run(folder)
        if not (folder / METRICS_FILE).exists():
            raise ValueError(f"The run in {folder} is not finished. Go on with: lrlora train --resume {folder}")
        with readable(folder, "It is the output of `lrlora train`: train it anew if you have no copy."):
            tokenizer = AutoTokenizer.from_pretrained(folder)
            if config.method == "full":
                model = kind_for(config.task, AutoConfig.from_pretrained(folder)).model_class.from_pretrained(folder)
            else:
                base = load_model(model_source(config.model), config, record.labels, tokenizer)
                # PEFT's AdaLoRA cannot compute a loss if it is loaded for inference.
                model = PeftModel.from_pretrained(base, folder, is_trainable=config.method == "adalora")
                require_all_weights(model, SavedAdapter.read(folder))
        model.to("cuda" if torch.cuda.is_available() else "cpu").eval()
        return cls(config, record.labels, record.max_length, tokenizer, model)

    @property
    def kind(self) -> Kind:
        return kind_for(self.config.task, self.model.config)

    def examples(self, name: str, split: str | None, columns: dict[str, str] | None, *, with_label: bool) -> Dataset:
        splits = load_splits(name)
        chosen = split or only_split(splits, ("test", "validation"), f"{name} has", "--split")
        require_known(f"split of {name}", chosen, splits)
        columns = self.config.columns if columns is None else columns
        part, completion = splits[chosen], columns.get("completion", "completion")
        if self.kind.generates and not with_label and completion not in part.column_names:
            part = part.add_column(completion, [""] * len(part))  # it is what is wanted
        examples = select_roles(part, self.kind, columns, with_label=with_label)
        if self.labels and with_label:
            examples = with_class_ids(examples, self.labels, chosen)
        check_examples(examples, self.kind, chosen, with_label=with_label)
        return examples

    def trainer(self, data: Dataset) -> Trainer:
        arguments = training_arguments(self.config, self.kind, 1, self.max_length)
        return make_trainer(self.kind, self.model, self.tokenizer, arguments, data, data, [])

    def answers(self, examples: Dataset) -> Iterator[str]:
        """The greedy continuation of every prompt, one by one."""
        limit = getattr(self.model.config, "max_position_embeddings", None) or 10**9
        with cached_weights(self.model):
            for example in tqdm(examples, desc="Generating"):
                inputs = self._prompt(example).to(self.model.device)
                room = max(1, limit - inputs["input_ids"].shape[1])
                with torch.no_grad():
                    tokens = self.model.generate(
                        **inputs,
                        max_new_tokens=min(self.max_length, room),
                        do_sample=False,
                        pad_token_id=self.tokenizer.pad_token_id,
                    )
                answer = tokens[0, inputs["input_ids"].shape[1] :]
                yield str(self.tokenizer.decode(answer, skip_special_tokens=True))

    def _prompt(self, example: dict[str, Any]) -> BatchEncoding:
        prompt = next(example[role] for role in ("prompt", "messages", "text") if role in example)
        if isinstance(prompt, str):
            return self.tokenizer(prompt, return_tensors="pt")
        if prompt[-1]["role"] == "assistant":
            prompt = prompt[:-1]  # the answer that is to be given anew
        text = render_chat(self.tokenizer, prompt, example, add_generation_prompt=True)
        return self.tokenizer(text, return_tensors="pt", add_special_tokens=False)  # the template has them


def _content(completion: Any) -> str:
    return completion if isinstance(completion, str) else completion[-1]["content"]


def write_predictions(path: Path, predictions: Iterable[dict[str, Any]]) -> int:
    """Write a line of JSON for each prediction, the file whole or not at all; returns how many."""
    count = 0
    with replacing(path) as partial, partial.open("w", encoding="utf-8") as file:
        for count, prediction in enumerate(predictions, start=1):  # noqa: B007
            file.write(json.dumps(prediction, ensure_ascii=False) + "\n")
    return count
