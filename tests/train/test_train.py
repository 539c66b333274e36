"""`lrlora train`, `evaluate` and `predict` as a user types them, on tiny models and real files."""

from __future__ import annotations

import errno
import json
import math
import random
import re
import shutil
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pandas as pd
import psutil
import pytest
import torch
import yaml
from datasets import Dataset, DatasetDict, load_dataset
from datasets.exceptions import DatasetGenerationError
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertModel,
    DataCollatorWithPadding,
    RobertaConfig,
    RobertaModel,
    Trainer,
    TrainingArguments,
    set_seed,
)
from typer.testing import Result

from lrlora import LrLoraConfig
from lrlora.files import write_json
from lrlora.ranks.report import read_history
from lrlora.train.prepare import DEEP_HEAD_FACTOR, HEAD_FACTOR
from lrlora.train.run import train
from lrlora.train.settings import TrainConfig
from lrlora.train.tasks import TASKS, ChoiceByLikelihood
from lrlora.train.tasks.likelihood import collate_choices, encode_continuations, token_log_likelihoods
from lrlora.train.yaml import parse_assignments

from ..cli import run, told
from ..processes import LRLORA, Process
from .small import BAD, GOOD, losses, read, reviews, tokenizer


@pytest.fixture
def table(tmp_path: Path) -> str:
    reviews().to_csv(tmp_path / "reviews.csv", index=False)
    return str(tmp_path / "reviews.csv")


COLUMNS = ("--column", "text=review", "--column", "label=verdict")
SMALL = ("--steps", 12, "--batch-size", 8, "--rank", 2, "--no-measure")


def train_reviews(encoder: str, table: str, output: Path, *options: object) -> Result:
    return run(
        *("train", "--model", encoder, "--data", table, "--task", "classify", "--output", output),
        *(*COLUMNS, *SMALL, *options),
    )


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_classes_that_are_rare_or_look_missing_are_told(encoder: str, tmp_path: Path) -> None:
    labels = ["good"] * 40 + ["bad"] * 30 + ["NA"] * 9 + ["odd"]
    rows = "".join(f"a film {number},{label}\n" for number, label in enumerate(labels))
    (tmp_path / "table.csv").write_text(f"text,label\n{rows}")
    result = run(
        *("train", "--model", encoder, "--data", tmp_path / "table.csv", "--task", "classify"),
        *("--output", tmp_path / "out", "--dry-run"),
    )
    assert result.exit_code == 0, result.output
    said = " ".join(result.output.split())
    assert "Classes: good 40, bad 30, NA 9, odd 1 (4)." in said
    assert "1 of 4 (odd)" in said
    assert "class 'NA' looks like a missing value" in said
    (tmp_path / "spaces.csv").write_text(f"text,label \n{rows}")
    refused = run(
        *("train", "--model", encoder, "--data", tmp_path / "spaces.csv", "--task", "classify"),
        *("--output", tmp_path / "out", "--dry-run"),
    )
    assert "the data has text, 'label '" in " ".join(refused.output.split())


def test_classes_that_a_division_by_group_leaves_out_and_texts_with_two_labels_are_told(
    encoder: str, tmp_path: Path
) -> None:
    rows = [(f"a film {number}", ("good", "bad")[number % 2], number) for number in range(60)]
    rows += [(f"a play {number}", "odd", 99) for number in range(5)] + [("a film 0", "bad", 0)]
    table = tmp_path / "table.csv"
    table.write_text("text,label,group\n" + "".join(f"{text},{label},{group}\n" for text, label, group in rows))
    result = run(
        *("train", "--model", encoder, "--data", table, "--task", "classify"),
        *("--output", tmp_path / "out", "--dry-run"),
    )
    assert result.exit_code == 0, result.output
    said = " ".join(result.output.split())
    assert re.search(r"classes without an example in (train|validation): 1 of 3 \(odd\)", said)
    assert "1 training text has several labels" in said


@pytest.mark.parametrize(
    ("options", "is_told"),
    [([], False), (["--learning-rate", "2e-5"], True)],
)
def test_a_learning_rate_far_from_those_of_lora_is_told(
    encoder: str, table: str, options: list[str], is_told: bool, tmp_path: Path
) -> None:
    common = ("--model", encoder, "--data", table, "--task", "classify", "--output", tmp_path / "out", "--dry-run")
    common += ("--column", "text=review", "--column", "label=verdict")
    result = run("train", *common, *options)
    assert result.exit_code == 0, result.output
    assert bool(re.search("learning rate of 2e-05 .* 0.001 to 0.002", " ".join(result.output.split()))) == is_told


