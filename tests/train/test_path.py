"""A new user's way: one vocabulary, messages that lead on, and what travels with an adapter."""

from __future__ import annotations

import json
import re
from itertools import islice
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
import yaml
from peft import PeftModel
from transformers import (
    AutoModel,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BartConfig,
    DebertaV2Config,
    LlamaConfig,
    PreTrainedConfig,
    RobertaConfig,
    ViTConfig,
    XLNetConfig,
)

from lrlora.train.data import dataset_name, load_task_data
from lrlora.train.inference import evaluate, predict
from lrlora.train.inputs import Inputs
from lrlora.train.run import show_plan, train
from lrlora.train.settings import TrainConfig
from lrlora.train.tasks import TASKS

from ..cli import run, told
from ..conftest import TinyModel
from .small import SIZES, read, reviews, tokenizer


@pytest.fixture(autouse=True)
def in_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, encoder: str, no_weights: str) -> None:
    monkeypatch.chdir(tmp_path)
    frame = reviews().rename(columns={"review": "text", "verdict": "label"})
    frame.to_csv("good.csv", index=False)
    frame.to_csv("semicolons.csv", index=False, sep=";")
    frame.assign(text=frame["text"] + " café").to_csv("latin.csv", index=False, encoding="latin-1")
    frame[:0].to_csv("header.csv", index=False)
    Path("nothing.csv").write_text("")
    Path("twice.csv").write_text("text,text,label\na,b,fresh\n")
    frame.rename(columns={"text": "review", "label": "verdict"}).to_csv("columns.csv", index=False)
    gaps = [{"text": "", "label": "fresh"}, {"text": "a film", "label": None}]
    pd.concat([frame, pd.DataFrame(gaps)]).to_csv("gaps.csv", index=False)
    frame.rename(columns={"text": "instruction", "label": "answer"}).to_csv("instructions.csv", index=False)
    Path("notes.txt").write_text("hello")
    Path("broken.jsonl").write_text('{"text": ')
    frame[:20].assign(label=["fresh", "mouldy"] * 10).to_csv("mouldy.csv", index=False)
    for number in NO_NUMBERS:
        frame[:20].assign(label=["1.5"] * 4 + [number] + ["2"] * 15).to_csv(f"numbers-{number}.csv", index=False)
    Path("choices.jsonl").write_text(json.dumps({"question": "a", "choices": ["b", "c"], "label": 0}) + "\n")
    Path("empty").mkdir()
    (Path("adapter") / "adapter_config.json").parent.mkdir()
    Path("adapter/adapter_config.json").write_text("{}")
    LlamaConfig(**SIZES, vocab_size=64).save_pretrained("decoder")
    ViTConfig().save_pretrained("vit")
    for model in (encoder, no_weights):
        Path(Path(model).name).symlink_to(model)


# A cell that holds no finite number in float32 → how it is named.
NO_NUMBERS = {"": "None", "nan": "'nan'", "inf": "inf", "1e39": "1e+39", "many": "'many'"}

