"""The demo on real weights and data, shortened."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from lrlora import rank_report
from lrlora.train import demo
from lrlora.train.demo import RESULTS_FILE, run_demo
from lrlora.train.embedded import MINILM, fetch
from lrlora.train.run import rank_report_of
from lrlora.train.settings import TrainConfig
from lrlora.views.runs import load_runs

pytestmark = pytest.mark.real


@pytest.mark.integration
def test_demo_is_interrupted_resumed_and_read_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    output = tmp_path / "demo"
    monkeypatch.setattr(demo, "TEST_EXAMPLES", 64)
    monkeypatch.setattr(demo, "VALIDATION_EXAMPLES", 192)
    train = demo.train

    def interrupt(config: TrainConfig, **options: Any) -> Any:
        if config.data == "embedded:movie-reviews":
            raise KeyboardInterrupt
        return train(config, **options)

    with monkeypatch.context() as patch:
        patch.setattr(demo, "train", interrupt)
        with pytest.raises(KeyboardInterrupt):
            run_demo(output, steps=24)
        assert not output.exists()
    topics = json.loads((tmp_path / "demo.partial" / RESULTS_FILE).read_text())
    assert [result["folder"] for result in topics][:2] == ["topics-lora", "topics-small"]

    trained = []
    with monkeypatch.context() as patch:
        patch.setattr(demo, "train", lambda config, **options: (trained.append(config), train(config, **options))[1])
        results = run_demo(output, steps=24)
    assert [config.method for config in trained] == ["lora", "lr-lora"]  # what is done is not done again
    assert not (tmp_path / "demo.partial").exists()
    assert json.loads((output / RESULTS_FILE).read_text()) == [asdict(result) for result in results]
    assert [asdict(result) for result in results][: len(topics)] == topics
    by_folder = {result.folder: result for result in results}
    assert by_folder["topics-small"].parameters < by_folder["topics-lora"].parameters
    assert by_folder["topics-lora-same-size"].parameters < by_folder["topics-lora"].parameters
    assert by_folder["reviews-lr-lora"].parameters == by_folder["reviews-lora"].parameters + 37 * 16
    assert {"demo: topics-lora", "demo: reviews-lr-lora"} <= {run.name for run in load_runs([output])}

    base = AutoModelForSequenceClassification.from_pretrained(fetch(MINILM), num_labels=2)
    model = PeftModel.from_pretrained(base, output / "reviews-lr-lora").eval()
    stored = rank_report_of(output / "reviews-lr-lora")
    assert stored is not None
    assert rank_report(model).rows == stored.rows
    tokens = AutoTokenizer.from_pretrained(fetch(MINILM))(["A triumph.", "A bore."], return_tensors="pt", padding=True)
    assert torch.isfinite(model(**tokens).logits).all()

    with pytest.raises(FileExistsError, match="overwrite"):
        run_demo(output, steps=24)
    assert (output / "reviews-lr-lora" / "adapter_model.safetensors").exists()
