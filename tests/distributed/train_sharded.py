"""One of several processes that train a tiny model together: train_sharded.py FAMILY WAY FOLDER; started by torchrun.

WAY is ddp, zero3 (DeepSpeed's), fsdp, or fsdp with groups of their own for φ: fsdp-bf16 in mixed precision, fsdp-shared
with one φ for all layers. With "-expansion" at the end of the first three, the form is that, which has no φ. Writes
losses, ranks and the adapter to FOLDER, from the first process.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from peft import get_peft_model
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel
from transformers import AutoModelForSequenceClassification

from lrlora import LrLoraConfig, fully_shard_phi, rank_report
from lrlora.train.models import model_source
from tests.conftest import TinyModel

STEPS, BATCH, RATE = 20, 4, 1e-3


def zero(stage: int) -> dict[str, Any]:
    """DeepSpeed's configuration: AdamW as it is, and even the smallest parameters in partitions."""
    options = {"stage": stage, **({"stage3_param_persistence_threshold": 0} if stage == 3 else {})}
    others = {"zero_allow_untested_optimizer": True, "zero_force_ds_cpu_optimizer": False}
    return {"train_micro_batch_size_per_gpu": BATCH, "zero_optimization": options, **others}


def shard(model: Any, layers: Any, way: str, world: int) -> None:
    """FSDP2 for each layer and the rest, in a way that begins with "fsdp"."""
    mesh = init_device_mesh("cpu", (world,))
    half = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    policy = half if way == "fsdp-bf16" else MixedPrecisionPolicy()
    if way != "fsdp" and model.peft_type == "LRLORA":
        fully_shard_phi(model, mesh=mesh)
    for module in (*layers, model):
        fully_shard(module, mesh=mesh, mp_policy=policy)


def build(family: str) -> Any:
    """A tiny model of a family of the other tests, or MiniLM with its weights and a head."""
    if family != "minilm":
        return TinyModel(family).build()
    torch.manual_seed(0)
    return AutoModelForSequenceClassification.from_pretrained(model_source("embedded:minilm"))


def train(family: str, way: str, rank: int = 0, world: int = 1) -> tuple[Any, list[float]]:
    """The PEFT model after `STEPS` steps on batches that all processes share, and the loss of every step."""
    options = {"sharing": "global"} if way == "fsdp-shared" else {}
    if way.endswith("-expansion"):
        way, options = way.removesuffix("-expansion"), {"form": "expansion", "num_terms": 4}
    model: Any = get_peft_model(build(family), LrLoraConfig(r=2, target_modules="all-linear", **options))
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0  # or every process would draw its own
    model.train()
    network: Any = model
    if world > 1 and way == "ddp":
        network = DistributedDataParallel(model)
    elif world > 1 and way == "zero3":
        import deepspeed

        network, *_ = deepspeed.initialize(model=model, optimizer=adamw(model), config=zero(3))
    elif world > 1:
        inner = model.base_model.model
        shard(model, inner.model.layers if family == "llama" else inner.bert.encoder.layer, way, world)
        rank_report(model)  # as `RankLogger` does before the first step
    optimizer: Any = network if way == "zero3" and world > 1 else adamw(network)
    generator, losses = torch.Generator().manual_seed(1), []
    for _ in range(STEPS):
        tokens = torch.randint(3, 99, (BATCH, 7), generator=generator)
        mine = tokens[rank * BATCH // world : (rank + 1) * BATCH // world]
        labels = mine if family == "llama" else mine[:, 0] % 2
        loss = network(input_ids=mine, labels=labels).loss
        optimizer.backward(loss) if optimizer is network else loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        mean = loss.detach().clone()
        if world > 1:
            dist.all_reduce(mean)
        losses.append(mean.item() / world)
    return model, losses


def adamw(network: torch.nn.Module, rate: float = RATE) -> torch.optim.Optimizer:
    return torch.optim.AdamW([p for p in network.parameters() if p.requires_grad], lr=rate)


def gather(model: Any, way: str) -> dict[str, torch.Tensor]:
    """The whole trained parameters, in every process."""
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if way.startswith("ddp"):
        return trained
    if way.startswith("zero3"):
        import deepspeed

        with deepspeed.zero.GatheredParameters(list(trained.values())):
            return {name: p.detach().clone() for name, p in trained.items()}
    return get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))


def main() -> None:
    """Train, then gather and write."""
    family, way, folder = sys.argv[1], sys.argv[2], Path(sys.argv[3])
    dist.init_process_group("gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    model, losses = train(family, way, rank, world)
    report = rank_report(model)
    state = gather(model, way)
    phis = [p for name, p in state.items() if "lrlora_phi" in name]
    assert bool(phis) != way.endswith("-expansion")
    assert all(phi.dtype == torch.float32 and (phi != phi.bfloat16()).any() for phi in phis)
    everyone: list[Any] = [None] * world
    dist.all_gather_object(everyone, [phi.tolist() for phi in phis])
    assert all(theirs == everyone[0] for theirs in everyone), "φ differs between processes"
    if rank == 0:
        model.save_pretrained(folder, state_dict=state)
        report.to_json(folder / "ranks.json")
        (folder / "losses.json").write_text(json.dumps(losses))
    dist.barrier()
    dist.destroy_process_group()
    # A thread of gloo that still holds a tensor would abort an interpreter that is being shut down (pytorch#179291).
    os._exit(0)


if __name__ == "__main__":
    main()