# What is given beside --task classify, good data and a model without weights → a pattern of what is said.
MESSAGES: dict[tuple[object, ...], str] = {
    (
        "--data",
        "semicolons.csv",
    ): r"delimiter ',', semicolons\.csv .*'text;label'\..*--delimiter ';'",
    ("--data", "latin.csv"): r"UTF-8.*--encoding latin-1",
    ("--data", "header.csv"): r"header\.csv .*header \(text, label\) .*no rows",
    ("--data", "nothing.csv"): r"nothing\.csv .*empty",
    ("--data", "twice.csv"): r"columns of twice\.csv .*\btext\b",
    (
        "--data",
        "columns.csv",
    ): r"\btext and label\b.*\breview, verdict\b.*--column text=NAME --column label=NAME",
    (
        "--data",
        "gaps.csv",
    ): r"text must not be empty in gaps\.csv .*--skip-empty.*\b1 row\b",
    ("--data", "none.csv"): r"no file or folder none\.csv",
    ("--data", "notes.txt"): r"notes\.txt .*suffix .*\.csv, ",
    ("--data", "broken.jsonl"): r"broken\.jsonl cannot be read",
    ("--data", "embedded:movie-review"): r"'movie-review'.* movie-reviews\?",
    **{
        ("--task", "regress", "--data", f"numbers-{number}.csv"): rf"label .*\bnumber in numbers-{re.escape(number)}"
        rf"\.csv\b.*\b1 row .*: 4\)\. Row 4 is {re.escape(named)}\."
        for number, named in NO_NUMBERS.items()
    },
    ("--validation", "mouldy.csv"): r"training data: mouldy\..*: fresh, rotten\b",
    (
        "--data",
        "columns.csv",
        "--column",
        "text=reviw",
    ): r"'reviw', .*: review, verdict\b",
    ("--data", "columns.csv", "--column", "texts=review"): r"'texts'.* text\?",
    ("--column", "text_pair=text"): r"column 'text' .*\btext and text_pair\b",
    ("--task", "causal-lm", "--column", "text=text", "--column", "label=label"): r"key of columns 'label'",
    ("--delimiter", ""): r"delimiter .*character, got ''",
    ("--model", "empty"): r"folder empty .*no config\.json",
    (
        "--model",
        "adapter",
    ): r"folder adapter .*adapter, not a model\..*base model",
    ("--model", "./none"): r"model folder \./none",
    ("--model", "embedded:minilmm"): r"'minilmm'.* minilm\?",
    ("--task", "multiple-choice", "--model", "vit", "--column", "question=text"): r"multiple-choice .*\bmodel vit\b",
    ("--task", "causal-lm", "--column", "text=text"): r"causal-lm .*\bmodel no-weights: bert\b.*encoder",
    ("--output", "notes.txt"): r"notes\.txt .*file\..*--output",
    ("--early-stopping", 2, "--training", "eval_strategy=no"): r"early_stopping .*evaluations",
    ("--start-from", "nowhere"): r"nowhere .*no run of `lrlora train`",
    ("none.yaml",): r"no .*file none\.yaml",
    ("--task", "clasify"): r"task 'clasify'\..* classify\?",
    ("--method", "lrlora"): r"'lrlora'.* lr-lora\?",
    ("--learning-rate", -1): r"\blearning_rate .*> 0, got -1",
    ("--head-learning-rate", -1): r"\bhead_learning_rate .*> 0, got -1",
    ("--head-learning-rate", 1, "--task", "causal-lm"): r"head, .*task is causal-lm\b",
    (
        *("--task", "multiple-choice", "--model", "decoder", "--data", "choices.jsonl"),
        *("--head-learning-rate", 0.1),
    ): r"head, .*\bdecoder .*without",
    ("--max-length", 999): r"max_length .*\b48\b",
    ("--method", "lora", "--keep", "0.99", "--validation-examples", 6): r"\b6 validation .*too few",
    ("--keep", "0.95", "--validation-examples", 6): r"\b6 validation .*too few",
    (
        "--adapter",
        "learning_rate=1",
    ): r"field of the adapter 'learning_rate'\..*--learning-rate\b.*\bkey learning_rate\b",
    ("--adapter", "target_modules=["): r"--adapter .*not YAML",
    **{
        ("--method", method, "--adapter", "target_modules=[1]"): r"target_modules .*list .*, got \[1\]"
        for method in ("lr-lora", "lora")
    },
    ("--adapter", "num_basis=3"): r"'num_basis' .*--method lr-lora",
    ("--adapter", "lora_alpha=1e300"): r"lora_alpha of adapter .*float32 \(.*3\.4e\+38\), got 1e\+300",
    ("--adapter", "lora_alpha=.nan"): r"\balpha .*> 0, got nan",
    ("--adapter", "alpha_pattern={query: 1e300}"): r"alpha_pattern of adapter .*float32",
    ("--adapter", "use_dora=true", "--model", "encoder"): r"Fitted ranks .*\buse_dora=True",
    (
        *("--method", "lora"),
        *("--adapter", "init_lora_weights=pissa_niter_4"),
    ): r"loaded\..*init_lora_weights=pissa\.",
    (
        "--training",
        "lora_alpha=1",
    ): r"lora_alpha, .*\bfield of the adapter\b.*--adapter lora_alpha=VALUE",
    ("--training", "oops"): r"--training .*name=value, got 'oops'",
    ("--training", "warmup_step=1"): r"'warmup_step'.* warmup_steps, .*TrainingArguments\?",
    ("--training", "learning_rate=1", "--learning-rate", 2): r"learning_rate=.*same setting",
    ("--training", "learning_rate=-1"): r"\blearning_rate .*> 0, got -1",
    ("--training", "metric_for_best_model=acuracy"): r"'acuracy'.* accuracy\?",
    ("--training", "eval_strategy=sometimes"): r"Error: training: sometimes ",
    ("--training", "adam_beta2=2"): r"adam_beta2 .*between 0 and 1, got 2",
    ("--training", "adam_epsilon=-1"): r"adam_epsilon .*≥ 0, got -1",
    ("--training", "max_grad_norm=.inf"): r"max_grad_norm .*finite, got inf",
    ("--training", "weight_decay=much"): r"weight_decay .*number, got 'much'",
    ("--training", "dataloader_num_workers=1.5"): r"dataloader_num_workers .*integer, got 1\.5",
    ("--training", "eval_accumulation_steps=0"): r"eval_accumulation_steps .*≥ 1, got 0",
    ("--training", "num_train_epochs=1e300"): r"\bsteps, .*too many",
    ("--training", "lr_scheduler_kwargs=fast"): r"'fast' .*\blr_scheduler_type=linear",
    ("--training", "lr_scheduler_kwargs={timescale: 0}"): r"\{'timescale': 0\} .*\blr_scheduler_type=linear",
    (
        "--training",
        "lr_scheduler_kwargs={cycles: 2}",
    ): r"\{'cycles': 2\} .*\blr_scheduler_type=linear \(TypeError",
    ("--training", "prediction_loss_only=true"): r"prediction_loss_only=True\b",
    ("--training", "hub_token=secret"): r"hub_token .*\bHF_TOKEN\b",
    ("--training", "push_to_hub=true"): r"push_to_hub .*\bhf upload\b",
    ("--training", "resume_from_checkpoint=x"): r"lrlora train --resume FOLDER",
}


