"""Scores of the commonsense sets, beside those of EleutherAI's lm-evaluation-harness."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("lm_eval")

# Its name of a set → ours.
SETS = {
    "piqa": "piqa",
    "social_iqa": "social-iqa",
    "hellaswag": "hellaswag",
    "winogrande": "winogrande",
    "arc_easy": "arc-easy",
    "openbookqa": "openbookqa",
}
SCRIPT = """
import json, sys
from lm_eval import simple_evaluate
from lm_eval.models.huggingface import HFLM
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainingArguments
from lrlora.train.tasks import ChoiceByLikelihood
from lrlora_lab.commonsense import load_commonsense

sets, name = json.loads(sys.argv[1]), "meta-llama/Llama-3.2-1B"
model, tokenizer = AutoModelForCausalLM.from_pretrained(name, dtype="float32"), AutoTokenizer.from_pretrained(name)
theirs = simple_evaluate(HFLM(model, tokenizer=tokenizer, batch_size=8), tasks=list(sets), log_samples=True)
arguments = TrainingArguments("out", use_cpu=True, report_to="none", per_device_eval_batch_size=4)
kind, found = ChoiceByLikelihood(), {}
trainer = kind.trainer(tokenizer, model=model, args=arguments)
for task, ours in sets.items():
    data = load_commonsense(ours)["test"]
    result = trainer.predict(kind.encode(data, tokenizer, None))
    rows = zip(result.predictions[0].tolist(), data["choices"])
    samples = sorted(theirs["samples"][task], key=lambda sample: sample["doc_id"])
    found[task] = {
        "ours": [row[: len(choices)] for row, choices in rows],
        "theirs": [[float(answer[0]) for answer in sample["filtered_resps"]] for sample in samples],
        "accuracy": [result.metrics["test_accuracy"], theirs["results"][task]["acc,none"]],
        "normalised": [result.metrics["test_accuracy_norm"], theirs["results"][task].get("acc_norm,none")],
    }
with open(sys.argv[2], "w") as file:
    json.dump(found, file)
"""


def test_likelihoods_and_accuracies_are_those_of_the_harness(hub: dict[str, str], tmp_path: Path) -> None:
    environment = {**os.environ, **hub, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", SCRIPT, json.dumps(SETS), "found.json"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment)
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "found.json").read_text())
    assert set(found) == set(SETS)
    for task, each in found.items():
        assert len(each["ours"]) == len(each["theirs"]) == 32
        for ours, theirs in zip(each["ours"], each["theirs"], strict=True):
            assert ours == pytest.approx(theirs, abs=1e-4), task
        assert each["accuracy"][0] == pytest.approx(each["accuracy"][1]), task
        if each["normalised"][1] is not None:
            assert each["normalised"][0] == pytest.approx(each["normalised"][1]), task
    assert len({each["accuracy"][0] for each in found.values()}) > 1  # a constant would agree with anything
