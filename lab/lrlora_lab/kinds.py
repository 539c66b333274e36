"""DPO and a classifier as given, at the found rate, and cut: losses of saved adapters by PEFT alone.

    python -m lrlora_lab.kinds run kinds.jsonl classify dpo groups
    python -m lrlora_lab.kinds report kinds.jsonl

`classify` is 20 Newsgroups with MiniLM and transformers' Trainer, 300 steps. The others are SmolLM2 with TRL's
DPOTrainer: `dpo` film reviews, answered by fresh or rotten, 120 steps; `groups` posts of 20 Newsgroups, answered by
their group or by another, 100 steps. All have the rate 2e-4, and held-out data for the cut. Arms that the output has
already are not trained again.
"""

from __future__ import annotations

import json
import random
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
import torch
import torch.nn.functional as F
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    Trainer,
    TrainingArguments,
    set_seed,
)
from trl.trainer.dpo_config import DPOConfig
from trl.trainer.dpo_trainer import DPOTrainer

import lrlora
from lrlora.train.embedded import fetch, load_movie_reviews, topics
from lrlora.train.models import model_source

from .sections import table
from .study import read_rows, study_parser

GIVEN_RATE, KEEP, CUT_AT = 2e-4, 0.99, 0.6
ARMS = {"given": None, "found": 1.0, "cut": 1.0, "half": 0.5, "twice": 2.0}  # factor of the found rate
Scores = tuple[float, float]  # loss and accuracy
Pair = tuple[str, str, str]  # prompt, chosen and rejected answer


class Kind(NamedTuple):
    """A kind of training.

    Attributes:
        steps: of the training.
        trainer: Trainer at the given rate, that writes to a folder.
        scores: of the adapter in a folder, on the test data.

    """

    steps: int
    trainer: Callable[[str, int], Any]
    scores: Callable[[str], Scores]


def _options(steps: int, folder: str, **options: Any) -> dict[str, Any]:
    common: dict[str, Any] = {"output_dir": folder, "max_steps": steps, "learning_rate": GIVEN_RATE, "use_cpu": True}
    common |= {"lr_scheduler_type": "cosine", "report_to": "none", "save_strategy": "no", "disable_tqdm": True}
    return common | options


def _lora(task_type: str) -> LoraConfig:
    return LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type=task_type)


def _newsgroups(part: str) -> pd.DataFrame:
    options: dict[str, Any] = {"sep": "\t", "names": ["label", "text"], "skiprows": 3, "quoting": 3, "dtype": str}
    return pd.read_csv(fetch(topics(f"20newsgroups-{part}")), **options).dropna().drop_duplicates("text")


def classify() -> Kind:
    """20 Newsgroups: the first 64 tokens of a text, one of 20 groups."""
    source = model_source("embedded:minilm")
    tokenizer = AutoTokenizer.from_pretrained(source)

    training, testing = _newsgroups("train"), _newsgroups("test")
    testing = testing[~testing["text"].isin(training["text"])]
    labels = sorted(training["label"].unique())

    def encoded(frame: pd.DataFrame) -> Dataset:
        columns = pd.DataFrame({"text": frame["text"], "labels": frame["label"].map(labels.index)})
        rows = Dataset.from_pandas(columns, preserve_index=False).shuffle(seed=3)
        return rows.map(
            lambda batch: tokenizer(batch["text"], truncation=True, max_length=64), batched=True, remove_columns="text"
        )

    rows = encoded(training)
    held_out, train, test = rows.select(range(360)), rows.select(range(360, len(rows))), encoded(testing)
    test = test.select(range(1000))

    def base() -> Any:
        return AutoModelForSequenceClassification.from_pretrained(source, num_labels=len(labels))

    def trainer(folder: str, steps: int) -> Trainer:
        set_seed(42)
        options = _options(steps, folder, warmup_steps=20, logging_steps=50)
        options |= {"per_device_train_batch_size": 16, "per_device_eval_batch_size": 16}
        return Trainer(
            get_peft_model(base(), _lora("SEQ_CLS")),
            TrainingArguments(**options),
            train_dataset=train,
            eval_dataset=held_out,
            data_collator=DataCollatorWithPadding(tokenizer),
            processing_class=tokenizer,
        )

    def scores(folder: str) -> Scores:
        model = PeftModel.from_pretrained(base(), folder).eval()
        losses, hits = [], 0
        for row in test:
            logits = model(input_ids=torch.tensor([row["input_ids"]])).logits
            losses.append(F.cross_entropy(logits, torch.tensor([row["labels"]])).item())
            hits += int(logits.argmax().item() == row["labels"])
        return sum(losses) / len(losses), hits / len(losses)

    return Kind(300, trainer, scores)


def dpo() -> Kind:
    """Film reviews: the right answer is chosen, the other rejected."""
    answers = ("rotten", "fresh")

    def pairs(rows: Dataset) -> list[Pair]:
        return [
            (f"Is this review fresh or rotten? {row['text'][:160]}", answers[row["label"]], answers[1 - row["label"]])
            for row in rows
        ]

    reviews = load_movie_reviews()
    rows = reviews["train"].shuffle(seed=7)
    held_out, test = pairs(rows.select(range(4000, 4160))), pairs(reviews["test"].shuffle(seed=7).select(range(300)))
    return _preferences(pairs(rows.select(range(4000))), held_out, test, steps=120)