@pytest.mark.parametrize("name", ["train.csv", "train.tsv", "part/train.csv"])
def test_words_for_nothing_are_labels_in_a_folder_too(name: str) -> None:
    file, labels = Path("folder") / name, ["None", "NA", "null", None, "good"]
    file.parent.mkdir(parents=True)
    pd.DataFrame({"text": "a", "label": labels}).to_csv(file, index=False, sep="\t" if file.suffix == ".tsv" else ",")
    for data in (file, "folder"):
        assert read(str(data))["train"]["label"][:] == labels


def test_a_column_s_name_may_hold_an_equals_sign(encoder: str) -> None:
    reviews().rename(columns={"review": "te=xt", "verdict": "from=pkg"}).to_csv("equals.csv", index=False)
    columns = ("--column", "text=te=xt", "--column", "label=from=pkg")
    result = run("train", "--model", encoder, "--data", "equals.csv", "--task", "classify", *columns, "--dry-run")
    assert result.exit_code == 0, result.output


def test_a_long_first_row() -> None:
    pd.DataFrame({"text": ["a" * 200_000, "b"], "label": ["x", "y"]}).to_csv("long.csv", index=False)
    assert len(read("long.csv")["train"]["text"][0]) == 200_000


def test_texts_that_look_like_numbers() -> None:
    texts = [*map(str, range(12_000)), "a word"]
    pd.DataFrame({"text": texts, "label": ["good", "bad"] * 6_000 + ["bad"]}).to_csv("late.csv", index=False)
    assert read("late.csv")["train"]["text"][:] == texts


def test_labels_are_text(encoder: str) -> None:
    labels = ["10", "007", "7", "1E3", "1000", "Spam", "spam "] * 4
    pd.DataFrame({"text": [f"film {i}" for i in range(28)], "label": labels}).to_csv("codes.csv", index=False)
    said: list[str] = []
    train(TrainConfig(encoder, "codes.csv", "classify", steps=1, output="run"), announce=said.append)
    assert json.loads(Path("run/run.json").read_text())["labels"] == ["007", "7", "10", "1000", "1E3", "Spam", "spam "]
    assert any(line.startswith("Warning: ") and "'Spam', 'spam '" in line for line in said)
    pd.DataFrame({"text": ["a", "b"], "label": ["0.5", "1"]}).to_csv("numbers.csv", index=False)
    assert "task regress" in told("train", "--model", encoder, "--data", "numbers.csv", "--task", "classify")


@pytest.mark.parametrize("name", ["semicolons", "latin", "header", "nothing", "twice"])
def test_what_is_refused_of_a_table_is_refused_in_a_folder(encoder: str, name: str) -> None:
    file = Path(f"{name}.csv")
    Path("folder").mkdir()
    file.rename(Path("folder") / file)
    said = told("train", "--task", "classify", "--model", encoder, "--data", "folder")
    assert re.search(MESSAGES["--data", str(file)], said)