def test_a_table_and_a_folder_become_an_adapter(encoder: str, table: str, tmp_path: Path, drawn: None) -> None:
    output = tmp_path / "out"
    options = ("--method", "lr-lora", "--steps", 100, "--learning-rate", 0.01)
    result = train_reviews(encoder, table, output, *options)
    assert result.exit_code == 0, result.output
    said = " ".join(result.output.split())
    assert "100 steps of 8 examples" in said
    assert re.search(r"Classes: (fresh|rotten) \d+, (fresh|rotten) \d+ \(2\)\.", said)
    assert "validation examples. Classes: " in said
    metrics = json.loads((output / "metrics.json").read_text())
    assert metrics["accuracy"] > 0.9
    assert f"{metrics['accuracy']:.4f}" in result.output
    base = AutoModelForSequenceClassification.from_pretrained(encoder, num_labels=2)
    assert isinstance(PeftModel.from_pretrained(base, output).peft_config["default"], LrLoraConfig)
    AutoTokenizer.from_pretrained(output)
    card = (output / "README.md").read_text(encoding="utf-8")
    assert "import lrlora" in card
    assert (
        f"accuracy {metrics['accuracy']:.4g}"
        in re.search(r"- validation, best checkpoint, chosen by these scores: .*", card)[0]
    )
    assert f"- data: {table}" in card
    assert "| energy-99 rank | " in card
    assert re.search(r"!\[[^]]+\]\(ranks\.png\)", card)
    assert (output / "ranks.png").stat().st_size > 1000
    assert [step for step, _ in read_history(output / "rank_history.jsonl")] == [0, 50, 100]
    record = json.loads((output / "run.json").read_text())
    assert record["labels"] == ["fresh", "rotten"]
    assert {"lrlora", "torch", "peft", "transformers"} <= set(record["versions"])
    assert record["config"]["seed"] == 0
    assert list(output.glob("checkpoint-*")) == []

    result = run("evaluate", output, "--data", table, "--json", tmp_path / "metrics.json")
    assert result.exit_code == 0, result.output
    assert json.loads((tmp_path / "metrics.json").read_text())["accuracy"] > 0.9

    texts = reviews().drop(columns="verdict")
    texts.to_json(tmp_path / "texts.jsonl", orient="records", lines=True)
    result = run("predict", output, "--data", tmp_path / "texts.jsonl", "--output", tmp_path / "out.jsonl")
    assert result.exit_code == 0, result.output
    predictions = lines(tmp_path / "out.jsonl")
    assert [p["text"] for p in predictions] == list(texts["review"])
    assert sum(p["prediction"] == v for p, v in zip(predictions, reviews()["verdict"], strict=True)) > 144
    assert all(p["probabilities"][p["prediction"]] >= 0.5 for p in predictions)
    result = run("predict", output, "--data", tmp_path / "texts.jsonl", "--output", tmp_path / "out.jsonl")
    assert "already exists" in result.output

    long = pd.DataFrame({"review": [" ".join(texts["review"][:30]), "a film"]})
    long.to_json(tmp_path / "long.jsonl", orient="records", lines=True)
    result = run("predict", output, "--data", tmp_path / "long.jsonl", "--output", tmp_path / "cut.jsonl")
    truncated = f"1 of 2 examples are truncated to {record['max_length']} tokens"
    assert truncated in " ".join(result.output.split())
    assert run("export", output, "--energy", "1", "--output", tmp_path / "exported").exit_code == 0
    elsewhere = ("--data", tmp_path / "long.jsonl", "--column", "text=review", "--output", tmp_path / "as.jsonl")
    result = run("predict", tmp_path / "exported", *elsewhere)
    assert truncated in " ".join(result.output.split())
    ours, exported = (lines(tmp_path / name) for name in ("cut.jsonl", "as.jsonl"))
    assert exported[0]["probabilities"] == pytest.approx(ours[0]["probabilities"], abs=1e-4)


@pytest.mark.parametrize("ending", ["csv", "parquet"])
def test_integers_are_classes_of_the_same_name_beside_an_empty_cell(encoder: str, tmp_path: Path, ending: str) -> None:
    frame = reviews(40)
    frame["verdict"] = frame["verdict"].map({"fresh": 1, "rotten": 0})
    with_hole = pd.concat([frame, pd.DataFrame({"review": ["a film"], "verdict": [math.nan]})])  # of floats now
    whole, holed = tmp_path / f"whole.{ending}", tmp_path / f"holed.{ending}"
    if ending == "csv":
        frame.to_csv(whole, index=False)
        with_hole.astype({"verdict": "Int64"}).to_csv(holed, index=False)
    else:
        frame.to_parquet(whole)
        with_hole.to_parquet(holed)
    for trained, asked in ((holed, whole), (whole, holed)):
        output = tmp_path / f"on-{trained.stem}"
        result = train_reviews(encoder, str(trained), output, "--skip-empty", "--steps", 2)
        assert result.exit_code == 0, result.output
        assert json.loads((output / "run.json").read_text())["labels"] == ["0", "1"]
        result = run("evaluate", output, "--data", asked)
        assert result.exit_code == 0, result.output
        result = run("predict", output, "--data", asked, "--output", output / "said.jsonl")
        assert result.exit_code == 0, result.output
        assert {line["prediction"] for line in lines(output / "said.jsonl")} <= {"0", "1"}


def test_options_win_over_the_file(encoder: str, table: str, tmp_path: Path) -> None:
    content = {
        "model": encoder,
        "data": table,
        "task": "classify",
        "columns": {"text": "review", "label": "verdict"},
        "output": str(tmp_path / "from-file"),
        "method": "lr-lora",
        "train_examples": 40,
        "validation_examples": 9,
        "adapter": {"r": 3, "num_basis": 5},
        "training": {"max_steps": 4, "weight_decay": 0.5, "learning_rate": "rate"},
    }
    # As people write it, and as YAML itself would read it as text.
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(content).replace("rate: rate", "rate: 1e-3"))
    result = run(
        "train",
        tmp_path / "run.yaml",
        "--steps",
        2,
        "--adapter",
        "num_basis=6",
        "--training",
        "warmup_steps=1",
        "--no-measure",
    )
    assert result.exit_code == 0, result.output
    assert "40 training and 9 validation" in " ".join(result.output.split())
    config = json.loads((tmp_path / "from-file" / "run.json").read_text())["config"]
    assert (config["rank"], config["adapter"]) == (3, {"num_basis": 6})
    assert (config["steps"], config["learning_rate"]) == (2, 1e-3)
    assert config["training"] == {"weight_decay": 0.5, "warmup_steps": 1}
    saved = json.loads((tmp_path / "from-file" / "adapter_config.json").read_text())
    assert (saved["r"], saved["num_basis"]) == (3, 6)


