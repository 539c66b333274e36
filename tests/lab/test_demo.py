"""The demo on real weights and data, shortened."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from lrlora import rank_report
from lrlora.lab import demo
from lrlora.lab.demo import DemoSettings, load_reports, run_demo
from lrlora.lab.inputs import MINILM, fetch
from lrlora.lab.tasks import MOVIE_REVIEW_TASK

pytestmark = pytest.mark.real


def test_demo_is_interrupted_resumed_and_read_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings, output = DemoSettings(steps=3, r=4, batch_size=8), tmp_path / "demo"
    small = MOVIE_REVIEW_TASK.load()
    small["test"] = small["test"].select(range(64))
    monkeypatch.setattr(demo, "MOVIE_REVIEW_TASK", replace(MOVIE_REVIEW_TASK, load=lambda: small))

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
    assert results["lr-lora"].trainable_parameters == results["lora"].trainable_parameters + 37 * 16

    base = AutoModelForSequenceClassification.from_pretrained(fetch(MINILM), num_labels=2)
    model = PeftModel.from_pretrained(base, output / "lr-lora").eval()
    assert rank_report(model).rows == load_reports(output)["lr-lora"].rows
    tokens = AutoTokenizer.from_pretrained(fetch(MINILM))(["A triumph.", "A bore."], return_tensors="pt", padding=True)
    assert torch.isfinite(model(**tokens).logits).all()

    with pytest.raises(FileExistsError, match="overwrite"):
        run_demo(output, settings)
    assert (output / "lr-lora" / "adapter_model.safetensors").exists()