@pytest.mark.parametrize("given", MESSAGES, ids=lambda given: " ".join(map(str, given)))
def test_each_mistake_is_told_with_what_to_do(given: tuple[object, ...]) -> None:
    said = told("train", "--task", "classify", "--data", "good.csv", "--model", "no-weights", *given)
    assert said.startswith("Error: ")
    assert re.search(MESSAGES[given], said), said
    assert not Path("lrlora-run").exists()


def test_a_file_is_no_folder() -> None:
    assert re.search(r"notes\.txt .*--output", told("demo", "--output", "notes.txt"))


def test_data_of_a_folder_are_no_data_set_of_the_hub(encoder: str) -> None:
    Path("data").mkdir()
    Path("good.csv").rename("data/good.csv")
    assert Inputs.read(TrainConfig(encoder, "data/good.csv", "classify")).record.dataset is None
    assert dataset_name("stanfordnlp/imdb:plain_text") == "stanfordnlp/imdb"


FILES = {
    "num_train_epochs: 3": r"'num_train_epochs'\..*--epochs\b.*\bkey epochs\.",
    "warmup_steps: 3": r"'warmup_steps'\..* warmup_steps, .*TrainingArguments",  # and not the setting steps
    "max_steps: 1": r"setting of a run 'max_steps'\..*--steps\b",
    "r: 1": r"setting of a run 'r'\..*--rank\b",
    "lora_alpha: 3": r"setting of a run 'lora_alpha'\..*--alpha\b.*\bkey alpha\.",
    "target_modules: x": r"setting of a run 'target_modules'\..*--targets\b",
    "use_dora: true": r"setting of a run 'use_dora'\..*--method dora\b.*\bkey method\b",
    "learning_rat: 3": r"'learning_rat'\..* learning_rate, .*setting of a run\?",
    "eval_strateg: steps": r"'eval_strateg'\..* eval_strategy, .*TrainingArguments",
    "learning_rate: 1\ntraining: {learning_rate: 2}": r"learning_rate=1 .*\blearning_rate=2 .*training .*same",
    "rank: 1\nadapter: {r: 2}": r"\brank=1 .*\br=2 .*adapter .*same",
    "method: [": r"run\.yaml .*not YAML",
    "method: [a, b]": r"method .*string, got \['a', 'b'\]",
    "steps: 1:30": r"steps .*integer, got '1:30'",
    "seed: 3\nsteps: 30\nseed: 4": r"run\.yaml .*not YAML: .*\bkey seed\b",
    "columns:": r"columns .*map",
}


@pytest.mark.parametrize("line", FILES)
def test_a_key_of_the_file_that_is_none_is_told_where_it_belongs(line: str) -> None:
    Path("run.yaml").write_text(f"model: no-weights\ndata: good.csv\ntask: classify\n{line}\n")
    said = told("train", "run.yaml")
    assert said.startswith("Error: ")
    assert re.search(FILES[line], said), said


def test_flags_keys_and_fields_are_one_vocabulary(encoder: str) -> None:
    settings = {"learning_rate": 0.002, "steps": 3, "batch_size": 4, "rank": 2, "seed": 7, "max_length": 16}
    flags = [str(word) for name, value in settings.items() for word in (f"--{name.replace('_', '-')}", value)]
    common: dict[str, Any] = {"model": encoder, "data": "good.csv", "task": "classify"}
    Path("run.yaml").write_text(yaml.safe_dump(common | settings))
    assert run("train", "run.yaml", "--output", "file").exit_code == 0
    named = [word for name, value in common.items() for word in (f"--{name}", value)]
    assert run("train", *named, *flags, "--output", "flags").exit_code == 0
    train(TrainConfig(**common, **settings, output="python"), announce=lambda line: None)
    records = [json.loads(Path(name, "run.json").read_text())["config"] for name in ("file", "flags", "python")]
    assert all(record | {"output": ""} == records[0] | {"output": ""} for record in records)
    losses = [json.loads(Path(name, "metrics.json").read_text())["loss"] for name in ("file", "flags", "python")]
    assert losses[0] == losses[1] == losses[2]


def test_what_the_command_line_says_wins_under_either_name(encoder: str) -> None:
    training = "{learning_rate: 0.5, eval_strategy: no}"
    Path("run.yaml").write_text(f"model: {encoder}\ndata: good.csv\ntask: classify\nsteps: 9\ntraining: {training}\n")
    result = run("train", "run.yaml", "--learning-rate", 0.001, "--training", "max_steps=2", "--dry-run")
    assert result.exit_code == 0, result.output
    said = " ".join(result.output.split())
    assert " 2 steps of " in said
    assert "Learning rate 0.001, of the head 0.016, with " in said
    assert re.search(r"evaluation [^,]*\bend\b", said)