def test_lora_gives_the_numbers_of_a_script_written_by_hand(encoder: str, table: str, tmp_path: Path) -> None:
    frame = reviews()
    train, validation = frame[:120], frame[120:]
    for name, part in (("train", train), ("validation", validation)):
        part.to_csv(tmp_path / f"{name}.csv", index=False)
    result = run(
        *("train", "--model", encoder, "--data", tmp_path / "train.csv", "--validation", tmp_path / "validation.csv"),
        *("--task", "classify", "--method", "lora", "--output", tmp_path / "out", *COLUMNS, *SMALL),
        *("--learning-rate", 0.01, "--training", "logging_steps=1", "--training", "load_best_model_at_end=false"),
    )
    assert result.exit_code == 0, result.output

    words = AutoTokenizer.from_pretrained(encoder)

    def encode(part: pd.DataFrame) -> Dataset:
        tokens = words(list(part["review"]), truncation=True, max_length=48)
        return Dataset.from_dict({**tokens, "labels": [["fresh", "rotten"].index(v) for v in part["verdict"]]})

    set_seed(0)
    model = AutoModelForSequenceClassification.from_pretrained(encoder, num_labels=2)
    model = get_peft_model(model, LoraConfig(r=2, lora_alpha=2, target_modules="all-linear", task_type="SEQ_CLS"))
    args = TrainingArguments(
        output_dir=str(tmp_path / "by-hand"),
        max_steps=12,
        per_device_train_batch_size=8,
        learning_rate=0.01,
        warmup_steps=0.06,
        logging_steps=1,
        eval_strategy="steps",
        eval_steps=12,
        seed=0,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
    )
    head = [p for name, p in model.named_parameters() if p.requires_grad and "classifier" in name]
    adapter = [p for name, p in model.named_parameters() if p.requires_grad and "classifier" not in name]
    groups = [{"params": adapter}, {"params": head, "lr": HEAD_FACTOR * 0.01}]
    trainer = Trainer(
        model,
        args,
        train_dataset=encode(train),
        eval_dataset=encode(validation),
        data_collator=DataCollatorWithPadding(words),
        optimizers=(torch.optim.AdamW(groups, 0.01, weight_decay=0.0, fused=True), None),
    )
    trainer.train()
    assert f"of the head {HEAD_FACTOR * 0.01:g}" in " ".join(result.output.split())
    by_hand = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses(tmp_path / "out") == by_hand
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert metrics["loss"] == pytest.approx(trainer.evaluate()["eval_loss"], rel=1e-6)


@pytest.mark.parametrize("number", [pytest.param(signal.SIGINT, marks=pytest.mark.slow), signal.SIGTERM])
def test_a_run_that_a_signal_ends_is_resumed(
    encoder: str, table: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: signal.Signals
) -> None:
    command = ("train", "--model", encoder, "--data", table, "--task", "classify", "--output", tmp_path / "cut")
    options = ("--steps", 100, "--training", "eval_steps=50", "--training", "save_steps=50")
    process = Process(LRLORA, *command, *COLUMNS, *SMALL, *options)
    history, deadline = tmp_path / "cut" / "rank_history.jsonl", time.monotonic() + 120
    while not (history.exists() and len(read_history(history)) > 1):  # step 50
        assert time.monotonic() < deadline
        assert process.poll() is None, process.stdout.read()
        time.sleep(0.02)
    process.send_signal(number)
    output = process.communicate(timeout=60)
    assert process.returncode == 130, output
    assert f"lrlora train --resume {tmp_path / 'cut'}" in " ".join(output.split())
    assert "Traceback" not in output
    assert not (tmp_path / "cut" / "metrics.json").exists()
    refused = run("evaluate", tmp_path / "cut", "--data", table)
    assert "is not finished" in refused.output

    monkeypatch.chdir(tmp_path)
    output = (process := Process(LRLORA, "train", "--resume", "cut")).communicate()  # by another name than it was given
    assert process.returncode == 0, output
    assert "Resuming from step" in output
    assert output.count("Training:") < 10  # in a file, the bar is not drawn at every step
    assert (tmp_path / "cut" / "metrics.json").exists()
    assert "nothing to resume" in run("train", "--resume", tmp_path / "cut").output


def test_a_run_trains_in_another_thread(encoder: str, table: str, tmp_path: Path) -> None:
    columns, training = {"text": "review", "label": "verdict"}, {"max_steps": 2}
    config = TrainConfig(encoder, table, "classify", output=str(tmp_path / "run"), columns=columns, training=training)
    with ThreadPoolExecutor() as pool:
        assert pool.submit(train, config).result().metrics