def groups() -> Kind:
    """20 Newsgroups: the group of a post is chosen, another rejected."""
    posts = _newsgroups("train").sample(frac=1, random_state=7)
    names = sorted(posts["label"].unique())
    others = random.Random(7)
    pairs = [
        (f"Which newsgroup is this from? {text[:160]}", label, others.choice([name for name in names if name != label]))
        for label, text in zip(posts["label"], posts["text"], strict=True)
    ]
    test, held_out, train = pairs[:300], pairs[300:460], pairs[460:]
    return _preferences(train, held_out, test, steps=100)


def _preferences(train: list[Pair], held_out: list[Pair], test: list[Pair], steps: int) -> Kind:
    """DPO of SmolLM2."""
    source = model_source("embedded:smollm2")
    tokenizer = AutoTokenizer.from_pretrained(source)

    def conversations(pairs: list[Pair]) -> Dataset:
        return Dataset.from_list(
            [
                {
                    "prompt": [{"role": "user", "content": prompt}],
                    "chosen": [{"role": "assistant", "content": chosen}],
                    "rejected": [{"role": "assistant", "content": rejected}],
                }
                for prompt, chosen, rejected in pairs
            ]
        )

    def trainer(folder: str, steps: int) -> DPOTrainer:
        options = _options(steps, folder, warmup_steps=10, logging_steps=20, bf16=True, gradient_checkpointing=False)
        options |= {"per_device_train_batch_size": 4, "per_device_eval_batch_size": 1, "max_length": 96}
        options["model_init_kwargs"] = {"dtype": "bfloat16", "attn_implementation": "eager"}
        return DPOTrainer(
            source,
            args=DPOConfig(**options),
            train_dataset=conversations(train[: 4 * steps]),
            eval_dataset=conversations(held_out),
            processing_class=tokenizer,
            peft_config=_lora("CAUSAL_LM"),
        )

    def log_likelihood(model: Any, row: Any, answer: str) -> Any:
        prompt, whole = (
            tokenizer.apply_chat_template(messages, add_generation_prompt=messages is row["prompt"], return_dict=False)
            for messages in (row["prompt"], row["prompt"] + row[answer])
        )
        ids = torch.tensor([whole])
        terms = model(input_ids=ids).logits[0, :-1].float().log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0]
        return terms[len(prompt) - 1 :].sum()

    def scores(folder: str) -> Scores:
        model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32), folder)
        model.eval()
        losses, hits = [], 0
        for row in conversations(test):
            margin = log_likelihood(model, row, "chosen") - log_likelihood(model, row, "rejected")
            with model.disable_adapter():
                reference = log_likelihood(model, row, "chosen") - log_likelihood(model, row, "rejected")
            losses.append(-F.logsigmoid(0.1 * (margin - reference)).item())  # TRL's default β
            hits += int(margin > 0)
        return sum(losses) / len(losses), hits / len(losses)

    return Kind(steps, trainer, scores)


KINDS = {"classify": classify, "dpo": dpo, "groups": groups}


def run(name: str, output: Path, steps: int | None) -> None:
    """Rows of a kind: of each arm the rate, parameters of the LoRA, what was printed, and the scores."""
    kind = KINDS[name]()
    steps = steps or kind.steps
    known = {row["arm"]: row for row in read_rows(output) if (row["kind"], row["steps"]) == (name, steps)}
    for arm, factor in ARMS.items():
        if arm in known:
            continue
        with tempfile.TemporaryDirectory() as folder:
            trainer, row = kind.trainer(folder, steps), dict[str, Any](kind=name, steps=steps, arm=arm)
            if arm == "found":
                try:
                    found = lrlora.find_learning_rate(trainer)
                except ValueError as error:  # no rate, and none of the other arms
                    print(error)
                    return
                row["found"] = str(found)
            elif factor is not None:
                trainer.args.learning_rate = factor * known["found"]["rate"]
            if arm == "cut":
                callback = lrlora.FittedRanksCallback(keep=KEEP, at=CUT_AT, trainer=trainer)
                trainer.add_callback(callback)
            trainer.train()
            row["rate"] = trainer.args.learning_rate
            if arm == "cut":
                row["sentence"] = str(callback.shrunk)
            trainer.save_model(folder)
            stored = load_file(Path(folder) / "adapter_model.safetensors")
            row["parameters"] = sum(tensor.numel() for key, tensor in stored.items() if "lora_" in key)
            with torch.no_grad():
                row["loss"], row["accuracy"] = kind.scores(folder)
        with output.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        known[arm] = row
        print(row, flush=True)


NAMES = {
    "given": "LoRA r = 16 at 2e-4",
    "found": "at the rate that was found",
    "cut": "the same, cut while training",
    "uncut": "the same, with a cut that was not made",
    "half": "at half of the found rate",
    "twice": "at twice the found rate",
}


def kinds_table(rows: Sequence[dict[str, Any]]) -> str:
    """Table of all arms."""
    lines = [
        [
            f"{row['kind']}, {row['steps']} steps",
            NAMES["uncut" if row.get("sentence") == "None" else row["arm"]],
            f"{row['rate']:g}",
            f"{row['loss']:.3f}",
            f"{row['accuracy']:.3f}",
            f"{row['parameters']:,}",
        ]
        for row in rows
    ]
    return table(["", "LoRA", "rate", "test loss", "accuracy", "parameters"], lines)


def main(arguments: list[str]) -> None:
    """Run kinds, or report."""
    parser, run_parser = study_parser("kinds")
    run_parser.add_argument("kinds", choices=[*KINDS], nargs="+")
    run_parser.add_argument("--steps", type=int)
    settings = parser.parse_args(arguments)
    if settings.command == "report":
        print(kinds_table(read_rows(settings.file)))
        return
    for name in settings.kinds:
        run(name, settings.file, settings.steps)


if __name__ == "__main__":
    main(sys.argv[1:])