def test_epochs_on_the_command_line_replace_the_file_s_steps(encoder: str) -> None:
    Path("run.yaml").write_text(f"model: {encoder}\ndata: good.csv\ntask: classify\nsteps: 999\nbatch_size: 16\n")
    assert " 9 steps of 16 examples" in " ".join(run("train", "run.yaml", "--epochs", 1, "--dry-run").output.split())


@pytest.mark.refused
@pytest.mark.parametrize(
    ("option", "value", "said"),
    [("--training", "adam_beta1=2", "adam_beta1 "), ("--adapter", "init_lora_weights=eva", "init_lora_weights='eva'")],
)
def test_settings_are_checked_before_data_are_read(encoder: str, option: str, value: str, said: str) -> None:
    command = ("train", "--model", encoder, "--task", "classify", "--data", "header.csv", "--method", "lora")
    assert said in told(*command, option, value)


def test_a_dry_run_shows_an_example_of_each_task_and_writes_nothing(
    encoder: str, decoder: str, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{"question": "a film", "choices": ["is good", "is bad"], "label": i % 2} for i in range(40)]
    pd.DataFrame(rows).to_json("choices.jsonl", orient="records", lines=True)
    reviews().assign(text="a film", label=0.5).to_csv("numbers.csv", index=False)
    before = sorted(Path().rglob("*"))
    for task, model, data, shown in (
        ("classify", encoder, "good.csv", "→ rotten"),
        ("regress", encoder, "numbers.csv", "'a film' → 0.5"),
        ("multiple-choice", encoder, "choices.jsonl", "'a film is good'"),
        ("multiple-choice", decoder, "choices.jsonl", "is good"),
        ("causal-lm", decoder, "instructions.csv", "⟦"),
    ):
        columns = {"prompt": "instruction", "completion": "answer"} if task == "causal-lm" else {}
        show_plan(TrainConfig(model, data, task, columns=columns))
        (example,) = (line for line in capsys.readouterr().out.splitlines() if line.startswith("Example"))
        assert shown in example
    assert sorted(Path().rglob("*")) == before


def test_what_is_empty_is_left_out_on_demand_and_counted(encoder: str) -> None:
    settings = ("--model", encoder, "--task", "classify", "--steps", 2, "--batch-size", 4)
    result = run("train", *settings, "--data", "gaps.csv", "--skip-empty", "--output", "skipped")
    assert re.search(r"Skipped 2 of 162 .*gaps\.csv", result.output)
    assert run("train", *settings, "--data", "good.csv", "--output", "whole").exit_code == 0
    asked = ("predict", "whole", "--data", "gaps.csv", "--output", "out.jsonl")
    assert re.search(r"gaps\.csv .*--skip-empty", told(*asked))
    result = run(*asked, "--skip-empty")
    assert "Skipped 1 of 162 examples" in result.output  # an example without a label can be predicted
    assert len(Path("out.jsonl").read_text().splitlines()) == 161
    for run_folder in ("skipped", "whole"):
        result = run(
            "evaluate", run_folder, "--data", "gaps.csv", *(("--skip-empty",) if run_folder == "whole" else ())
        )
        assert "Skipped 2 of 162 examples" in result.output


def test_files_of_a_spreadsheet_are_read_when_it_is_said_how(encoder: str) -> None:
    settings = ("--model", encoder, "--task", "classify", "--steps", 2, "--batch-size", 4)
    for data, how in (("semicolons.csv", ("--delimiter", ";")), ("latin.csv", ("--encoding", "latin-1"))):
        assert run("train", *settings, "--data", data, *how, "--output", data[:5]).exit_code == 0
        assert run("evaluate", data[:5], "--data", data).exit_code == 0  # as in training


