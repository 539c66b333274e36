"""Several processes on a CPU: DDP, FSDP2, and `lrlora train`, against one process."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from peft import PeftModel
from safetensors.torch import load_file
from transformers import BertConfig, BertModel

from lrlora import RankReport, rank_report
from lrlora.shrunk import read_shrunk
from lrlora.train.run import train as train_run
from lrlora.train.settings import TrainConfig

from ..conftest import TinyModel
from ..learned.test_shrinking import lora, trainer_of
from ..processes import LRLORA, Process
from ..train.small import SIZES, losses, reviews, tokenizer
from .learn_ranks import learn
from .shrink_adapter import shrunk
from .train_sharded import build, train

ROOT = Path(__file__).parents[2]


ENVIRONMENT = {
    **os.environ,
    "OMP_NUM_THREADS": "1",
    "PYTHONUNBUFFERED": "1",
    "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path[1:]]),
    "DS_ACCELERATOR": "cpu",
}


def torchrun(processes: int, *command: object, fails: bool = False) -> str:
    """Processes that find each other as those of torchrun do; what they say, or, if they are to fail, why they do."""
    if command[:2] == ("-m", "lrlora"):
        code, arguments = LRLORA, command[2:]
    else:
        code, arguments = (
            "import runpy, sys; del sys.argv[0]; runpy.run_path(sys.argv[0], run_name='__main__')",
            command,
        )
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {**ENVIRONMENT, "WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    started = [
        Process(code, *arguments, cwd=ROOT, env={**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)})
        for rank in range(processes)
    ]
    said = "".join(process.communicate(timeout=600) for process in started)
    assert any(process.returncode for process in started) == fails, said[-4000:]
    return " ".join(said.split()) if fails else said


def launch(*command: object, fails: bool = False) -> str:
    """The same of a launcher of its own."""
    result = subprocess.run(
        [sys.executable, "-m", *map(str, command)],
        cwd=ROOT,
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert (result.returncode != 0) == fails, result.stderr[-4000:]
    return " ".join(result.stderr.split()) if fails else result.stdout


def need_deepspeed() -> None:
    if find_spec("deepspeed") is None:
        pytest.skip("needs DeepSpeed: DS_BUILD_OPS=0 pip install deepspeed")


@pytest.mark.parametrize("processes", [2, pytest.param(4, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    ("family", "way"),
    [
        *[("llama", "ddp"), ("bert", "fsdp")],
        *[
            pytest.param(*case, marks=pytest.mark.integration)
            for case in (("llama", "fsdp"), ("llama", "fsdp-shared"), ("llama", "fsdp-expansion"), ("bert", "ddp"))
        ],
        pytest.param("bert", "ddp-expansion", marks=pytest.mark.slow),
        # DeepSpeed is no part of [dev]: transformers would import it in every test.
        *[pytest.param("llama", way, marks=pytest.mark.slow) for way in ("zero3", "zero3-expansion")],
        pytest.param("bert", "zero3", marks=pytest.mark.slow),
        *[pytest.param("minilm", way, marks=[pytest.mark.slow, pytest.mark.real]) for way in ("ddp", "fsdp")],
    ],
)
def test_several_processes_do_what_one_does(family: str, way: str, processes: int, tmp_path: Path) -> None:
    if way.startswith("zero3"):
        need_deepspeed()
    torchrun(processes, ROOT / "tests" / "distributed" / "train_sharded.py", family, way, tmp_path)
    alone, losses = train(family, way)
    assert json.loads((tmp_path / "losses.json").read_text()) == pytest.approx(losses, abs=1e-5)
    # The adapter that was saved there loads here, and is the one that one process learns.
    tiny = TinyModel("bert" if family == "minilm" else family)
    loaded = PeftModel.from_pretrained(build(family), tmp_path).eval()
    torch.testing.assert_close(tiny.logits(loaded), tiny.logits(alone.eval()), rtol=0, atol=1e-4)
    # Its ranks were measured while it was sharded.
    measured = {row.module: row.stable_rank for row in RankReport.from_json(tmp_path / "ranks.json").rows}
    assert {row.module: row.stable_rank for row in rank_report(loaded).rows} == pytest.approx(measured, rel=1e-3)
    assert max(row.relative_norm or 0 for row in RankReport.from_json(tmp_path / "ranks.json").rows) > 0


@pytest.mark.parametrize(
    "way",
    [
        *("ddp", "fsdp"),
        *(pytest.param(way, marks=pytest.mark.integration) for way in ("compile", "fsdp-bf16")),
        *(pytest.param(way, marks=pytest.mark.slow) for way in ("zero2", "zero3")),
    ],
)
def test_ranks_are_learned_by_several_processes_as_by_one(way: str, tmp_path: Path) -> None:
    if way.startswith("zero"):
        need_deepspeed()
    model, alone = learn("alone")
    if way == "compile":
        compiled, found = learn(way)
        compiled.save_pretrained(tmp_path)
    else:
        torchrun(2, ROOT / "tests" / "distributed" / "learn_ranks.py", way, tmp_path)
        found = json.loads((tmp_path / "found.json").read_text())
    half = way.endswith("bf16")
    for module, rises in alone["rises"].items():
        assert found["rises"][module] == pytest.approx(rises, rel=0.1 if half else 1e-4, abs=5e-2 * rises[0] * half)
    assert found["ranks"] == alone["ranks"]
    assert found["losses"] == pytest.approx(alone["losses"], rel=1e-2 if half else 1e-5)
    assert found["summary"] == alone["summary"]
    # PEFT alone loads what was saved there, as small as that of one process.
    tiny = TinyModel("llama")
    loaded = PeftModel.from_pretrained(tiny.build(), tmp_path).eval()
    torch.testing.assert_close(tiny.logits(loaded), tiny.logits(model.eval()), rtol=0, atol=0.2 if half else 1e-4)
    stored = load_file(tmp_path / "adapter_model.safetensors")
    assert sum(len(value) for name, value in stored.items() if "lora_A" in name) == sum(alone["ranks"].values())


@pytest.mark.parametrize(
    "way",
    [*("ddp", "fsdp"), pytest.param("zero2", marks=pytest.mark.slow)],
)
def test_several_processes_shrink_an_adapter_as_one_does(way: str, tmp_path: Path) -> None:
    if way == "zero2":
        need_deepspeed()
    tiny = TinyModel("llama")
    trainer = trainer_of(tmp_path, lora(tiny.build()))
    trainer.train()
    trainer.save_model(str(tmp_path / "adapter"))
    shrunk("alone", tmp_path / "adapter", tmp_path / "one")
    torchrun(2, ROOT / "tests" / "distributed" / "shrink_adapter.py", way, tmp_path / "adapter", tmp_path / "two")
    one, two = (read_shrunk(tmp_path / name / "out" / "whole") for name in ("one", "two"))
    assert one is not None
    assert two is not None
    assert (two.ranks, two.units) == (one.ranks, one.units)
    assert two.parameters < two.whole
    assert two.kept == pytest.approx(one.kept, abs=1e-4)
    for folder, rel in (("small", 1e-4), ("out/whole", 0)):
        mine, theirs = (load_file(tmp_path / name / folder / "adapter_model.safetensors") for name in ("one", "two"))
        torch.testing.assert_close(theirs, mine, rtol=rel, atol=rel)
    loaded = PeftModel.from_pretrained(tiny.build(), tmp_path / "two" / "small")
    assert sum(p.numel() for n, p in loaded.named_parameters() if "lora_" in n) == two.parameters


@pytest.mark.integration
def test_mixed_precision_leaves_phi_in_float32(tmp_path: Path) -> None:
    torchrun(2, ROOT / "tests" / "distributed" / "train_sharded.py", "llama", "fsdp-bf16", tmp_path)
    _, losses = train("llama", "fsdp-bf16")
    found = json.loads((tmp_path / "losses.json").read_text())
    assert found == pytest.approx(losses, abs=5e-3)  # eight bits of losses near 4.6
    assert found != pytest.approx(losses, abs=1e-5)


REFUSED = """
import torch
from peft import get_peft_model
from lrlora import LrLoraConfig

