"""Several processes on a CPU: DDP, FSDP2, and `lrlora train`, against one process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from peft import PeftModel
from transformers import BertConfig, BertModel

from lrlora import RankReport, rank_report
from lrlora.training.config import TrainConfig
from lrlora.training.train import train as train_run

from ..conftest import TinyModel
from ..training.small import SIZES, reviews, tokenizer
from .train_sharded import build, train

ROOT = Path(__file__).parents[2]


def torchrun(processes: int, *command: object, fails: bool = False) -> str:
    """What the command says, or, if it is to fail, why it does."""
    result = subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)),
            *map(str, command),
        ],
        cwd=ROOT,
        env={
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path[1:]]),
            "DS_ACCELERATOR": "cpu",
        },
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
        *[("llama", "ddp"), ("bert", "ddp"), ("llama", "fsdp"), ("bert", "fsdp"), ("llama", "fsdp-shared")],
        # DeepSpeed is no part of [dev]: transformers would import it in every test.
        *[pytest.param(family, "zero3", marks=pytest.mark.slow) for family in ("llama", "bert")],
        *[pytest.param("minilm", way, marks=[pytest.mark.slow, pytest.mark.real]) for way in ("ddp", "fsdp")],
    ],
)
def test_several_processes_do_what_one_does(family: str, way: str, processes: int, tmp_path: Path) -> None:
    if way == "zero3":
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


def test_mixed_precision_leaves_phi_in_float32(tmp_path: Path) -> None:
    torchrun(2, ROOT / "tests" / "distributed" / "train_sharded.py", "llama", "fsdp-bf16", tmp_path)
    _, losses = train("llama", "fsdp-bf16")
    found = json.loads((tmp_path / "losses.json").read_text())
    assert found == pytest.approx(losses, abs=5e-3)  # eight bits of losses near 4.6
    assert found != pytest.approx(losses, abs=1e-5)


REFUSED = """
import torch
from peft import get_peft_model
from torch.distributed.fsdp import fully_shard
from lrlora import LrLoraConfig

def step():
    try:
        model(torch.ones(1, 4)).sum().backward()
        torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.1).step()
        print("A step")
    except (RuntimeError, NotImplementedError) as error:
        print(error)

torch.distributed.init_process_group("gloo")
model = get_peft_model(torch.nn.Sequential(torch.nn.Linear(4, 4)), LrLoraConfig(target_modules=["0"], rank_penalty=0.5))
for name, parameter in model.named_parameters():
    if "phi" in name:
        parameter.data = parameter.data.bfloat16()
step()
model.train()
step()
fully_shard(model)
step()
torch.distributed.destroy_process_group()
"""


def test_what_cannot_be_is_refused_among_processes(tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(REFUSED)
    cast, restored, sharded = torchrun(1, tmp_path / "script.py").strip().splitlines()
    assert "Parameters of a Transfer are torch.bfloat16, and must be float32" in cast
    assert restored == "A step"
    assert "rank_penalty needs the factors whole, and FSDP2 has sharded them" in sharded


@pytest.mark.slow
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_gates_are_refused_under_zero(stage: int, tmp_path: Path) -> None:
    need_deepspeed()
    (tmp_path / "script.py").write_text(
        "import deepspeed, torch\n"
        "from lrlora import LrLoraConfig\n"
        "from peft import get_peft_model\n"
        "from tests.distributed.train_sharded import ZERO3, adamw\n"
        "torch.distributed.init_process_group('gloo')\n"
        "config = LrLoraConfig(target_modules=['0'], rank_penalty=0.5)\n"
        "model = get_peft_model(torch.nn.Sequential(torch.nn.Linear(4, 4)), config)\n"
        f"zero = ZERO3 | {{'zero_optimization': {{'stage': {stage}}}}}\n"
        "engine, *_ = deepspeed.initialize(model=model, optimizer=adamw(model), config=zero)\n"
        "engine(torch.ones(1, 4))\n"
    )
    assert "rank_penalty has no effect under DeepSpeed's ZeRO" in torchrun(1, tmp_path / "script.py", fails=True)


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
    return {**paths, "task": "classify", "training": training}


def losses(folder: Path) -> list[float]:
    return [entry["loss"] for entry in json.loads((folder / "log_history.json").read_text()) if "loss" in entry]


def test_lrlora_train_in_two_processes(settings: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(settings))
    torchrun(1, "-m", "lrlora", "train", tmp_path / "run.yaml")
    said = torchrun(2, "-m", "lrlora", "train", tmp_path / "run.yaml", "--batch-size", 4, "--output", tmp_path / "two")
    assert said.count("Plan:") == 1
    assert "18 steps of 8 examples" in said
    one, two = losses(tmp_path / "one"), losses(tmp_path / "two")
    assert len(one) == 18
    assert two == pytest.approx(one, abs=1e-5)
    assert (tmp_path / "two" / "metrics.json").exists()
    assert (tmp_path / "two" / "ranks.json").exists()
    assert list((tmp_path / "two").glob("checkpoint-*")) == []


def test_a_run_resumes_with_another_number_of_processes(settings: dict[str, Any], tmp_path: Path) -> None:
    def stop(line: str) -> None:
        if line.startswith("Step 9:"):
            raise KeyboardInterrupt

    whole = train_run(TrainConfig.from_dict(settings))
    with pytest.raises(KeyboardInterrupt):
        train_run(TrainConfig.from_dict(settings | {"output": str(tmp_path / "cut")}), announce=stop)
    refused = torchrun(3, "-m", "lrlora", "train", "--resume", tmp_path / "cut", fails=True)
    assert "steps of 8 examples, which 3 processes with gradient_accumulation_steps=1 cannot share" in refused
    said = torchrun(2, "-m", "lrlora", "train", "--resume", tmp_path / "cut")
    assert "18 steps of 8 examples" in said
    assert "Resuming from step 6" in said
    assert losses(tmp_path / "cut") == pytest.approx(losses(whole.output), abs=1e-5)