def test_few_examples_and_labels_of_their_own_are_warned_of(encoder: str, capsys: pytest.CaptureFixture[str]) -> None:
    pd.read_csv("good.csv").assign(label=range(160)).to_csv("own.csv", index=False)
    show_plan(TrainConfig(encoder, "own.csv", "classify"))
    assert re.search(r"Warning: .*\b160 .*labels", capsys.readouterr().out)
    pd.read_csv("good.csv").drop_duplicates("label").to_csv("two.csv", index=False)
    show_plan(TrainConfig(encoder, "two.csv", "classify", validation="good.csv"))
    said = capsys.readouterr().out
    assert re.search(r"Warning: .*only 2 ", said)
    assert re.search(r"Warning: \d+ of 160 validation", said)
    show_plan(TrainConfig(encoder, "good.csv", "classify", validation="good.csv", validation_examples=60))
    assert "Warning: 60 of 60 validation" in capsys.readouterr().out
    for name, pair in (("train", "a film"), ("other", "a plot")):
        pd.read_csv("good.csv").assign(text_pair=pair).to_csv(f"{name}.csv", index=False)
    show_plan(TrainConfig(encoder, "train.csv", "classify", validation="other.csv"))
    assert not re.search(r"Warning: [\d,]+ of [\d,]+ validation", capsys.readouterr().out)  # beside another second text


def test_what_is_missing_is_asked_for(decoder: str) -> None:
    assert re.search(r"required .*: task\b.*--task", told("train", "--model", decoder, "--data", "good.csv"))
    said = told(
        *("train", "--model", decoder, "--task", "causal-lm", "--data", "instructions.csv"),
        *("--column", "prompt=instruction"),
    )
    assert "but no completion" in said
    assert "--column completion=NAME" in said


def test_a_finished_run_is_trained_further_from_its_adapter(encoder: str) -> None:
    settings = (
        "--model",
        encoder,
        "--task",
        "classify",
        "--data",
        "good.csv",
        "--batch-size",
        16,
        "--rank",
        2,
        "--method",
        "lr-lora",
    )
    assert (
        run("train", *settings, "--learning-rate", 0.01, "--steps", 60, "--output", "first", "--no-measure").exit_code
        == 0
    )
    said = told("train", "--resume", "first")
    assert "is finished" in said
    assert "--start-from first" in said
    assert re.search(r"--resume .*--start-from first", told("train", "--resume", "first", "--steps", 9))
    result = run(
        "train", "--start-from", "first", "--output", "second", "--steps", 1, "--learning-rate", 1e-6, "--no-measure"
    )
    assert result.exit_code == 0, result.output
    first, second = (json.loads(Path(name, "metrics.json").read_text()) for name in ("first", "second"))
    assert second["loss"] == pytest.approx(first["loss"], abs=1e-3)  # it began where the first ended
    assert json.loads(Path("second", "run.json").read_text())["config"]["rank"] == 2
    said = told("train", "--start-from", "first", "--rank", 3, "--output", "third")
    assert re.search(r"adapter .*\bfirst, \{'r': 2\}, got \{'r': 3\}", said)


def test_overwriting_deletes_no_input(encoder: str) -> None:
    arguments = ("train", "--model", encoder, "--task", "classify", "--steps", 1, "--output", "out")
    assert run(*arguments, "--data", "good.csv").exit_code == 0
    inside, settings = Path("out/good.csv"), Path("out/settings.yaml")
    Path("good.csv").rename(inside)
    assert f"data={inside}," in told(*arguments, "--data", inside, "--overwrite")
    start = ("train", "--start-from", "out", "--data", "out/../columns.csv", "--output", "out", "--overwrite")
    assert "start_from=out," in told(*start)
    settings.write_text(f"model: {encoder}\ntask: classify\ndata: columns.csv\noutput: out\n")
    assert f"config={settings}," in told("train", settings, "--overwrite")
    Path("link").symlink_to("out")
    assert f"data={inside}," in told(*arguments[:-1], "link", "--data", inside, "--overwrite")
    assert inside.is_file()
    assert settings.is_file()


