"""Exports by what the loss says, on tiny runs: from the command line, for every kind of task and adapter."""

from __future__ import annotations

import json
import math
import re
import shutil
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pandas as pd
import pytest
import torch
from peft import AutoPeftModelForCausalLM, LoraConfig, PeftConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from lrlora.adapters import read_updates
from lrlora.learned import energy_curve
from lrlora.learned.gain import mean_of
from lrlora.ranks import RankReport, rank_report
from lrlora.shrunk import read_shrunk
from lrlora.straightened import read_straightened
from lrlora.train.compression import Compression, Subject
from lrlora.train.inference import evaluate
from lrlora.train.run import rank_report_of, train
from lrlora.train.settings import TrainConfig
from lrlora.tuner.layer import LrLoraLayer

from ..cli import run, told
from .small import reviews, save_decoder, save_encoder, save_image_model, save_pictures, size_of


def export(source: Path, output: Path, *arguments: object) -> str:
    result = run("export", source, "--output", output, *arguments)
    assert result.exit_code == 0, result.output
    return " ".join(result.output.split())


def squeezed(text: str) -> str:
    """Without white space: a terminal breaks long paths anywhere."""
    return "".join(text.split())


def kept_by(output: str) -> float:
    """Share of the gain that an export has kept, by what is written."""
    match = re.search(r"As loaded by PEFT from .*?: [\d.]+, (-?[\d.]+)% \(\S+ to [\d.]+%\) of the gain kept", output)
    assert match, output
    return float(match[1]) / 100


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models, data, and a finished run of a classifier, with LoRA of rank 4 on all linear layers."""
    folder = tmp_path_factory.mktemp("home")
    save_encoder(folder / "encoder")
    save_decoder(folder / "decoder")
    frame = reviews(360).rename(columns={"review": "text", "verdict": "label"})
    frame[:320].to_csv(folder / "reviews.csv", index=False)
    frame[320:].to_csv(folder / "test.csv", index=False)
    frame[["text"]].to_csv(folder / "texts.csv", index=False)
    chats = [
        {"messages": [{"role": "user", "content": f"is {word} good ?"}, {"role": "assistant", "content": "it is good"}]}
        for word in frame["text"]
    ]
    (folder / "chats.jsonl").write_text("\n".join(map(json.dumps, chats)))
    train(settings(folder), announce=lambda line: None)
    return folder


def settings(home: Path, name: str = "run", **fields: Any) -> TrainConfig:
    of_task = {"model": str(home / "encoder"), "data": str(home / "reviews.csv"), "task": "classify", "method": "lora"}
    usual = {"rank": 4, "steps": 60, "learning_rate": 1e-2, "training": {"eval_strategy": "no"}}
    usual |= {"validation_share": 0.3}
    if fields.get("task") != "causal-lm":
        usual["head_learning_rate"] = 1e-2  # at a higher one, the head learns all
    return TrainConfig(**{**of_task, **usual, "output": str(home / name), **fields})


def test_the_smallest_that_keeps_a_share_of_the_gain(home: Path, tmp_path: Path) -> None:
    before = {path: path.read_bytes() for path in (home / "run").rglob("*") if path.is_file()}
    output = export(home / "run", tmp_path / "small", "--keep", "0.9")
    assert re.search(r"Cut by loss: .*\b224 examples .*\b96 ", output)
    assert kept_by(output) >= 0.8  # of 32 examples, which chose nothing
    found = read_shrunk(tmp_path / "small")
    assert found is not None
    assert " ".join(str(found).split()) in output
    assert "Accuracy: " in str(found)
    assert size_of(tmp_path / "small") < size_of(home / "run") / 2
    assert PeftConfig.from_pretrained(tmp_path / "small").peft_type.value == "LORA"
    # The test data was not looked at. Without lrlora, by the names of the classes that the export has.
    config = json.loads((tmp_path / "small" / "config.json").read_text())
    base = AutoModelForSequenceClassification.from_pretrained(home / "encoder", num_labels=len(config["id2label"]))
    served = PeftModel.from_pretrained(base, tmp_path / "small").eval()
    assert served.config.num_labels == 2
    as_trained, as_cut = (
        evaluate(tmp_path / "small" if cut else home / "run", str(home / "test.csv")) for cut in (0, 1)
    )
    guess = math.log(2)
    assert guess - as_cut["loss"] >= 0.8 * (guess - as_trained["loss"])
    assert before == {path: path.read_bytes() for path in (home / "run").rglob("*") if path.is_file()}


def test_a_new_head_s_random_answers_inflate_nothing(home: Path, tmp_path: Path) -> None:
    """Without the adapter the trained head is worse than guessing, which is what the gain is counted from."""
    shutil.copytree(home / "run", tmp_path / "run")
    weights = load_file(tmp_path / "run" / "adapter_model.safetensors")
    (head,) = (name for name in weights if name.endswith("classifier.weight"))
    save_file({**weights, head: 300 * weights[head]}, tmp_path / "run" / "adapter_model.safetensors")
    subject = Subject.read(str(tmp_path / "run"), announce=lambda line: None)
    compression = Compression(subject, announce=lambda line: None)
    assert mean_of(compression.last.without) == pytest.approx(math.log(2), abs=0.02)
    nothing = [of.factors(0) for of in compression.cut.curve.modules]
    assert mean_of(compression.last.measure(nothing)) > 2 * mean_of(compression.last.without)


def test_a_small_gain_is_kept_or_the_cut_refused(home: Path, tmp_path: Path) -> None:
    chat = {"model": str(home / "decoder"), "data": str(home / "chats.jsonl"), "task": "causal-lm"}
    train(settings(home, "short", learning_rate=1e-4, steps=20, **chat), announce=lambda line: None)
    compression = Compression(Subject.read(str(home / "short"), announce=print), announce=print)
    splits = compression.cut.splits
    base, loss = (mean_of(torch.cat([getattr(s, name) for s in splits])) for name in ("without", "whole"))
    assert base < 1.01 * loss
    output = export(home / "short", tmp_path / "small", "--keep", "0.9")
    assert f"(loss {base:.4g} to {loss:.4g})" in output
    assert kept_by(output) >= 0.9


def test_an_adapter_that_gains_nothing(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(home / "run", tmp_path / "run")
    weights = load_file(tmp_path / "run" / "adapter_model.safetensors")
    against = {name: -tensor if ".lora_B." in name else tensor for name, tensor in weights.items()}
    save_file(against, tmp_path / "run" / "adapter_model.safetensors")
    said = told("export", tmp_path / "run", "--keep", "0.99", "--output", tmp_path / "out")
    assert re.search(r"gains nothing .*\b96 held-out", said)
    for option in ("--validation-share", "--data", "--energy", "--size"):
        assert option in said
    assert not (tmp_path / "out").exists()
    assert "of the gain" not in export(tmp_path / "run", tmp_path / "sized", "--size", "r1")
    # At the end of training, it is said, and the run is finished.
    arguments = ["--model", home / "encoder", "--data", home / "reviews.csv", "--task", "classify", "--steps", 3]
    arguments += ["--learning-rate", "1e-6", "--method", "lora", "--validation-share", "0.3"]
    for options in ([], ["--keep", "0.99"]):
        result = run("train", *arguments, "--output", tmp_path / f"new{len(options)}", *options)
        assert result.exit_code == 0, result.output
        said = " ".join(result.output.split())
        assert re.search("hardly better than guessing|above that of guessing", said)
        # A cut that nobody asked for is not tried.
        assert bool(re.search(r"not chosen: .*gains nothing", said)) == bool(options), said[-3000:]
        assert "lrlora report " in said


def test_too_few_examples_are_told_with_the_number_that_would_do(home: Path, tmp_path: Path) -> None:
    train(settings(home, "narrow", rank=1), announce=lambda line: None)  # has nothing to spare
    pd.read_csv(home / "test.csv")[:36].to_csv(tmp_path / "few.csv", index=False)
    said = told(
        "export", home / "narrow", "--keep", "0.9", "--data", tmp_path / "few.csv", "--output", tmp_path / "out"
    )
    assert re.search(r"\b18 held-out .*too few", said)
    assert "at least 90 examples" in said
    assert "Cut by loss" not in said  # nothing was measured
    pd.concat([pd.read_csv(home / "reviews.csv")[:80], pd.read_csv(home / "test.csv")]).to_csv(tmp_path / "more.csv")
    said = told(
        "export", home / "narrow", "--keep", "0.9", "--data", tmp_path / "more.csv", "--output", tmp_path / "out"
    )
    assert re.search(r"\b60 held-out .*too few .*120 examples, of which 60 give the gradients: about 180 ", said)
    output = export(home / "narrow", tmp_path / "small", "--keep", "0.99999")
    assert re.search(r"No smaller LoRA .*\b0\.99999 ", output)
    assert size_of(tmp_path / "small") == size_of(home / "narrow")


def test_a_size_is_filled_with_what_matters_where_there_is_data(home: Path, tmp_path: Path) -> None:
    by_loss_, by_energy = tmp_path / "by-loss", tmp_path / "by-energy"
    output = export(home / "run", by_loss_, "--size", "r2")
    assert "Cut by loss" in output
    assert "Cut by loss" not in export(home / "run", by_energy, "--size", "r2", "--by", "energy")
    assert "Loss as cut, on the last third: " in output
    assert kept_by(output) > 0.5
    largest = max(len(t) for n, t in load_file(by_loss_ / "adapter_model.safetensors").items() if ".lora_A." in n)
    assert largest > 2
    options = ("--max-rank", "1", "--for", "hot-swap", "--dtype", "bfloat16")
    assert "Cut by loss" in export(home / "run", tmp_path / "capped", *options, "--by", "loss")
    assert "Cut by loss" not in export(home / "run", tmp_path / "quick", *options)  # as for any adapter
    weights = load_file(tmp_path / "capped" / "adapter_model.safetensors")
    assert {len(t) for n, t in weights.items() if ".lora_A." in n} == {1}
    assert {t.dtype for n, t in weights.items() if ".lora_" in n} == {torch.bfloat16}


METHODS: dict[str, dict[str, Any]] = {
    "lr-lora": {"method": "lr-lora"},
    "expansion": {"method": "lr-lora", "adapter": {"form": "expansion", "num_terms": 4}},
    "dora": {"method": "dora"},
}


@pytest.mark.parametrize("method", METHODS)
def test_any_update_becomes_a_lora_first(home: Path, tmp_path: Path, method: str) -> None:
    train(settings(home, f"of-{method}", **METHODS[method]), announce=lambda line: None)
    if (stored := rank_report_of(home / f"of-{method}")) is not None:  # of the whole update
        measured = {row.module: row.stable_rank for row in rank_report(read_updates(home / f"of-{method}")).rows}
        assert {row.module: row.stable_rank for row in stored.rows} == pytest.approx(measured, rel=1e-3)
    output = export(home / f"of-{method}", tmp_path / "small", "--size", "r4")
    # Its classes have names, by which data is read.
    assert evaluate(tmp_path / "small", str(home / "test.csv"), announce=lambda line: None)["accuracy"] > 0.6
    assert kept_by(output) > 0.8, output
    assert not PeftConfig.from_pretrained(tmp_path / "small").use_dora


def test_of_two_cuts_to_the_same_ranks_the_better_one_is_taken(home: Path) -> None:
    train(settings(home, "high", rank=8, learning_rate=3e-2), announce=lambda line: None)
    compression = Compression(Subject.read(str(home / "high"), announce=lambda line: None), announce=lambda line: None)
    size = sum(part.parameters_per_rank for part in compression.subject.whole)
    both = compression.cut.curve.within(size, 1), energy_curve(compression.subject.whole).within(size, 1)
    assert [[part.rank for part in factors] for factors in both] == 2 * [[1] * len(compression.subject.whole)]
    measured = map(compression.cut.splits[0].measure, (*both, compression.within(size, 1)[0]))
    by_loss, by_energy, chosen = map(mean_of, measured)
    assert by_energy != by_loss
    assert chosen == min(by_loss, by_energy)


def test_chats_continued_and_an_adapter_from_elsewhere(home: Path, tmp_path: Path) -> None:
    config = settings(home, "chat", model=str(home / "decoder"), data=str(home / "chats.jsonl"), task="causal-lm")
    train(config, announce=lambda line: None)
    assert kept_by(export(home / "chat", tmp_path / "small", "--keep", "0.98")) >= 0.98
    # Without what `lrlora train` wrote of it, and with the data given.
    shutil.copytree(home / "chat", tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "run.json").unlink()
    output = export(tmp_path / "elsewhere", tmp_path / "other", "--keep", "0.98", "--data", home / "chats.jsonl")
    assert "chats.jsonl" in squeezed(output)
    assert kept_by(output) >= 0.98
    moved = json.loads((tmp_path / "elsewhere" / "adapter_config.json").read_text()) | {"base_model_name_or_path": None}
    (tmp_path / "elsewhere" / "adapter_config.json").write_text(json.dumps(moved))
    given = ["--data", home / "chats.jsonl", "--base", home / "decoder"]
    assert "Loss as cut, on the last third: " in export(
        tmp_path / "elsewhere", tmp_path / "based", "--keep", "0.98", *given, "--no-check"
    )
    loaded = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "other")
    assert isinstance(loaded.get_base_model(), type(AutoModelForCausalLM.from_pretrained(home / "decoder")))


def test_images_and_choices(home: Path, tmp_path: Path) -> None:
    save_image_model(tmp_path / "vit")
    save_pictures(tmp_path / "pictures")
    pictures = {"model": str(tmp_path / "vit"), "data": str(tmp_path / "pictures"), "task": "image-classify"}
    choices = [
        {"question": text, "choices": ["it is good", "it is bad"], "label": int("rotten" in verdict)}
        for text, verdict in reviews(160).itertuples(index=False)
    ]
    (tmp_path / "choices.jsonl").write_text("\n".join(map(json.dumps, choices)))
    likely = {"data": str(tmp_path / "choices.jsonl"), "task": "multiple-choice", "validation_share": 0.5}
    for name, fields in (
        ("images", {**pictures, "validation_share": 0.4}),
        ("choices", {**likely, "model": str(home / "encoder")}),
        ("likelihood", {**likely, "model": str(home / "decoder"), "head_learning_rate": None}),
    ):
        train(settings(tmp_path, name, **fields), announce=lambda line: None)
        small = tmp_path / f"small-{name}"
        assert re.search(r"\d%\) of the gain", export(tmp_path / name, small, "--size", "r2"))
        if name == "likelihood":  # the export is any language model's
            continue
        scores = [evaluate(each, fields["data"], split="train") for each in (tmp_path / name, small)]
        assert scores[1]["loss"] == pytest.approx(scores[0]["loss"], rel=0.2)
        assert scores[1].keys() == scores[0].keys()


def test_training_ends_with_the_smallest_size(home: Path, tmp_path: Path) -> None:
    arguments = [
        "--model",
        home / "encoder",
        "--data",
        home / "reviews.csv",
        "--task",
        "classify",
        "--rank",
        4,
        "--method",
        "lora",
    ]
    arguments += ["--steps", 60, "--learning-rate", "1e-2", "--head-learning-rate", "1e-2", "--validation-share", "0.3"]
    result = run("train", *arguments, "--output", tmp_path / "run")
    assert result.exit_code == 0, result.output
    words = " ".join(result.output.split())
    match = re.search(r"Cut to ([\d,]+) of [\d,]+ parameters, as many as LoRA r = ([\d.]+), at most r =", words)
    assert match, result.output
    said = squeezed(result.output)
    assert f"lrloraexport{tmp_path / 'run'}--keep0.99--output{tmp_path / 'run'}-small" in said
    record = read_shrunk(tmp_path / "run")
    assert record is not None
    assert record.parameters == int(match[1].replace(",", "")) in record.sizes
    assert record.shares[0] == pytest.approx(1, abs=1e-3)
    assert record.shares[record.sizes.index(record.parameters)] >= 0.99 == record.keep
    rows = RankReport.from_json(tmp_path / "run" / "ranks.json").rows
    assert {row.module: row.loss_rank for row in rows} == record.ranks
    told_again = " ".join(run("ranks", tmp_path / "run").output.split())
    assert " loss: rank " in told_again
    assert " ".join(str(record).split()) in words
    assert " ".join(str(record).split()) in told_again
    page = run("report", tmp_path / "run", "--output", tmp_path / "page.html")
    assert page.exit_code == 0, page.output
    assert json.dumps(str(record))[1:-1] in (tmp_path / "page.html").read_text()
    result = run("train", *arguments, "--output", tmp_path / "unmeasured", "--no-measure")
    assert result.exit_code == 0, result.output
    assert f"lrloraexport{tmp_path / 'unmeasured'}--keep0.99" in squeezed(result.output)
    assert read_shrunk(tmp_path / "unmeasured") is None
    # Asked for, it is what is beside the adapter.
    result = run("train", *arguments, "--output", tmp_path / "asked", "--method", "expansion", "--size", "r1")
    assert result.exit_code == 0, result.output
    of_rank_1 = sum(row.m + row.n for row in rows)
    assert size_of(tmp_path / "asked" / "lora") <= of_rank_1
    assert float(match[2]) == pytest.approx(record.parameters / of_rank_1, abs=0.05)
    assert PeftConfig.from_pretrained(tmp_path / "asked" / "lora").peft_type.value == "LORA"


@pytest.mark.refused
def test_what_cannot_be_cut_by_loss_is_one_clear_error(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    elsewhere = tmp_path / "elsewhere"
    shutil.copytree(home / "run", elsewhere)
    (elsewhere / "run.json").unlink()
    few = tmp_path / "few.csv"
    few.write_text("text,label\n" + "a film,fresh\n" * 9)
    others = tmp_path / "others.csv"
    others.write_text("text,label\n" + "a film,green\n" * 80)
    empty = tmp_path / "empty.csv"
    empty.write_text("text,label\n")
    single = tmp_path / "single.safetensors"
    torch.manual_seed(0)
    save_file({"up.lora_down.weight": torch.randn(2, 8), "up.lora_up.weight": torch.randn(4, 2)}, single)
    without_type = tmp_path / "without-type"
    base = AutoModelForCausalLM.from_pretrained(home / "decoder")
    get_peft_model(base, LoraConfig(target_modules=["q_proj"], init_lora_weights=False)).save_pretrained(without_type)
    cases = [
        ((home / "run", "--keep", "1.5"), r"keep .*\(0, 1\).*got 1\.5"),
        (
            (home / "run", "--keep", "0.99", "--size", "r1"),
            r"energy, keep, size, .*max_rank .*got keep and size",
        ),
        (
            (home / "run", "--energy", "0.9", "--data", few),
            r"--data .*by loss.*--energy by energy",
        ),
        ((home / "run", "--keep", "0.99", "--by", "energy"), r"--keep .*by loss.*--by energy by energy"),
        ((home / "run", "--keep", "0.99", "--task", "classify"), r"`lrlora train`, .*its task"),
        (
            (elsewhere, "--keep", "0.99", "--data", few, "--task", "causal-lm"),
            r"SEQ_CLS adapter, .*--task causal-lm",
        ),
        ((home / "run", "--max-rank", "2", "--by", "size"), r"--by 'size'\..*: loss, energy\."),
        (
            (home / "run", "--keep", "0.99", "--for", "llama.cpp"),
            r"Error: llama\.cpp .*classifier, score\.",
        ),  # before anything is computed
        ((elsewhere, "--keep", "0.99", "--task", "regress"), r"elsewhere .*by loss .*--data"),
        (
            (home / "run", "--keep", "0.99", "--data", few),
            r"4 examples .*4 labels .*too few",
        ),
        (
            (home / "run", "--keep", "0.99", "--data", others),
            r"others\.csv .*: green",
        ),
        (
            (home / "run", "--keep", "0.99", "--data", home / "texts.csv"),
            r"column label, .*has text",
        ),
        ((home / "run", "--keep", "0.99", "--data", empty), r"empty\.csv .*\(text, label\) .*no rows"),
        ((home / "run", "--keep", "0.99", "--data", tmp_path / "nothing.csv"), r"nothing\.csv"),
        ((single, "--keep", "0.99"), r"single\.safetensors .*base model"),
        (
            (without_type, "--keep", "0.99", "--data", few),
            r"task_type .*adapter_config\.json\..*--task causal-lm",
        ),
        ((home / "run", "--size", "5"), r"5 parameters .*minimum of \d"),
    ]
    for arguments, message in cases:
        output = tmp_path / ("out.safetensors" if arguments[0] == single else "out")
        said = told("export", *arguments, "--output", output)
        assert re.search(squeezed(message), squeezed(said)), said
        assert not output.exists()
    shutil.rmtree(tmp_path / "moved", ignore_errors=True)
    shutil.copytree(home / "run", tmp_path / "moved")
    record = json.loads((tmp_path / "moved" / "run.json").read_text())
    record["config"]["data"] = str(tmp_path / "gone.csv")
    (tmp_path / "moved" / "run.json").write_text(json.dumps(record))
    said = told("export", tmp_path / "moved", "--keep", "0.99", "--output", tmp_path / "out")
    assert "gone.csv" in squeezed(said)
    # By default a run without its data is cut by energy.
    output = export(tmp_path / "moved", tmp_path / "by-energy", "--size", "r1")
    assert re.search(r"by energy .*by loss: ", output)
    assert "gone.csv" in squeezed(output)
    # Whoever stops it while losses are measured finds nothing written.
    monkeypatch.setattr("lrlora.learned.live_cut.put", Mock(side_effect=KeyboardInterrupt))
    result = run("export", home / "run", "--keep", "0.99", "--output", tmp_path / "out")
    assert result.exit_code == 130
    assert "Interrupted. Nothing " in result.output
    assert not (tmp_path / "out").exists()


def test_what_else_was_trained_counts_as_it_is(home: Path, tmp_path: Path) -> None:
    chat = {"model": str(home / "decoder"), "data": str(home / "chats.jsonl"), "task": "causal-lm"}
    for name, adapter in (
        ("tokens", {"trainable_token_indices": {"embed_tokens": [5, 6, 7, 8]}}),
        ("bias", {"bias": "lora_only"}),
        ("embedding", {"target_modules": ["embed_tokens", "q_proj", "down_proj"]}),
    ):
        train(settings(home, f"with-{name}", adapter=adapter, **chat), announce=lambda line: None)
        assert kept_by(export(home / f"with-{name}", tmp_path / name, "--size", "r4")) > 0.98


def test_sizes_of_what_training_writes(home: Path, tmp_path: Path) -> None:
    arguments = ["--model", home / "encoder", "--data", home / "reviews.csv", "--task", "classify", "--steps", 4]
    arguments += ["--output", tmp_path / "run", "--method", "expansion"]
    assert re.search(r"--keep .*--no-measure", told("train", *arguments, "--keep", "0.9", "--no-measure"))
    assert "--keep or --size" in told("train", *arguments, "--keep", "0.99", "--size", "r1")
    assert re.search(r"\bsize .*250000.* got 'small'", told("train", *arguments, "--size", "small"))
    assert not (tmp_path / "run").exists()
    settings_file = tmp_path / "run.yaml"
    settings_file.write_text("size: 3\n")
    result = run("train", settings_file, *arguments)
    assert result.exit_code == 1
    said = " ".join(result.output.split())
    assert "Results saved to" in said
    assert re.search(r"finished, .*\blora/ .*not .*: 3 parameters ", said)
    # What was there is still there.
    assert PeftConfig.from_pretrained(tmp_path / "run" / "lora").peft_type.value == "LORA"


def test_a_file_that_loads_as_another_adapter_is_an_error(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Compression, "metric_of", lambda cut, model: None)
    monkeypatch.setattr(Compression, "losses_as_loaded", lambda cut, folder: cut.last.without)
    result = run("export", home / "run", "--size", "r2", "--output", tmp_path / "out")
    assert result.exit_code == 1
    assert "asloadedbyPEFTitlosesmorethanhalfoftheadapter'sgain,whichthecutdidnot" in squeezed(result.output)
    assert (tmp_path / "out" / "adapter_model.safetensors").exists()


def test_what_phi_is_worth_is_the_loss_with_a_line_in_its_place(home: Path, tmp_path: Path) -> None:
    output = tmp_path / "curved"
    result = run(
        *(
            "train",
            "--model",
            home / "encoder",
            "--data",
            home / "reviews.csv",
            "--task",
            "classify",
            "--output",
            output,
        ),
        *("--method", "lr-lora", "--rank", 2, "--steps", 60, "--learning-rate", 3e-2, "--validation-share", 0.4),
    )
    assert result.exit_code == 0, result.output
    found = read_straightened(output)
    assert found is not None
    said = str(found)
    assert said in " ".join(result.output.split())
    assert said in " ".join(run("ranks", output).output.split())
    assert said in " ".join((output / "README.md").read_text(encoding="utf-8").replace("\\", "").split())
    assert 0 < found.bent < 1
    assert found.low <= found.straight - found.loss <= found.high

    # By hand: the base model with W + c·s·BA, and the trained head.
    compression = Compression(Subject.read(str(output), announce=lambda line: None), announce=lambda line: None)
    again = compression.straightened()
    assert again is not None
    assert again.straight == pytest.approx(found.straight, abs=1e-6)
    batches = compression.cut.losses.held_out
    base = AutoModelForSequenceClassification.from_pretrained(home / "encoder", num_labels=2)
    model = PeftModel.from_pretrained(base, output).eval()
    energy = bent = 0.0
    with torch.no_grad():
        for layer in model.modules():
            if isinstance(layer, LrLoraLayer):
                A, B = (part["default"].weight.double() for part in (layer.lrlora_A, layer.lrlora_B))
                delta, product = layer.get_delta_weight("default").double(), layer.scaling["default"] * (B @ A)
                line = (delta * product).sum() / product.square().sum() * product
                energy, bent = energy + delta.square().sum().item(), bent + (delta - line).square().sum().item()
                layer.get_base_layer().weight += line.float()
                layer.enable_adapters(False)  # the head stays
        losses, count = 0.0, 0
        for batch in batches:
            inputs = {name: value for name, value in batch.items() if name != "labels"}
            logits = model(**inputs).logits
            losses += torch.nn.functional.cross_entropy(logits, batch["labels"], reduction="sum").item()
            count += len(batch["labels"])
    assert found.units == count
    assert found.straight == pytest.approx(losses / count, abs=1e-5)
    assert found.straight > found.loss + 1e-4
    assert found.bent == pytest.approx(bent / energy, rel=1e-3)
