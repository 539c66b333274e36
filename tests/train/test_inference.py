"""Answers of a run are those of its rows, whatever settings and tokenizers it was trained with."""

from __future__ import annotations

import json
import random
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from peft import PeftModel
from sklearn.metrics import log_loss
from tokenizers import processors
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from lrlora.train.inference import evaluate, predict, write_predictions
from lrlora.train.run import train
from lrlora.train.settings import TrainConfig

from ..cli import run, told
from .small import GOOD, WORDS, reviews, tokenizer

_GROUPED = {"train_sampling_strategy": "group_by_length"}
SETTINGS: dict[str, dict[str, Any]] = {
    "group_by_length": _GROUPED,
    "length_column_name": {**_GROUPED, "length_column_name": "label"},
    "batch_rebalance": {"train_sampling_strategy": "batch_rebalance"},
    "sequential": {"train_sampling_strategy": "sequential"},
    "drop_last": {"dataloader_drop_last": True},
    "eval_do_concat_batches": {"eval_do_concat_batches": False},
    "batch_eval_metrics": {"batch_eval_metrics": True},
    "data_seed": {"data_seed": 3},
    "batches of 3": {"per_device_eval_batch_size": 3},
    "eval_accumulation_steps": {"eval_accumulation_steps": 1},
    "auto_find_batch_size": {"auto_find_batch_size": True},
    "include_for_metrics": {"include_for_metrics": ["inputs", "loss"]},
    "eval_use_gather_object": {"eval_use_gather_object": True},
    "dataloader_num_workers": {"dataloader_num_workers": 1, "dataloader_prefetch_factor": 2},
}


def texts_of_any_length(count: int = 75) -> pd.DataFrame:
    chance = random.Random(0)
    frame = reviews(count).rename(columns={"review": "text", "verdict": "label"})
    frame["text"] = [f"{text} {' '.join(chance.choices(WORDS[6:12], k=chance.randint(0, 25)))}" for text in frame.text]
    return frame


@pytest.mark.parametrize("name", SETTINGS)
def test_predictions_are_those_of_a_script_without_lrlora(encoder: str, tmp_path: Path, name: str) -> None:
    frame = texts_of_any_length()
    frame.to_csv(tmp_path / "data.csv", index=False)
    settings = {"logging_steps": 5, **SETTINGS[name]}
    config = TrainConfig(
        *(encoder, str(tmp_path / "data.csv"), "classify", "lora", str(tmp_path / "run")),
        **{"steps": 10, "batch_size": 7, "rank": 2, "learning_rate": 1e-2, "training": settings},
    )
    train(config, announce=lambda line: None)

    words = AutoTokenizer.from_pretrained(encoder)
    base = AutoModelForSequenceClassification.from_pretrained(encoder, num_labels=2)
    model = PeftModel.from_pretrained(base, tmp_path / "run").eval()
    limit = json.loads((tmp_path / "run" / "run.json").read_text())["max_length"]
    expected = []
    for text in frame["text"]:
        with torch.no_grad():
            tokens = words(text, return_tensors="pt", truncation=True, max_length=limit)
            expected.append(model(**tokens).logits.double().softmax(-1)[0].tolist())
    rows = list(predict(tmp_path / "run", str(tmp_path / "data.csv"), announce=lambda line: None))
    assert [row["text"] for row in rows] == [*frame["text"]]
    found = [[*row["probabilities"].values()] for row in rows]
    assert np.allclose(found, expected, atol=1e-5)
    metrics = evaluate(tmp_path / "run", str(tmp_path / "data.csv"), announce=lambda line: None)
    assert metrics["examples"] == len(frame)
    assert metrics["log_loss"] == pytest.approx(log_loss(frame["label"], expected), rel=1e-4)


@pytest.mark.filterwarnings("ignore:.* is deprecated:FutureWarning:lrlora")  # settings that TRL still has
@pytest.mark.parametrize(
    "settings",
    [
        {"max_length": 9},
        {"max_length": 9, "truncation_mode": "keep_end"},
        {"loss_type": "dft"},
        {"completion_only_loss": False},
        {"label_smoothing_factor": 0.2},
        {"packing": True, "eval_packing": False},
    ],
)
def test_the_loss_is_that_at_the_end_of_training(decoder: str, tmp_path: Path, settings: dict[str, Any]) -> None:
    rows = [{"prompt": f"a {word} film with plot and ", "completion": "it is good and bad"} for word in GOOD] * 12
    pd.DataFrame(rows).to_json(tmp_path / "data.jsonl", orient="records", lines=True)
    data = str(tmp_path / "data.jsonl")
    options = {"steps": 20, "rank": 4, "learning_rate": 1e-2, "chat_template": "none", "validation": data}
    config = TrainConfig(decoder, data, "causal-lm", "lora", str(tmp_path / "run"), **options, training=settings)
    expected = train(config, announce=lambda line: None).metrics["loss"]
    found = evaluate(tmp_path / "run", data, announce=lambda line: None)["loss"]
    assert found == pytest.approx(expected, rel=1e-3)


def appends_eos(decoder: str, folder: Path, *, begins: bool = False) -> str:
    """The decoder with a tokenizer that ends each text with EOS."""
    shutil.copytree(decoder, folder)
    words = tokenizer()
    begin = "[USER] " if begins else ""
    if begins:
        words.bos_token = "[USER]"
    words.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{begin}$A [EOS]", pair=f"{begin}$A [EOS] $B [EOS]", special_tokens=[("[EOS]", 2), ("[USER]", 3)]
    )
    words.chat_template = None
    words.save_pretrained(folder)
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    assert AutoTokenizer.from_pretrained(folder)("a film")["input_ids"][-1] == 2
    return str(folder)