def test_files_are_replaced_only_where_it_is_said(encoder: str) -> None:
    assert run("train", "--model", encoder, "--task", "classify", "--steps", 1, "--data", "good.csv").exit_code == 0
    weights = Path("lrlora-run/adapter_model.safetensors")
    before = weights.read_bytes()
    assert "already exists" in told("ranks", "lrlora-run", "--json", weights)
    assert "already exists" in told("evaluate", "lrlora-run", "--data", "good.csv", "--json", weights)
    command = ("predict", "lrlora-run", "--data", "good.csv", "--output", "good.csv", "--overwrite")
    assert re.search(r"--overwrite .*data=good\.csv,", told(*command))
    assert "run=lrlora-run," in told(*command[:-2], weights, "--overwrite")
    Path("data").mkdir()
    assert "data is a folder" in told(*command[:-2], "data", "--overwrite")
    Path("good.csv").rename("data/train.csv")
    Path("good.csv").symlink_to("data/train.csv")
    for data, output in (("data", "data/train.csv"), ("good.csv", "data/train.csv"), ("data/train.csv", "good.csv")):
        said = told("predict", "lrlora-run", "--data", data, "--output", output, "--overwrite")
        assert f"data={data}," in said
    assert Path("data/train.csv").read_text().startswith("text,label")
    assert weights.read_bytes() == before
    assert run("predict", "lrlora-run", "--text", "a film", "--output", "one.jsonl").exit_code == 0
    assert len(Path("one.jsonl").read_text().splitlines()) == 1
    assert "--split describes data" in told("predict", "lrlora-run", "--text", "a film", "--split", "train")
    result = run("predict", "lrlora-run", typed="a film\n\na bore\n")
    assert re.search(r"Line 2 .*empty", " ".join(result.output.split()))
    TinyModel("gpt2").build().save_pretrained("other")
    assert re.search(r"\bother .*no weight", told("ranks", "lrlora-run", "--base", "other"))
    Path("latin.yaml").write_bytes("task: classify\noutput: café\n".encode("latin-1"))
    assert re.search(r"latin\.yaml .*UTF-8", told("train", "latin.yaml"))


def test_an_adapter_travels_with_its_classes_and_a_plain_lora(encoder: str) -> None:
    for form in ("residual", "expansion"):
        settings = ("--model", encoder, "--task", "classify", "--data", "good.csv", "--adapter", f"form={form}")
        options = (
            "--learning-rate",
            0.01,
            "--steps",
            30,
            "--rank",
            2,
            "--method",
            "lr-lora",
            "--output",
            form,
            "--no-measure",
        )
        assert run("train", *settings, *options).exit_code == 0
        assert run("export", form, "--output", f"{form}-lora").exit_code == 0
        outputs = []
        for folder in (form, f"{form}/lora"):
            card = Path(folder, "README.md").read_text(encoding="utf-8")
            code = card.partition("```python\n")[2].partition("```")[0]
            names: dict[str, Any] = {}
            exec(code.replace("this folder or hub name", folder).replace("the base model", encoder), names)
            assert names["model"].config.id2label == {0: "fresh", 1: "rotten"}
            inputs = names["tokenizer"](list(reviews()["review"][:8]), return_tensors="pt", padding=True)
            outputs.append(names["model"].eval()(**inputs).logits.detach())
        assert outputs[0].shape == outputs[1].shape == (8, 2)
        # φ(BA) loses a hundredth of the energy; a product loses nothing.
        assert (outputs[0] - outputs[1]).abs().max() < (1e-4 if form == "expansion" else 0.3)
        for folder in (form, f"{form}/lora", f"{form}-lora"):
            card = Path(folder, "README.md").read_text(encoding="utf-8")
            assert re.search(r"Classes.*: fresh, rotten\.", card)
            assert ("`lora`" in card) == (folder == form)
            assert str(Path(encoder).parent) not in card  # a folder of this machine is nobody's base model


def test_a_run_from_python_is_trained_further_with_other_steps_and_rate(encoder: str) -> None:
    training = {"max_steps": 6, "learning_rate": 0.01, "per_device_train_batch_size": 4, "weight_decay": 0.1}
    config = TrainConfig(
        encoder, "good.csv", "classify", method="lr-lora", output="first", adapter={"r": 2}, training=training
    )
    train(config, announce=lambda line: None)
    options = ("--steps", 3, "--learning-rate", 0.001, "--batch-size", 8, "--no-measure")
    result = run("train", "--start-from", "first", "--output", "second", *options)
    assert result.exit_code == 0, result.output
    assert "3 steps of 8 examples" in " ".join(result.output.split())
    settings = json.loads(Path("second", "run.json").read_text())["config"]
    assert settings["training"] == {"weight_decay": 0.1}
    assert [settings[name] for name in ("learning_rate", "rank")] == [0.001, 2]
    result = run("train", "--start-from", "first", "--output", "third", "--epochs", 1, "--dry-run")
    assert "36 steps of 4 examples" in " ".join(result.output.split())


