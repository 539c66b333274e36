"""The suite of data sets of the hub, by the commands that a user types; the sets are made from examples."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from transformers import LlamaConfig

import lrlora_lab
from lrlora_lab.cli import app
from lrlora_lab.cost import estimates
from lrlora_lab.hub_data import COMMONSENSE
from lrlora_lab.inputs import located
from lrlora_lab.jobs import Comparison, read_records
from lrlora_lab.methods import ABLATIONS
from lrlora_lab.suite import load_suite

from ..cli import run
from ..train.small import save_decoder
from .test_hub_data import load_dataset

slow = pytest.mark.slow


def lrlora(*arguments: object) -> str:
    done = run(*arguments, app=app)
    assert done.exit_code == 0, done.output
    assert "failed" not in done.output
    assert "Not done" not in done.output
    return " ".join(done.output.split())


@pytest.mark.integration
def test_the_suite_of_llama_tells_what_it_needs_and_is_tested_on_all_eight_sets(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LRLORA_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("lrlora_lab.hub_data.load_dataset", load_dataset)
    for name in (*COMMONSENSE, "all"):  # processes of jobs find them there
        located(f"commonsense:{name}")
    asked = ("compare", "llama-3-8b", "--model", save_decoder(tmp_path / "model"), "--output", tmp_path / "out")
    for file in (tmp_path / "model" / "config.json", tmp_path / "model" / "tokenizer_config.json"):
        file.write_text(file.read_text().replace(": 48", ": 256"))  # the suite's length
    told = lrlora(*asked, "--dry-run")
    assert "21 jobs" in told
    assert "commonsense │ LoRA" in told
    assert not (tmp_path / "out").exists()
    # In a process of its own: jobs are forked from a server with the environment in which it was started.
    command = [sys.executable, "-m", "lrlora_lab", *map(str, asked), "--steps", "2", "--seeds", "1", "--rates", "1e-3"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    records = {record["method"]: record for record in read_records(tmp_path / "out").values() if record["seed"] == 1}
    assert set(records) == {"lora", "learned", "lr-lora"}
    for record in records.values():
        by_set = [
            record["test"][f"accuracy of {name}"] for name in load_suite("llama-3-8b").tasks["commonsense"].test_data
        ]
        assert len(by_set) == 8
        assert record["test"]["accuracy"] == pytest.approx(sum(by_set) / 8)


def test_the_dry_run_of_a_suite_for_a_gpu_estimates_hours_and_memory(tmp_path: Path) -> None:
    asked = ("compare", "users-gpu", "--model", save_decoder(tmp_path / "model"), "--rates", "2e-4", "--dry-run")
    found = []
    for steps in (10_000_000, 20_000_000):
        told = lrlora(*asked, "--steps", steps)
        found.append(re.search(r"Estimate for capybara: (\S+) hours on one H100 .*, (\S+) GiB of its memory", told))
    (first, memory), (second, again) = (match.groups() for match in found if match)
    assert float(second) == pytest.approx(2 * float(first), rel=0.1)  # of two digits
    assert memory == again


@pytest.mark.parametrize(("repeats", "flops"), [(False, 4), (True, 6)])
def test_an_estimate_is_the_formula_s(tmp_path: Path, repeats: bool, flops: int) -> None:
    sizes = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2, "num_attention_heads": 4}
    LlamaConfig(**sizes, vocab_size=1_000, dtype="bfloat16").save_pretrained(tmp_path)
    training = {"gradient_checkpointing": repeats}
    task = {"data": "chats", "task": "causal-lm", "steps": 10**9, "batch_size": 64, "max_length": 1024}
    suite = {"model": str(tmp_path), "tasks": {"chats": task}, "methods": ["lora", "learned"], "training": training}
    (tmp_path / "suite.yaml").write_text(yaml.safe_dump(suite))
    (line,) = estimates(Comparison(str(tmp_path / "suite.yaml")), [("chats", "lora")] * 2)
    linear = 2 * (4 * 256 * 256 + 3 * 256 * 512)
    weights, tokens, layer = linear + 2 * 256 * 1_000 + 5 * 256, 64 * 1024, 16 * 256 + 4 * 512
    hours = 2 * flops * weights * tokens * 10**9 / (0.3 * 989e12) / 3600
    adapter = 16 * 2 * (4 * 512 + 3 * 768)  # wide
    activations = 2 * 256 + layer if repeats else 2 * layer
    memory = 2 * (weights + tokens * activations) + 16 * adapter + 12 * tokens * 1_000
    assert f": {hours:.2g} hours" in line
    assert f" {memory / 2**30:.2g} GiB" in line


@pytest.mark.integration
def test_the_suite_for_a_gpu_trains_a_small_model(tmp_path: Path) -> None:
    suite = yaml.safe_load((Path(lrlora_lab.__file__).parent / "suites" / "users-gpu.yaml").read_text())
    rows = [{"messages": [{"role": "user", "content": "a film ?"}, {"role": "assistant", "content": "good"}]}] * 40
    for name in ("train", "test"):
        (tmp_path / "chats").mkdir(exist_ok=True)
        (tmp_path / "chats" / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    suite["tasks"]["capybara"] |= {"data": str(tmp_path / "chats"), "max_length": 16}
    (tmp_path / "suite.yaml").write_text(yaml.safe_dump(suite))
    asked = ("compare", tmp_path / "suite.yaml", "--model", save_decoder(tmp_path / "model"))
    output = tmp_path / "out"
    asked += ("--rates", "2e-4", "--steps", 12, "--seeds", 1, "--rank", 2, "--methods", "lora,learned")
    lrlora(*asked, "--output", output)
    sizes = {record["method"]: record["trainable"] for record in read_records(output).values()}
    assert sizes["lora"] >= sizes["learned"] > 0


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name in ("sharing", "targets") else slow) for name in ABLATIONS]
)
def test_an_ablation_is_a_list_of_methods_that_can_be_laid_out(tmp_path: Path, name: str) -> None:
    told = run(
        *("compare", "llama-3-8b", "--model", save_decoder(tmp_path / "model"), "--dry-run", "--ablation", name),
        app=app,
    )
    assert told.exit_code == 0, told.output
    rows = [line for line in told.output.splitlines() if line.startswith("│ commonsense")]
    assert len(rows) == len(set(rows)) >= 3
    assert all(int(row.split("│")[3]) > 0 for row in rows)  # jobs
