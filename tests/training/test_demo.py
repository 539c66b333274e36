"""The demo on real weights and data, shortened."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from lrlora import rank_report
from lrlora.training import demo
from lrlora.training.demo import DemoSettings, load_reports, run_demo
from lrlora.training.inputs import MINILM, fetch
from lrlora.training.sentiment import load_movie_reviews

pytestmark = pytest.mark.real


def test_films_are_held_out_and_no_snippet_is_in_both() -> None:
    data = load_movie_reviews()
    train, test = data["train"].to_pandas(), data["test"].to_pandas()
    assert len(train) + len(test) > 12_500
    assert set(train["movie"]).isdisjoint(test["movie"])
    assert set(train["text"]).isdisjoint(test["text"])
    assert set(train["label"]) == set(test["label"]) == {0, 1}
    assert 0.4 < test["label"].mean() < 0.7


def test_demo_is_interrupted_resumed_and_read_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings, output = DemoSettings(steps=3, r=4, batch_size=8), tmp_path / "demo"
    small = load_movie_reviews()
    small["test"] = small["test"].select(range(64))
    monkeypatch.setattr(demo, "load_movie_reviews", lambda: small)

    def interrupt(**fields: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setitem(demo.METHODS, "lora", interrupt)
        with pytest.raises(KeyboardInterrupt):
            run_demo(output, settings)
    assert not output.exists()
    first = (tmp_path / "demo.partial" / "lr-lora" / "result.json").read_text()

    results = run_demo(output, settings)
    assert (output / "lr-lora" / "result.json").read_text() == first
    assert not (tmp_path / "demo.partial").exists()
    assert [entry["method"] for entry in json.loads((output / "results.json").read_text())] == ["lr-lora", "lora"]
    assert results["lr-lora"].trainable_parameters == results["lora"].trainable_parameters + 37 * 100

    base = AutoModelForSequenceClassification.from_pretrained(fetch(MINILM), num_labels=2)
    model = PeftModel.from_pretrained(base, output / "lr-lora").eval()
    assert rank_report(model).rows == load_reports(output)["lr-lora"].rows
    tokens = AutoTokenizer.from_pretrained(fetch(MINILM))(["A triumph.", "A bore."], return_tensors="pt", padding=True)
    assert torch.isfinite(model(**tokens).logits).all()

    with pytest.raises(FileExistsError, match="overwrite"):
        run_demo(output, settings)
    assert (output / "lr-lora" / "adapter_model.safetensors").exists()