@pytest.mark.parametrize("begins", [False, True])
def test_a_prompt_goes_on_though_the_tokenizer_ends_texts(decoder: str, tmp_path: Path, begins: bool) -> None:
    model = appends_eos(decoder, tmp_path / "model", begins=begins)
    rows = [{"prompt": f"a {word} film ", "completion": "it is good and good"} for word in GOOD] * 12
    pd.DataFrame(rows).to_json(tmp_path / "data.jsonl", orient="records", lines=True)
    said: list[str] = []
    options = {"steps": 60, "rank": 4, "learning_rate": 2e-2}
    data = str(tmp_path / "data.jsonl")
    train(TrainConfig(model, data, "causal-lm", "lora", str(tmp_path / "run"), **options), announce=said.append)
    (example,) = (line for line in said if line.startswith("Example, "))
    assert "⟦it is good and good" in example.replace("⟦ ", "⟦")
    assert example.count("[EOS]") == 1
    answers = [row["completion"].strip() for row in predict(tmp_path / "run", data, announce=said.append)]
    assert answers == ["it is good and good"] * len(rows)


def test_a_choice_of_one_token_is_scored_though_the_tokenizer_ends_texts(decoder: str, tmp_path: Path) -> None:
    model = appends_eos(decoder, tmp_path / "model")
    rows = [{"question": "the film is", "choices": ["good", "bad"], "label": 0} for _ in range(40)]
    pd.DataFrame(rows).to_json(tmp_path / "data.jsonl", orient="records", lines=True)
    config = TrainConfig(
        *(model, str(tmp_path / "data.jsonl"), "multiple-choice", "lora", str(tmp_path / "run")),
        **{"steps": 4, "rank": 2},
    )
    metrics = train(config, announce=lambda line: None).metrics
    words = tokenizer()
    trained = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(model), tmp_path / "run").eval()
    with torch.no_grad():
        logits = trained(torch.tensor([words("the film is\nAnswer:")["input_ids"]])).logits[0, -1].log_softmax(-1)
    assert metrics["loss"] == pytest.approx(-logits[words.convert_tokens_to_ids("good")].item(), rel=1e-4)


def test_predictions_are_written_to_tables_and_files_of_json_lines(tmp_path: Path) -> None:
    said = told("predict", tmp_path, "--data", "x.csv", "--output", tmp_path / "out.xlsx")
    assert "out.csv for a table" in said
    assert "out.jsonl for lines of JSON" in said


def test_predictions_leave_nothing_of_a_killed_writer(tmp_path: Path) -> None:
    for name in ("out.csv.12.partial", "out.csv.bak", "other.csv.12.partial"):
        (tmp_path / name).touch()
    assert write_predictions(tmp_path / "out.csv", [{"text": "a film"}]) == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["other.csv.12.partial", "out.csv", "out.csv.bak"]


def test_the_tokens_of_the_loss_are_an_option(decoder: str, tmp_path: Path) -> None:
    """Of an adapter from elsewhere: all tokens of a chat, as TRL trains, or the answers."""
    rows = [
        {"messages": [{"role": "user", "content": f"a {word} film"}, {"role": "assistant", "content": "good"}]}
        for word in GOOD * 16
    ]
    pd.DataFrame(rows).to_json(tmp_path / "data.jsonl", orient="records", lines=True)
    data = str(tmp_path / "data.jsonl")
    options = {"steps": 60, "rank": 4, "learning_rate": 2e-2, "training": {"assistant_only_loss": False}}
    train(TrainConfig(decoder, data, "causal-lm", "lora", str(tmp_path / "run"), **options), announce=lambda line: None)
    (tmp_path / "run" / "run.json").unlink()  # as any other tool leaves it
    losses = {}
    for option in ([], ["--assistant-only-loss"]):
        result = run("evaluate", tmp_path / "run", "--data", data, "--json", tmp_path / f"{len(option)}.json", *option)
        assert result.exit_code == 0, result.output
        losses[bool(option)] = json.loads((tmp_path / f"{len(option)}.json").read_text())["loss"]
        exported = run(
            *("export", tmp_path / "run", "--data", data, "--size", "r2", *option),
            *("--output", tmp_path / f"small-{len(option)}"),
        )
        assert exported.exit_code == 0, exported.output
        printed = " ".join(exported.output.split())
        assert ("⟦[USER] a" in printed) == (not option)
        assert ("⟦good" in printed.replace("⟦ ", "⟦")) == bool(option)
    texts = tmp_path / "texts.jsonl"
    texts.write_text(json.dumps({"text": "a film"}) + "\n")
    said = told("evaluate", tmp_path / "run", "--data", texts, "--assistant-only-loss")
    assert re.search(r"--assistant-only-loss .*\bmessages\b", " ".join(said.split()))
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(decoder), tmp_path / "run").eval()
    words = AutoTokenizer.from_pretrained(tmp_path / "run")
    totals = {False: [0.0, 0], True: [0.0, 0]}
    for row in rows:
        tokens = words(words.apply_chat_template(row["messages"], tokenize=False), return_tensors="pt")["input_ids"]
        start = len(words("[USER] a good film [BOT]")["input_ids"])
        for on_answers in totals:
            labels = tokens.clone()
            labels[:, : start if on_answers else 0] = -100
            with torch.no_grad():
                count = int((labels[:, 1:] != -100).sum())
                totals[on_answers][0] += model(input_ids=tokens, labels=labels).loss.item() * count
                totals[on_answers][1] += count
    for on_answers, (total, count) in totals.items():
        assert losses[on_answers] == pytest.approx(total / count, rel=1e-3)