@pytest.mark.parametrize("method", ["fitted", "lr-lora"])
def test_killed_after_its_last_checkpoint_a_run_is_finished_without_another_step(
    encoder: str, table: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    training = {"max_steps": 12, "eval_steps": 4, "save_steps": 4, "per_device_train_batch_size": 8}
    ways = {"method": method} if method != "fitted" else {"method": "lora", "size": "r1"}
    settings = {"model": encoder, "data": table, "task": "classify", "training": training, **ways}
    config = {**settings, "columns": {"text": "review", "label": "verdict"}, "rank_every": 4}
    whole = train(TrainConfig.from_dict({**config, "output": str(tmp_path / "whole")}))

    def die(*arguments: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("lrlora.train.run._finish", die)
        with pytest.raises(KeyboardInterrupt):
            train(TrainConfig.from_dict({**config, "output": str(tmp_path / "cut")}))
    cut = train(TrainConfig.from_dict({**config, "output": str(tmp_path / "cut")}), resume=True)
    assert cut.metrics == whole.metrics
    weights = "adapter_model.safetensors"
    assert (tmp_path / "cut" / weights).read_bytes() == (tmp_path / "whole" / weights).read_bytes()
    steps = [entry["step"] for entry in cut.log_history if "eval_loss" in entry]
    assert steps == [4, 8, 12, 12]  # with that of the best one at the end


@pytest.mark.parametrize("task", ["classify", "regress"])
def test_a_head_for_other_classes_is_replaced(encoder: str, table: str, tmp_path: Path, task: str) -> None:
    shutil.copytree(encoder, tmp_path / "five")
    AutoModelForSequenceClassification.from_pretrained(encoder, num_labels=5).save_pretrained(tmp_path / "five")
    if task == "regress":
        frame = pd.read_csv(table).assign(verdict=lambda rows: rows.index % 3)
        frame.to_csv(table := str(tmp_path / "numbers.csv"), index=False)
    asked = ("train", "--model", tmp_path / "five", "--data", table, "--task", task, *COLUMNS, "--steps", 3)
    result = run(*asked, "--output", tmp_path / "run")
    assert result.exit_code == 0, result.output
    assert run("evaluate", tmp_path / "run", "--data", table).exit_code == 0


def test_settings_that_would_fail_after_training_are_refused(
    encoder: str, decoder: str, table: str, tmp_path: Path
) -> None:
    common = ("train", *COLUMNS, "--data", table, "--output", tmp_path / "out", "--steps", 2)
    classify = (*common, "--model", encoder, "--task", "classify")
    assert re.match("Error: .*label_names is not supported", told(*classify, "--training", "label_names=[x]"))
    config = json.loads((Path(decoder) / "config.json").read_text())
    shutil.copytree(decoder, tmp_path / "tied")
    (tmp_path / "tied" / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
    tokens = ("--adapter", "trainable_token_indices=[1,2]", "--column", "text=review")
    generate = ("train", "--data", table, "--task", "causal-lm", *tokens, "--output", tmp_path / "out", "--steps", 20)
    said = told(*generate, "--model", tmp_path / "tied")
    assert re.match("Error: .*trainable_token_indices is not supported.*tied", said)
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_memory_stays_flat_over_2000_steps(encoder: str, table: str, tmp_path: Path) -> None:
    memory: dict[int, int] = {}

    def note(line: str) -> None:
        if match := re.match(r"Step (\d+):", line):
            memory[int(match[1])] = psutil.Process().memory_info().rss

    training = {"max_steps": 2_000, "eval_steps": 100, "save_steps": 100, "per_device_train_batch_size": 8}
    settings = {"model": encoder, "data": table, "task": "classify", "output": str(tmp_path / "run"), "rank_every": 20}
    columns = {"text": "review", "label": "verdict"}
    train(TrainConfig.from_dict({**settings, "columns": columns, "training": training}), announce=note)
    assert set(range(100, 2_001, 100)) <= set(memory)
    # What is loaded and compiled along the way is there after the first 300 steps.
    assert max(memory.values()) <= 1.02 * memory[300], memory


def test_dora(encoder: str, table: str, tmp_path: Path) -> None:
    result = run(
        *(
            "train",
            "--model",
            encoder,
            "--data",
            table,
            "--validation",
            table,
            "--task",
            "classify",
            "--method",
            "dora",
            *COLUMNS,
            "--rank",
            2,
        ),
        *("--output", tmp_path / "out", "--steps", 80, "--batch-size", 8, "--learning-rate", 1e-2),
    )
    assert result.exit_code == 0, result.output
    saved = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert (saved["peft_type"], saved["use_dora"]) == ("LORA", True)
    before = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert before["accuracy"] > 0.6
    evaluated = run("evaluate", tmp_path / "out", "--data", table, "--json", tmp_path / "metrics.json")
    assert evaluated.exit_code == 0, evaluated.output
    after = json.loads((tmp_path / "metrics.json").read_text())
    assert after["accuracy"] == before["accuracy"]
    assert after["loss"] == pytest.approx(before["loss"], rel=1e-3)


def test_a_diverged_run_ends_and_says_where(encoder: str, table: str, tmp_path: Path) -> None:
    model = BertModel.from_pretrained(encoder)
    with torch.no_grad():
        model.encoder.layer[1].output.dense.weight[0, 0] = float("nan")
    model.save_pretrained(tmp_path / "broken")
    AutoTokenizer.from_pretrained(encoder).save_pretrained(tmp_path / "broken")
    result = train_reviews(str(tmp_path / "broken"), table, tmp_path / "out")
    said = " ".join(result.output.split())
    assert result.exit_code == 1
    assert re.search(r"Error: .*diverged: .*step 1 .*\.layer\.1\.output\.dense", said)

    result = train_reviews(
        *(encoder, table, tmp_path / "late", "--learning-rate", 1e30, "--training", "optim=sgd"),
        *("--training", "save_steps=1", "--training", "eval_strategy=no", "--training", "max_grad_norm=0"),
    )
    said = " ".join(result.output.split())
    assert result.exit_code == 1
    assert re.search(r"Error: Training has diverged: at step [2-9] (the weight|\d+ of \d+ gradients)", said)
    assert list((tmp_path / "late").glob("checkpoint-*"))


@pytest.mark.parametrize("when", ["during", "after"])
def test_a_run_whose_metrics_are_not_finite_has_diverged(encoder: str, tmp_path: Path, when: str) -> None:
    table = reviews(32)
    table.assign(verdict=[3e19] * 32).to_csv(tmp_path / "ratings.csv", index=False)  # its square overflows
    evaluation = "eval_strategy=no" if when == "after" else "eval_steps=3"
    result = run(
        *("train", "--model", encoder, "--data", tmp_path / "ratings.csv", "--task", "regress", *COLUMNS, *SMALL),
        *("--method", "lora", "--output", tmp_path / "out", "--training", evaluation, "--training", "save_steps=3"),
        *(() if when == "after" else ("--training", "load_best_model_at_end=false")),
    )
    assert result.exit_code == 1
    step = 12 if when == "after" else 3
    assert f"Error: Training has diverged: at step {step} the evaluation's loss is inf" in result.output
    assert "are kept" in result.output
    assert not (tmp_path / "out" / "metrics.json").exists()
    assert bool(list((tmp_path / "out").glob("checkpoint-*"))) == (when == "after")


def test_what_json_cannot_hold_is_left_out_or_an_error(tmp_path: Path) -> None:
    reported = TASKS["causal-lm"].reported
    assert "perplexity" not in reported({"eval_loss": 1e4})
    assert reported({"eval_loss": 0.0})["perplexity"] == 1
    with pytest.raises(ValueError, match=r"metrics\.json .*\bNaN\b"):
        write_json(tmp_path / "metrics.json", {"loss": float("inf")})
    assert list(tmp_path.iterdir()) == []


def test_infinite_gradients_that_a_loss_scaler_skips_are_no_part_of_the_log(
    encoder: str, table: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = Trainer.log

    def log_as_a_scaler_would(self: Trainer, logs: dict[str, float], *given: Any) -> None:
        log(self, {**logs, **({"grad_norm": math.inf} if "grad_norm" in logs else {})}, *given)

    monkeypatch.setattr(Trainer, "log", log_as_a_scaler_would)
    assert train_reviews(encoder, table, tmp_path / "out").exit_code == 0
    entries = json.loads((tmp_path / "out" / "log_history.json").read_text(), parse_constant=pytest.fail)
    assert [entry for entry in entries if "loss" in entry]
    assert not [entry for entry in entries if "grad_norm" in entry]


def test_the_best_checkpoint_has_the_lowest_loss_where_that_is_asked_for(
    encoder: str, table: str, tmp_path: Path
) -> None:
    options = ("--steps", 60, "--learning-rate", 0.01, "--training", "metric_for_best_model=loss")
    assert train_reviews(encoder, table, tmp_path / "out", *options).exit_code == 0
    history = json.loads((tmp_path / "out" / "log_history.json").read_text())
    validated = [entry["eval_loss"] for entry in history if "eval_loss" in entry][:-1]
    assert json.loads((tmp_path / "out" / "metrics.json").read_text())["loss"] == pytest.approx(
        min(validated), rel=1e-5
    )


def test_a_head_with_a_rate_of_its_own(encoder: str, table: str, tmp_path: Path) -> None:
    def head(folder: str, *options: object) -> torch.Tensor:
        options = ("--training", "metric_for_best_model=loss", *options)
        result = train_reviews(encoder, table, tmp_path / folder, "--learning-rate", 1e-9, *options)
        assert result.exit_code == 0, result.output
        weights = load_file(tmp_path / folder / "adapter_model.safetensors")
        assert all(w.abs().max() < 1e-6 for name, w in weights.items() if "lrlora_B" in name)
        return weights["base_model.model.classifier.weight"]

    slow, fast = head("slow"), head("fast", "--head-learning-rate", 1e-2)
    moved = (fast - slow).abs().mean()
    assert 0.01 < moved < 0.12  # twelve steps of Adam, with warm-up and decay


def test_a_head_that_is_not_new_has_the_rate_of_the_adapter(encoder: str, table: str, tmp_path: Path) -> None:
    def plan(model: object, output: str, *options: object) -> str:
        result = train_reviews(str(model), table, tmp_path / output, "--method", "lora", *options)
        assert result.exit_code == 0, result.output
        return " ".join(result.output.split())

    assert f", of the head {HEAD_FACTOR * 1e-3:g}, " in plan(encoder, "new")
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    RobertaModel(RobertaConfig(**sizes, vocab_size=64, max_position_embeddings=64)).save_pretrained(tmp_path / "deep")
    AutoTokenizer.from_pretrained(encoder).save_pretrained(tmp_path / "deep")
    assert f", of the head {DEEP_HEAD_FACTOR * 1e-3:g}, " in plan(tmp_path / "deep", "of-two-layers")
    assert ", of the head " not in plan(encoder, "continued", "--start-from", tmp_path / "new")
    labels = {"id2label": {0: "fresh", 1: "rotten"}, "label2id": {"fresh": 0, "rotten": 1}}
    AutoModelForSequenceClassification.from_pretrained(encoder, **labels).save_pretrained(tmp_path / "classifier")
    AutoTokenizer.from_pretrained(encoder).save_pretrained(tmp_path / "classifier")
    assert ", of the head " not in plan(tmp_path / "classifier", "pretrained")
    assert ", of the head 0.5, " in plan(tmp_path / "classifier", "told", "--head-learning-rate", 0.5)


def test_early_stopping(encoder: str, table: str, tmp_path: Path) -> None:
    result = train_reviews(
        *(encoder, table, tmp_path / "out", "--steps", 400, "--early-stopping", 2, "--learning-rate", 1e-30),
        *("--method", "lora"),
        *("--training", "eval_steps=5", "--training", "save_steps=5"),
    )
    assert result.exit_code == 0, result.output
    assert json.loads((tmp_path / "out" / "log_history.json").read_text())[-1]["step"] == 15


def test_regression(encoder: str, tmp_path: Path) -> None:
    frame = reviews()
    frame["stars"] = [
        (4.5 if v == "fresh" else 1.5) + 0.1 * len(r) for v, r in zip(frame["verdict"], frame["review"], strict=True)
    ]
    frame.to_parquet(tmp_path / "stars.parquet")
    columns = ("--column", "text=review", "--column", "label=stars")
    result = run(
        *("train", "--model", encoder, "--data", tmp_path / "stars.parquet", "--task", "regress", *columns, *SMALL),
        *("--output", tmp_path / "out", "--steps", 200, "--learning-rate", 0.02),
    )
    assert result.exit_code == 0, result.output
    assert json.loads((tmp_path / "out" / "metrics.json").read_text())["pearson"] > 0.8
    predicted = run(
        "predict", tmp_path / "out", "--data", tmp_path / "stars.parquet", "--output", tmp_path / "out.jsonl"
    )
    assert predicted.exit_code == 0, predicted.output
    values = [line["prediction"] for line in lines(tmp_path / "out.jsonl")]
    assert pd.Series(values).corr(frame["stars"]) > 0.8


@pytest.mark.parametrize("kind", ["encoder", "decoder"])
def test_multiple_choice(request: pytest.FixtureRequest, tmp_path: Path, kind: str) -> None:
    """By a head of its own, or by the likelihood of each choice."""
    model = request.getfixturevalue(kind)
    chance, rows = random.Random(0), []
    for _ in range(96):
        choices = [chance.choice(GOOD), chance.choice(BAD), "film"]
        chance.shuffle(choices)
        label = next(i for i, choice in enumerate(choices) if choice in GOOD)
        rows.append({"question": "the good film is", "choices": choices, "label": label})
    pd.DataFrame(rows).to_json(tmp_path / "choices.jsonl", orient="records", lines=True)
    result = run(
        *("train", "--model", model, "--data", tmp_path / "choices.jsonl", "--task", "multiple-choice", *SMALL),
        *("--output", tmp_path / "out", "--steps", 80, "--learning-rate", 0.01),
    )
    assert result.exit_code == 0, result.output
    assert json.loads((tmp_path / "out" / "metrics.json").read_text())["accuracy"] > 0.9
    for row in rows:
        del row["label"]
    pd.DataFrame(rows).to_json(tmp_path / "questions.jsonl", orient="records", lines=True)
    result = run(
        "predict", tmp_path / "out", "--data", tmp_path / "questions.jsonl", "--output", tmp_path / "out.jsonl"
    )
    assert result.exit_code == 0, result.output
    right = [line["choices"][line["prediction"]] in GOOD for line in lines(tmp_path / "out.jsonl")]
    assert sum(right) > 86
    assert (tmp_path / "out" / "ranks.json").exists()


def test_the_likelihood_of_a_choice_is_that_of_its_tokens_after_the_question(decoder: str, tmp_path: Path) -> None:
    model, words = AutoModelForCausalLM.from_pretrained(decoder).eval(), AutoTokenizer.from_pretrained(decoder)
    rows = [
        {"question": "a dull film", "choices": ["good", "is bad and tired"], "label": 1},
        {"question": "is it a clever film with a plot ?", "choices": ["it is splendid", "bad"], "label": 0},
    ]
    batch = collate_choices(list(encode_continuations(Dataset.from_list(rows), words)))
    labels = batch.pop("labels")
    with torch.no_grad():
        scores = token_log_likelihoods(model, {name: part.flatten(0, 1) for name, part in batch.items()}).sum(1)
    expected = []
    for row in rows:
        for choice in row["choices"]:
            question, answer = (words(text)["input_ids"] for text in (f"{row['question']}\nAnswer:", f" {choice}"))
            with torch.no_grad():
                logits = model(torch.tensor([question + answer])).logits[0].log_softmax(-1)
            expected.append(sum(logits[len(question) + i - 1, token].item() for i, token in enumerate(answer)))
    assert scores.tolist() == pytest.approx(expected, rel=1e-5)
    assert labels.tolist() == [1, 0]

    cut = collate_choices(list(encode_continuations(Dataset.from_list(rows), words, max_length=3)))
    assert cut["input_ids"].shape == (2, 2, 3)
    assert (cut["targets"][0, 1] != -100).sum() == 2  # a token of context is left, if nothing else

    arguments = TrainingArguments(str(tmp_path), use_cpu=True, report_to="none")
    trainer = ChoiceByLikelihood().trainer(words, model=model, args=arguments)
    cut["characters"] = torch.ones(2, 2)
    with torch.no_grad():
        evaluated, trained = trainer.compute_loss(model, cut, return_outputs=True)[0], trainer.compute_loss(model, cut)
    assert evaluated.item() == pytest.approx(trained.item(), rel=1e-5)


@pytest.mark.parametrize("shape", ["prompt", "text"])
def test_causal_language_models(decoder: str, tmp_path: Path, shape: str) -> None:
    rows: list[dict[str, Any]] = []
    for review, verdict in reviews(64).itertuples(index=False):
        answer = "good" if verdict == "fresh" else "bad"
        is_text = shape == "text"
        rows.append({"text": f"{review} {answer}"} if is_text else {"q": review, "a": " " + answer})
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    columns = () if shape == "text" else ("--column", "prompt=q", "--column", "completion=a")
    result = run(
        *("train", "--model", decoder, "--data", tmp_path / "data.jsonl", "--task", "causal-lm", "--rank", 4, *columns),
        *("--output", tmp_path / "out", "--steps", 150, "--batch-size", 8, "--learning-rate", 0.02, "--no-measure"),
        *("--method", "lr-lora" if shape == "prompt" else "lora"),
    )
    assert result.exit_code == 0, result.output
    history = json.loads((tmp_path / "out" / "log_history.json").read_text())
    first, *_, last = [entry["eval_loss"] for entry in history if "eval_loss" in entry]
    assert last < first
    result = run("evaluate", tmp_path / "out", "--data", tmp_path / "data.jsonl", "--json", tmp_path / "metrics.json")
    assert result.exit_code == 0, result.output
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert metrics["perplexity"] == pytest.approx(torch.tensor(metrics["loss"]).exp().item(), rel=1e-5)
    assert ("exact_match" in metrics) == (shape != "text")
    if shape == "prompt":
        assert metrics["exact_match"] > 0.8  # the completion alone is learned, and the model knows where it ends
        pd.DataFrame(rows)[["q"]].to_csv(tmp_path / "prompts.csv", index=False)
        result = run(
            "predict", tmp_path / "out", "--data", tmp_path / "prompts.csv", "--output", tmp_path / "out.jsonl"
        )
        assert result.exit_code == 0, result.output
        assert [line["prompt"] for line in lines(tmp_path / "out.jsonl")] == [row["q"] for row in rows]
        # Which few are not learned in so many steps depends on the processor.
        answers = [line["completion"].strip() for line in lines(tmp_path / "out.jsonl")]
        assert sum(answer in ("good", "bad") for answer in answers) > 0.8 * len(answers)
    base = AutoModelForCausalLM.from_pretrained(decoder)
    PeftModel.from_pretrained(base, tmp_path / "out")


@pytest.mark.parametrize("strategy", ["bfd", "wrapped"])
def test_epochs_go_through_the_data_so_often_where_it_is_packed(decoder: str, tmp_path: Path, strategy: str) -> None:
    chance = random.Random(0)
    texts = [" ".join(chance.choices(GOOD, k=chance.randint(2, 20))) for _ in range(240)]
    pd.DataFrame({"text": texts}).to_csv(tmp_path / "data.csv", index=False)
    config = TrainConfig(
        *(decoder, str(tmp_path / "data.csv"), "causal-lm", "lora", str(tmp_path / "out")),
        **{"max_length": 40, "epochs": 2, "batch_size": 2, "validation": str(tmp_path / "data.csv")},
        training={"packing": True, "packing_strategy": strategy, "eval_strategy": "no"},
    )
    said: list[str] = []
    last = [entry for entry in train(config, announce=said.append).log_history if "loss" in entry][-1]
    assert last["epoch"] == 2
    assert f"{last['step']:g} steps of 2 examples" in said[0]
    rows = sum(len(text.split()) + 1 for text in texts) / 40
    assert 2 * rows / 2 <= last["step"] < 1.1 * 2 * rows / 2


def test_a_run_is_asked_without_what_its_training_needed(encoder: str, table: str, tmp_path: Path) -> None:
    output = tmp_path / "run"
    assert train_reviews(encoder, table, output, "--training", "report_to=tensorboard").exit_code == 0
    reports = sorted(output.rglob("events.*"))
    assert reports
    asked = ("evaluate", output, "--data", table)
    assert run(*asked, "--json", tmp_path / "here.json").exit_code == 0
    record = json.loads((output / "run.json").read_text())
    # As it would be of a run on GPUs.
    record["config"]["training"] |= {"fsdp": "full_shard", "fsdp_config": {"version": 2}, "tf32": True}
    record["config"]["training"] |= {"ddp_backend": "nccl", "report_to": "wandb"}
    write_json(output / "run.json", record)
    result = run(*asked, "--json", tmp_path / "elsewhere.json")
    assert result.exit_code == 0, result.output
    assert (tmp_path / "elsewhere.json").read_text() == (tmp_path / "here.json").read_text()
    assert run("predict", output, "--data", table, "--output", tmp_path / "said.jsonl").exit_code == 0
    assert sorted(output.rglob("events.*")) == reports


def test_other_splits_are_not_guessed(encoder: str, table: str, tmp_path: Path) -> None:
    assert train_reviews(encoder, table, tmp_path / "out").exit_code == 0
    part = Dataset.from_pandas(reviews(8))
    DatasetDict(train=part, validation_matched=part).save_to_disk(tmp_path / "splits")
    said = told("evaluate", tmp_path / "out", "--data", tmp_path / "splits")
    assert re.match("Error: .*validation_matched.*--split", said)
    chosen = ("--split", "validation_matched")
    assert run("evaluate", tmp_path / "out", "--data", tmp_path / "splits", *chosen).exit_code == 0


# Bad input: one clear error, before any weights are read; the folder that is given as the model has none.


BAD_TABLES: dict[str, tuple[dict[str, list[Any]], tuple[str, ...]]] = {
    "empty": ({"text": [], "label": []}, ("empty",)),
    "one class": ({"text": ["a"] * 30, "label": ["x"] * 30}, ("'x'", "nothing to learn")),
    "no label": (
        {"text": ["a"] * 30, "stars": [1, 2] * 15},
        ("the column label", "text, stars", "--column label=NAME"),
    ),
    "missing label": ({"text": ["a"] * 3, "label": ["x", None, "y"]}, ("label must", "1 row (", "0: 1")),
    "empty text": (
        {"text": ["a", " ", "b"], "label": ["x", "y", "x"]},
        ("text must", "1 row (", "0: 1)"),
    ),
    "fractions": ({"text": ["a"] * 4, "label": [0.5, 1.5, 2.0, 0.5]}, ("task regress",)),
    "too few": ({"text": ["a"], "label": ["x"]}, ("nothing to learn",)),
}


@pytest.mark.parametrize("name", BAD_TABLES)
def test_bad_tables(no_weights: str, tmp_path: Path, name: str) -> None:
    columns, words = BAD_TABLES[name]
    pd.DataFrame(columns).to_csv(tmp_path / "bad.csv", index=False)
    command = ("train", "--model", no_weights, "--data", tmp_path / "bad.csv", "--task", "classify")
    said = told(*command, "--output", tmp_path / "out")
    assert said.startswith("Error:")
    for word in words:
        assert word in said
    assert not (tmp_path / "out").exists()


def test_an_empty_label_is_missing_in_json_too(no_weights: str, tmp_path: Path) -> None:
    rows = pd.DataFrame({"text": ["a"] * 3, "label": ["x", "", "y"]})
    rows.to_json(tmp_path / "bad.jsonl", orient="records", lines=True)
    said = told("train", "--model", no_weights, "--data", tmp_path / "bad.jsonl", "--task", "classify")
    assert re.search(r"label .*missing .*\b0: 1\)", said)


@pytest.mark.parametrize("trouble", [OSError(errno.ENOSPC, "No space left on device"), MemoryError()])
def test_a_full_machine_is_no_fault_of_the_data(
    table: str, monkeypatch: pytest.MonkeyPatch, trouble: Exception
) -> None:
    """What passes is not told as bad data, which a comparison would file for good."""

    def fail(*_: Any, **__: Any) -> None:
        raise DatasetGenerationError from trouble

    monkeypatch.setattr("lrlora.train.data.load_dataset", fail)
    with pytest.raises(type(trouble)):
        read(table)


def test_an_output_folder_in_use_is_left_alone(encoder: str, table: str, tmp_path: Path) -> None:
    output = tmp_path / "out"
    command = ("train", "--model", encoder, "--data", table, "--task", "classify", *COLUMNS, *SMALL, "--output", output)
    output.mkdir()
    (output / "letter.txt").write_text("dear")
    assert re.match(rf"Error: .*\b{output.name} .*not empty.*remove ", told(*command, "--overwrite"))
    assert (output / "letter.txt").read_text() == "dear"
    (output / "letter.txt").unlink()
    assert run(*command).exit_code == 0
    assert re.match(rf"Error: .*\b{output.name} .*not empty.*--overwrite", told(*command))
    assert run(*command, "--overwrite", "--seed", 1).exit_code == 0
    assert json.loads((output / "run.json").read_text())["config"]["seed"] == 1
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_a_kill_while_a_run_is_overwritten_leaves_no_half_of_it(
    encoder: str, table: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def remove_some(folder: Path, ignore_errors: bool = False) -> None:
        if folder.exists():
            (folder / "run.json").unlink()
            raise KeyboardInterrupt

    output = tmp_path / "out"
    assert train_reviews(encoder, table, output).exit_code == 0
    with monkeypatch.context() as patch:
        patch.setattr("lrlora.train.run.shutil.rmtree", remove_some)
        assert train_reviews(encoder, table, output, "--overwrite").exit_code != 0
    assert not output.exists()
    assert train_reviews(encoder, table, output).exit_code == 0


def test_resume_takes_nothing_else_and_needs_a_run(tmp_path: Path) -> None:
    assert re.match("Error: .*pass no others", told("train", "--resume", tmp_path, "--seed", 3))
    assert re.match("Error: .*contains no run.*run.json", told("train", "--resume", tmp_path))
    assert re.match("Error: .*does not contain a readable adapter", told("evaluate", tmp_path, "--data", __file__))


def test_values_mean_what_is_typed() -> None:
    given = parse_assignments(
        ["eval_strategy=no", "learning_rate=1e-4", "bf16=false", "report_to=[wandb]"], "--training"
    )
    assert given == {"eval_strategy": "no", "learning_rate": 1e-4, "bf16": False, "report_to": ["wandb"]}


@pytest.mark.parametrize("task", ["classify", "causal-lm"])
def test_data_on_disk_is_counted_and_encoded_once(task: str, tmp_path: Path) -> None:
    reviews().rename(columns={"review": "text", "verdict": "label"}).to_csv(tmp_path / "data.csv", index=False)

    def made() -> dict[Path, int]:
        data = load_dataset("csv", data_files=str(tmp_path / "data.csv"), cache_dir=str(tmp_path / "cache"))["train"]
        kind = TASKS[task]
        assert len(kind.lengths(data, tokenizer())) == len(data)
        kind.encode(data, tokenizer(), 8)
        return {path: path.stat().st_mtime_ns for path in tmp_path.rglob("cache-*.arrow")}

    first = made()
    assert len(first) == (2 if task == "classify" else 1)  # TRL encodes the other
    assert made() == first


def test_a_rate_is_found_before_the_training(encoder: str, table: str, tmp_path: Path) -> None:
    output, steps = tmp_path / "run", ("--steps", 24, "--method", "lora", "--training", "logging_steps=1")
    planned = train_reviews(encoder, table, output, *steps, "--find-rate", "--dry-run")
    assert "Learning rate found" in planned.output
    assert "of the head 16 times as high" in " ".join(planned.output.split())
    assert not output.exists()
    result = train_reviews(encoder, table, output, *steps, "--find-rate")
    assert result.exit_code == 0, result.output
    rate = json.loads((output / "run.json").read_text())["found_rate"]
    assert f"Learning rate: {rate:.3g}, half of the best of" in " ".join(result.output.split())
    log = json.loads((output / "log_history.json").read_text())
    assert max(entry.get("learning_rate", 0) for entry in log) == pytest.approx(rate, rel=0.1)
    given = tmp_path / "given"
    result = train_reviews(encoder, table, given, *steps, "--learning-rate", rate)
    assert result.exit_code == 0, result.output
    assert losses(output) == losses(given)


def test_a_run_with_a_found_rate_is_resumed_at_it(
    encoder: str, table: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "run"
    monkeypatch.setattr("lrlora.train.run._fit", lambda *given: signal.raise_signal(signal.SIGTERM))
    options = ("--steps", 24, "--method", "lora", "--training", "logging_steps=1")
    assert train_reviews(encoder, table, output, *options, "--find-rate").exit_code == 130
    monkeypatch.undo()
    rate = json.loads((output / "run.json").read_text())["found_rate"]
    resumed = run("train", "--resume", output)
    assert resumed.exit_code == 0, resumed.output
    assert "half of the best rate" not in resumed.output
    log = json.loads((output / "log_history.json").read_text())
    assert max(entry.get("learning_rate", 0) for entry in log) == pytest.approx(rate, rel=0.1)
    further = (
        "--start-from",
        output,
        "--data",
        table,
        "--steps",
        4,
        "--learning-rate",
        1e-3,
        "--output",
        tmp_path / "2",
    )
    assert run("train", *further).exit_code == 0


@pytest.mark.refused
@pytest.mark.parametrize("option", ["--learning-rate", "--head-learning-rate"])
def test_a_rate_is_found_or_given(encoder: str, table: str, tmp_path: Path, option: str) -> None:
    result = train_reviews(encoder, table, tmp_path / "run", "--find-rate", option, 1e-3)
    assert result.exit_code == 1
    assert re.search(rf"{option[2:].replace('-', '_')}=0\.001 .*find_rate", " ".join(result.output.split()))
    assert not (tmp_path / "run").exists()


@pytest.mark.refused
def test_too_short_a_training_leaves_nothing(encoder: str, table: str, tmp_path: Path) -> None:
    result = train_reviews(encoder, table, tmp_path / "run", "--find-rate")
    assert result.exit_code == 1
    assert re.search(r"12 steps is too short", " ".join(result.output.split()))
    assert not (tmp_path / "run").exists()
