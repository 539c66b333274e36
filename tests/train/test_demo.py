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
from lrlora.train.demo import FOUND, LEARNED, RECIPE, RESULTS_FILE, SHRUNK, run_demo
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
        if Path(config.output).name == LEARNED:
            raise KeyboardInterrupt
        return train(config, **options)

    with monkeypatch.context() as patch:
        patch.setattr(demo, "train", interrupt)
        with pytest.raises(KeyboardInterrupt):
            run_demo(output, steps=24)
        assert not output.exists()
    before = json.loads((tmp_path / "demo.partial" / RESULTS_FILE).read_text())
    assert [result["folder"] for result in before] == [RECIPE, FOUND, SHRUNK]

    trained = []
    with monkeypatch.context() as patch:
        patch.setattr(demo, "train", lambda config, **options: (trained.append(config), train(config, **options))[1])
        results = run_demo(output, steps=24)
    assert [Path(config.output).name for config in trained] == [LEARNED]  # what is done is not done again
    assert not (tmp_path / "demo.partial").exists()
    assert json.loads((output / RESULTS_FILE).read_text()) == [asdict(result) for result in results]
    assert [asdict(result) for result in results][: len(before)] == before
    by_folder = {result.folder: result for result in results}
    assert by_folder[RECIPE].learning_rate == 2e-4
    assert by_folder[FOUND].learning_rate > 2e-4
    assert by_folder[FOUND].loss < by_folder[RECIPE].loss
    assert by_folder[SHRUNK].parameters < by_folder[FOUND].parameters
    assert by_folder[LEARNED].learning_rate == by_folder[FOUND].learning_rate
    assert by_folder[LEARNED].loss < by_folder[RECIPE].loss
    rates = {run.name: run.facts.get("learning rate") for run in load_runs([output])}
    assert rates[f"demo: {RECIPE}"] == "0.0002"
    assert rates[f"demo: {FOUND}"] == f"{by_folder[FOUND].learning_rate:g}, found"

    base = AutoModelForSequenceClassification.from_pretrained(fetch(MINILM), num_labels=8)
    model = PeftModel.from_pretrained(base, output / LEARNED).eval()
    stored = rank_report_of(output / LEARNED)
    assert stored is not None
    assert rank_report(model).rows == stored.rows
    tokens = AutoTokenizer.from_pretrained(fetch(MINILM))(["Shares rose.", "Rain."], return_tensors="pt", padding=True)
    assert torch.isfinite(model(**tokens).logits).all()

    with pytest.raises(FileExistsError, match="overwrite"):
        run_demo(output, steps=24)
    assert (output / LEARNED / "adapter_model.safetensors").exists()
