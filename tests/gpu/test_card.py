"""Paths that depend on the card, there; without one, on the CPU with the kernels in Triton's interpreter."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM

import lrlora
from lrlora import FittedRanks, LrLoraConfig
from lrlora.ops.reference import reference_delta_weight
from lrlora.ops.self_test import first_failure
from lrlora.sharding import is_sharded

from ..conftest import relative, save_quantizable

pytestmark = [pytest.mark.gpu, pytest.mark.integration]
HAS_CARD = torch.cuda.is_available()
DEVICE = torch.device("cuda" if HAS_CARD else "cpu")
STEPS = 24


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    save_quantizable(path)
    return path


def load(folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).to(DEVICE)


def tokens(rows: int = 4) -> torch.Tensor:
    """Each is the one before, plus 1."""
    starts = torch.randint(96, (rows, 1), generator=torch.Generator().manual_seed(1))
    return (3 + (starts + torch.arange(12)) % 96).to(DEVICE)


def train(model: Any, optimizer: Any, steps: int = STEPS) -> list[float]:
    losses = []
    for _ in range(steps):
        loss = model(input_ids=tokens(32), labels=tokens(32)).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def test_the_triton_kernels_agree_with_the_formula() -> None:
    gpu = pytest.importorskip("lrlora.ops.gpu")
    assert first_failure(gpu, DEVICE) is None


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.bfloat16, 3e-2)])
def test_the_update_of_a_layer(dtype: torch.dtype, tolerance: float) -> None:
    torch.manual_seed(0)
    model: Any = nn.Sequential(nn.Linear(96, 80, dtype=dtype)).to(DEVICE)
    model = get_peft_model(model, LrLoraConfig(r=4, target_modules=["0"]))
    layer = model.base_model.model[0]
    A, B = (part["default"].weight for part in (layer.lrlora_A, layer.lrlora_B))
    with torch.no_grad():
        B.normal_(std=0.05)
    x = torch.randn(7, 96, device=DEVICE, dtype=dtype)
    scales = {"scaling": layer.scaling["default"], "input_gain": layer.input_gain["default"]}
    with torch.no_grad():
        update = model(x).double() - layer.get_base_layer()(x).double()
        wanted = x.double() @ reference_delta_weight(A, B, layer.lrlora_phi["default"], **scales).T
    assert relative(update, wanted) <= tolerance


@pytest.mark.parametrize("is_compiled", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_phi_trains(is_compiled: bool, dtype: torch.dtype, folder: Path) -> None:
    model: Any = get_peft_model(load(folder, dtype), LrLoraConfig(r=4, target_modules="all-linear"))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = train(torch.compile(model) if is_compiled else model, optimizer)
    assert losses[-1] < losses[0] - 0.1


@pytest.mark.parametrize("is_compiled", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_ranks_are_learned_and_saved_as_plain_lora(
    is_compiled: bool, dtype: torch.dtype, folder: Path, tmp_path: Path
) -> None:
    base = load(folder, dtype)
    model: Any = get_peft_model(base, LoraConfig(r=8, target_modules="all-linear"))
    whole = sum(p.numel() for p in model.parameters() if p.requires_grad)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    FittedRanks(model, optimizer, size="r2", steps=STEPS)
    losses = train(torch.compile(model) if is_compiled else model, optimizer)
    assert losses[-1] < losses[0] - 0.1
    model.save_pretrained(tmp_path)
    assert sum(t.numel() for t in load_file(tmp_path / "adapter_model.safetensors").values()) <= whole / 4
    with torch.no_grad():
        wanted = model.eval()(input_ids=tokens()).logits
        loaded = PeftModel.from_pretrained(load(folder, dtype), tmp_path).eval()
        assert relative(loaded(input_ids=tokens()).logits, wanted) <= 1e-2


def test_a_finished_lora_is_shrunk(folder: Path) -> None:
    model: Any = get_peft_model(load(folder), LoraConfig(r=8, target_modules="all-linear"))
    train(model, torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2))
    batches = [{"input_ids": part, "labels": part} for part in tokens(320).split(8)]
    found = lrlora.shrink(model, batches[::2], batches[1::2], keep=0.9)
    assert found.parameters < found.whole


def test_fsdp2_in_one_process(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from torch.distributed.fsdp import fully_shard

    for name, value in (("MASTER_ADDR", "127.0.0.1"), ("MASTER_PORT", "0"), ("RANK", "0"), ("WORLD_SIZE", "1")):
        monkeypatch.setitem(os.environ, name, value)
    dist.init_process_group("nccl" if HAS_CARD else "gloo", rank=0, world_size=1, store=dist.HashStore())
    try:
        model: Any = get_peft_model(load(folder), LoraConfig(r=8, target_modules="all-linear"))
        for layer in model.base_model.model.model.layers:
            fully_shard(layer)
        fully_shard(model)
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        ranks = FittedRanks(model, optimizer, size="r2", steps=STEPS)
        losses = train(model, optimizer)
        assert is_sharded(model)
        assert losses[-1] < losses[0] - 0.1
        assert ranks.ranks is not None
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("config", [LoraConfig, LrLoraConfig])
def test_a_base_in_four_bits(config: Any, folder: Path) -> None:
    bnb = pytest.importorskip("bitsandbytes")
    model = load(folder)
    for layer in model.model.layers:
        for name in ("gate_proj", "up_proj"):
            whole = getattr(layer.mlp, name)
            small = bnb.nn.Linear4bit(whole.in_features, whole.out_features, bias=False, quant_type="nf4")
            small.weight = bnb.nn.Params4bit(whole.weight.data.cpu(), requires_grad=False, quant_type="nf4")
            setattr(layer.mlp, name, small)
    adapted: Any = get_peft_model(model.to(DEVICE), config(r=8, target_modules=["gate_proj", "up_proj"]))
    optimizer = torch.optim.AdamW([p for p in adapted.parameters() if p.requires_grad], lr=1e-2)
    if config is LoraConfig:
        FittedRanks(adapted, optimizer, size="r2", steps=STEPS)
    losses = train(adapted, optimizer)
    assert losses[-1] < losses[0] - 0.05