# Encoders whose heads have parts beside the last layer, which checkpoints of the bare encoder lack.
HEADS: dict[str, PreTrainedConfig] = {
    "xlnet": XLNetConfig(d_model=32, n_layer=2, n_head=2, d_inner=64, vocab_size=64, pad_token_id=0),
    "deberta": DebertaV2Config(**SIZES, vocab_size=64, pad_token_id=0, pooler_hidden_size=32),
    "bart": BartConfig(
        **{"d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64},
        **{"encoder_attention_heads": 2, "decoder_attention_heads": 2, "vocab_size": 64, "init_std": 0.3},
        **{"pad_token_id": 0, "eos_token_id": 2, "bos_token_id": 3, "max_position_embeddings": 48},
    ),
}


def save_bare(name: str) -> str:
    torch.manual_seed(0)
    AutoModel.from_config(HEADS[name]).save_pretrained(name)
    tokenizer().save_pretrained(name)
    return name


@pytest.mark.parametrize("name", HEADS)
def test_a_head_travels_whole_with_its_adapter(name: str) -> None:
    frame = pd.read_csv("good.csv")
    frame.assign(text=frame["text"] + " [EOS]").to_csv("good.csv", index=False)  # at which BART's head looks
    settings = ("--model", save_bare(name), "--task", "classify", "--data", "good.csv", "--validation", "good.csv")
    options = ("--method", "lr-lora", "--learning-rate", 0.01, "--steps", 10, "--output", "out", "--no-measure")
    assert run("train", *settings, *options).exit_code == 0
    trained = json.loads(Path("out", "metrics.json").read_text())
    metrics = evaluate("out", "good.csv")
    assert metrics["loss"] == pytest.approx(trained["loss"], abs=1e-5)
    assert metrics["accuracy"] == trained["accuracy"]

    texts = list(frame["text"][:8] + " [EOS]")
    inputs = AutoTokenizer.from_pretrained("out")(texts, return_tensors="pt", padding=True)
    said = [[p["probabilities"][label] for label in ("fresh", "rotten")] for p in islice(predict("out", "good.csv"), 8)]
    for folder, error in (("out", 1e-5), ("out/lora", 0.05)):  # a plain LoRA loses a hundredth of the energy
        base = AutoModelForSequenceClassification.from_pretrained(name, num_labels=2)
        model = PeftModel.from_pretrained(base, folder).merge_and_unload(safe_merge=True).eval()
        with torch.no_grad():
            assert (model(**inputs).logits.softmax(-1) - torch.tensor(said)).abs().max() < error


def test_a_pooler_that_starts_at_random_travels_with_an_adapter_for_choices() -> None:
    torch.manual_seed(0)
    config = RobertaConfig(**SIZES, vocab_size=64, pad_token_id=0, max_position_embeddings=49)
    AutoModel.from_config(config, add_pooling_layer=False).save_pretrained("roberta")
    tokenizer().save_pretrained("roberta")
    rows = [{"question": "a film", "choices": ["splendid plot", "dull plot"], "label": row % 2} for row in range(24)]
    Path("choices.jsonl").write_text("\n".join(map(json.dumps, rows)))
    settings = ("--model", "roberta", "--task", "multiple-choice", "--data", "choices.jsonl")
    options = ("--validation", "choices.jsonl", "--learning-rate", 0.01, "--steps", 4, "--output", "out")
    assert run("train", *settings, *options).exit_code == 0
    trained = json.loads(Path("out", "metrics.json").read_text())
    assert evaluate("out", "choices.jsonl")["loss"] == pytest.approx(trained["loss"], abs=1e-5)


@pytest.mark.parametrize(
    ("options", "count"), [(("--training", "save_steps=10"), 2), (("--training", "eval_steps=10"), 2), ((), 1)]
)
def test_evaluations_are_few_and_a_checkpoint_is_saved_at_each(
    encoder: str, options: tuple[str, ...], count: int
) -> None:
    settings = ("--model", encoder, "--task", "classify", "--data", "good.csv", "--steps", 20, "--batch-size", 4)
    result = run("train", *settings, *options)
    assert result.exit_code == 0, result.output
    assert result.output.count("Step ") == count
    assert "log_loss" not in result.output  # it is the loss


def test_a_group_stays_on_one_side_of_the_split(encoder: str) -> None:
    frame = pd.read_csv("good.csv")
    frame.assign(film=[row // 8 for row in range(len(frame))]).to_csv("films.csv", index=False)
    config = TrainConfig(encoder, "films.csv", "classify", columns={"group": "film"}, validation_share=0.25)
    splits = load_task_data(config, TASKS["classify"]).splits
    training, validation = (set(splits[name]["group"]) for name in ("train", "validation"))
    assert not training & validation
    assert len(validation) == 5
