"""Adapters that `lrlora train` did not write: evaluated, and asked, as with PEFT alone."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pandas as pd
import pytest
import torch
from peft import AutoPeftModelForCausalLM, AutoPeftModelForSequenceClassification, LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from lrlora.train.inference import evaluate, predict_texts

from ..cli import run, told
from .small import reviews, save_decoder, save_encoder, tokenizer


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A classifier's and a language model's adapter, by PEFT, and examples."""
    folder = tmp_path_factory.mktemp("home")
    save_encoder(folder / "encoder")
    save_decoder(folder / "decoder")
    torch.manual_seed(0)
    options = {"r": 2, "init_lora_weights": False, "target_modules": "all-linear"}
    base = AutoModelForSequenceClassification.from_pretrained(folder / "encoder", num_labels=2)
    get_peft_model(base, LoraConfig(task_type="SEQ_CLS", **options)).save_pretrained(folder / "classifier")
    language = AutoModelForCausalLM.from_pretrained(folder / "decoder")
    get_peft_model(language, LoraConfig(task_type="CAUSAL_LM", **options)).save_pretrained(folder / "talker")
    frame = reviews(40).rename(columns={"review": "text", "verdict": "label"})
    frame.assign(label=(frame["label"] == frame["label"][0]).astype(int)).to_csv(folder / "reviews.csv", index=False)
    return folder


def test_scores_are_those_of_own_code_with_peft(home: Path, tmp_path: Path) -> None:
    scored = run("evaluate", home / "classifier", "--data", home / "reviews.csv", "--json", tmp_path / "scores.json")
    assert scored.exit_code == 0, scored.output
    model = AutoPeftModelForSequenceClassification.from_pretrained(home / "classifier", num_labels=2).eval()
    tokenizer, rows = AutoTokenizer.from_pretrained(home / "encoder"), pd.read_csv(home / "reviews.csv")
    with torch.no_grad():
        logits = torch.cat([model(**tokenizer(text, return_tensors="pt")).logits for text in rows["text"]])
    labels = torch.tensor(rows["label"])
    found = json.loads((tmp_path / "scores.json").read_text())
    assert found["loss"] == pytest.approx(torch.nn.functional.cross_entropy(logits, labels).item(), rel=1e-4)
    assert found["accuracy"] == pytest.approx((logits.argmax(-1) == labels).double().mean().item())
    said = list(predict_texts(home / "classifier", [rows["text"][0]]))
    assert said[0]["prediction"] == f"{logits[0].argmax().item()}"


def test_a_template_around_strings_is_told(home: Path, tmp_path: Path) -> None:
    (tmp_path / "data.jsonl").write_text(2 * '{"prompt": "is the film", "completion": "good"}\n')
    done = run("evaluate", home / "talker", "--data", tmp_path / "data.jsonl")
    assert re.search(r"prompts .*chat template.* column text\b", " ".join(done.output.split()))


def test_a_chat_is_continued_as_by_peft(home: Path) -> None:
    (said,) = predict_texts(home / "talker", ["is the film good ?"], {"max_new_tokens": 4})
    model = AutoPeftModelForCausalLM.from_pretrained(home / "talker").eval()
    tokenizer = AutoTokenizer.from_pretrained(home / "decoder")
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": "is the film good ?"}], tokenize=False, add_generation_prompt=True
    )
    inputs = tokenizer(text, return_tensors="pt", add_special_tokens=False)
    tokens = model.generate(**inputs, max_new_tokens=4, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    assert said["completion"] == tokenizer.decode(tokens, skip_special_tokens=True)


@pytest.mark.refused
def test_what_is_not_known_is_told(home: Path, tmp_path: Path) -> None:
    content = json.loads((home / "talker" / "adapter_config.json").read_text())
    for name, fields, message in (
        ("task", {"task_type": None}, r"task_type .*adapter_config\.json"),
        ("base", {"base_model_name_or_path": None}, r"not name .*base model"),
        ("other", {"task_type": "TOKEN_CLS"}, r"TOKEN_CLS adapter\..*: CAUSAL_LM, SEQ_CLS\b"),
    ):
        (tmp_path / name).mkdir()
        for file in (home / "talker").iterdir():
            (tmp_path / name / file.name).write_bytes(file.read_bytes())
        (tmp_path / name / "adapter_config.json").write_text(json.dumps(content | fields))
        assert re.search(message, told("predict", tmp_path / name, "--text", "good"))
    for options in (("--keep", "0.8"), ("--size", "r1", "--by", "loss")):
        refused = told("export", home / "classifier", *options, "--output", tmp_path / "out")
        assert re.search(r"classifier .*by loss .*--data\b.*--by energy", refused)
    with pytest.raises(ValueError, match=rf"{tmp_path.name} .*readable adapter"):
        evaluate(tmp_path, str(home / "reviews.csv"))


@pytest.mark.refused
def test_several_labels_of_an_example_are_refused(home: Path, tmp_path: Path) -> None:
    options = {"num_labels": 3, "problem_type": "multi_label_classification"}
    model = AutoModelForSequenceClassification.from_pretrained(save_encoder(tmp_path / "base"), **options)
    model.save_pretrained(tmp_path / "model")
    tokenizer().save_pretrained(tmp_path / "model")
    base = AutoModelForSequenceClassification.from_pretrained(tmp_path / "model")
    config = LoraConfig(target_modules="all-linear", task_type="SEQ_CLS")
    get_peft_model(base, config).save_pretrained(str(tmp_path / "adapter"))
    said = told("predict", tmp_path / "adapter", "--text", "a film")
    assert re.search("several labels .*sigmoid", said)