def step():
    try:
        model(torch.ones(1, 4)).sum().backward()
        torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.1).step()
        print("A step")
    except (RuntimeError, NotImplementedError) as error:
        print(error)

torch.distributed.init_process_group("gloo")
model = get_peft_model(torch.nn.Sequential(torch.nn.Linear(4, 4)), LrLoraConfig(target_modules=["0"]))
for name, parameter in model.named_parameters():
    if "phi" in name:
        parameter.data = parameter.data.bfloat16()
step()
model.train()
step()
torch.distributed.destroy_process_group()
"""


def test_a_phi_that_was_cast_is_refused_among_processes(tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(REFUSED)
    cast, restored = torchrun(1, tmp_path / "script.py").strip().splitlines()[-2:]
    assert re.search(r"\bTransfer .*float32, got torch\.bfloat16", cast)
    assert restored == "A step"


@pytest.fixture
def settings(tmp_path: Path) -> dict[str, Any]:
    """Of `lrlora train`, with a model that draws nothing at random: 18 steps, of 8 examples over all processes."""
    torch.manual_seed(0)
    dropouts = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    config = BertConfig(**SIZES, **dropouts, vocab_size=64, max_position_embeddings=48)
    BertModel(config).save_pretrained(tmp_path / "m")
    tokenizer().save_pretrained(tmp_path / "m")
    reviews().rename(columns={"review": "text", "verdict": "label"}).to_csv(tmp_path / "reviews.csv", index=False)
    training = {"num_train_epochs": 1, "learning_rate": 1e-3, "per_device_train_batch_size": 8}
    training |= {"logging_steps": 1, "eval_steps": 3, "save_steps": 3}
    # At the start φ's gradients are hardly more than rounding, of which Adam's usual 1e-8 makes whole steps.
    training |= {"adam_epsilon": 1e-5}
    paths = {"model": str(tmp_path / "m"), "data": str(tmp_path / "reviews.csv"), "output": str(tmp_path / "one")}
    return {**paths, "task": "classify", "method": "lr-lora", "training": training}


def test_lrlora_train_in_two_processes(settings: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(settings))
    command = ("-m", "lrlora", "train", tmp_path / "run.yaml", "--no-measure")
    torchrun(1, *command)
    said = torchrun(2, *command, "--batch-size", 4, "--output", tmp_path / "two")
    for once in ("Plan:", "Step 18:", "Results saved to"):
        assert said.count(once) == 1
    assert "18 steps of 8 examples" in said
    one, two = losses(tmp_path / "one"), losses(tmp_path / "two")
    assert len(one) == 18
    assert two == pytest.approx(one, abs=1e-5)
    assert (tmp_path / "two" / "metrics.json").exists()
    assert (tmp_path / "two" / "ranks.json").exists()
    assert list((tmp_path / "two").glob("checkpoint-*")) == []


LEARNED = {"method": "lora", "size": "r1"}


def assert_equal_runs(one: Path, other: Path) -> None:
    """Losses, ranks and adapters."""
    assert losses(other) == pytest.approx(losses(one), abs=1e-5)
    mine, theirs = (RankReport.from_json(folder / "ranks.json").rows for folder in (one, other))
    assert [(row.module, row.r) for row in theirs] == [(row.module, row.r) for row in mine]
    assert [row.stable_rank for row in theirs] == pytest.approx([row.stable_rank for row in mine], rel=1e-3)
    weights, others = (load_file(folder / "adapter_model.safetensors") for folder in (one, other))
    torch.testing.assert_close(others, weights, rtol=0, atol=1e-4)


def test_lrlora_train_learns_ranks_in_two_processes(settings: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(settings | LEARNED))
    said = torchrun(2, "-m", "lrlora", "train", tmp_path / "run.yaml", "--batch-size", 4, "--output", tmp_path / "two")
    assert said.count("Ranks fitted at step 5:") == 1
    assert_equal_runs(train_run(TrainConfig.from_dict(settings | LEARNED)).output, tmp_path / "two")


@pytest.mark.slow
@pytest.mark.parametrize("step", [4, 9])  # among the steps that give moments, and after the cut
def test_fitted_ranks_resume_with_another_number_of_processes(
    step: int, settings: dict[str, Any], tmp_path: Path
) -> None:
    def stop(line: str) -> None:
        if line.startswith(f"Step {step}:"):
            raise KeyboardInterrupt

    settings |= LEARNED
    settings["training"] |= {"save_steps": 1, "eval_steps": 1}
    whole = train_run(TrainConfig.from_dict(settings))
    with pytest.raises(KeyboardInterrupt):
        train_run(TrainConfig.from_dict(settings | {"output": str(tmp_path / "cut")}), announce=stop)
    torchrun(2, "-m", "lrlora", "train", "--resume", tmp_path / "cut")
    assert_equal_runs(whole.output, tmp_path / "cut")


@pytest.mark.slow
def test_a_run_resumes_with_another_number_of_processes(settings: dict[str, Any], tmp_path: Path) -> None:
    def stop(line: str) -> None:
        if line.startswith("Step 9:"):
            raise KeyboardInterrupt

    whole = train_run(TrainConfig.from_dict(settings))
    with pytest.raises(KeyboardInterrupt):
        train_run(TrainConfig.from_dict(settings | {"output": str(tmp_path / "cut")}), announce=stop)
    refused = torchrun(3, "-m", "lrlora", "train", "--resume", tmp_path / "cut", fails=True)
    assert re.search(r"\b8 examples .*\b3 processes .*gradient_accumulation_steps=", refused)
    said = torchrun(2, "-m", "lrlora", "train", "--resume", tmp_path / "cut")
    assert "18 steps of 8 examples" in said
    assert said.count("Resuming from step 6") == 1
    assert losses(tmp_path / "cut") == pytest.approx(losses(whole.output), abs=1e-5)


@pytest.mark.integration
def test_lrlora_train_in_processes_of_torchrun(settings: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(settings))
    command = ("-m", "lrlora", "train", tmp_path / "run.yaml", "--batch-size", 4, "--output", tmp_path / "two")
    said = launch("torch.distributed.run", "--standalone", "--nproc-per-node", 2, *command)
    assert said.count("Step 18:") == 1
    assert losses(tmp_path / "two") == pytest.approx(
        losses(train_run(TrainConfig.from_dict(settings)).output), abs=1e-5
    )


@pytest.mark.refused
@pytest.mark.parametrize("name", ["fsdp", "deepspeed"])
def test_a_model_is_not_sharded_by_the_command(
    name: str, settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ValueError, match=rf"not shard .*{name} .*cookbook"):
        train_run(TrainConfig.from_dict(settings | {"training": {name: "full_shard"}}))
    monkeypatch.setenv(f"ACCELERATE_USE_{name.upper()}", "true")
    with pytest.raises(ValueError, match=rf"not shard .*{name} .*cookbook"):
        train_run(TrainConfig.from_dict(settings))
    assert not Path(settings["output"]).exists()
