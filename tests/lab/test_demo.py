"""The demo on real weights and data, shortened."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from lrlora import rank_report
from lrlora.train.packages import MINILM, fetch
from lrlora.train.run import rank_report_of
from lrlora.views.runs import load_runs
from lrlora_lab import demo
from lrlora_lab.demo import RESULTS_FILE, DemoSettings, run_demo

pytestmark = pytest.mark.real


def test_demo_is_interrupted_resumed_and_read_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings, output = DemoSettings(steps=2), tmp_path / "demo"
    monkeypatch.setattr(demo, "TEST_EXAMPLES", 64)

    def interrupt(*given: object, **options: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(demo, "train_capacity", interrupt)
        with pytest.raises(KeyboardInterrupt):
            run_demo(output, settings)
    assert not output.exists()
    reviews = json.loads((tmp_path / "demo.partial" / RESULTS_FILE).read_text())
    assert [result["folder"] for result in reviews] == ["lr-lora", "lora", "lora-r1"]

    with monkeypatch.context() as patch:
        patch.setattr(demo, "train", interrupt)  # what is done is not done again
        results = run_demo(output, settings)
    assert not (tmp_path / "demo.partial").exists()
    assert json.loads((output / RESULTS_FILE).read_text()) == [asdict(result) for result in results]
    assert json.loads((output / RESULTS_FILE).read_text())[:3] == reviews
    ours, lora, small, *labels = results
    assert ours.trainable_parameters == lora.trainable_parameters + 37 * 16
    assert small.trainable_parameters < lora.trainable_parameters / 4
    assert [result.method for result in labels] == [
        "LoRA, r=4",
        "LoRA, r=16",
        "expansion, r=4, num_terms=8",
    ]
    assert [run.name for run in load_runs([output])] == ["demo: lora", "demo: lora-r1", "demo: lr-lora"]

    base = AutoModelForSequenceClassification.from_pretrained(fetch(MINILM), num_labels=2)
    model = PeftModel.from_pretrained(base, output / "lr-lora").eval()
    stored = rank_report_of(output / "lr-lora")
    assert stored is not None
    assert rank_report(model).rows == stored.rows
    tokens = AutoTokenizer.from_pretrained(fetch(MINILM))(["A triumph.", "A bore."], return_tensors="pt", padding=True)
    assert torch.isfinite(model(**tokens).logits).all()

    with pytest.raises(FileExistsError, match="overwrite"):
        run_demo(output, settings)
    assert (output / "lr-lora" / "adapter_model.safetensors").exists()


@pytest.mark.slow
def test_of_two_demos_at_once_one_is_told(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "lrlora", "demo", "--steps", "2", "--output", "out"]
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    processes = [subprocess.Popen(command, cwd=tmp_path, text=True, **pipes) for _ in range(2)]
    said = [process.communicate()[0] for process in processes]
    assert sorted(process.returncode for process in processes) == [0, 1], said
    told = next(text for process, text in zip(processes, said, strict=True) if process.returncode)
    assert "is writing to out" in " ".join(told.split())
    assert len(json.loads((tmp_path / "out" / RESULTS_FILE).read_text())) == 6
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert not [path for path in tmp_path.rglob("*") if path.suffix in (".partial", ".lock")]
