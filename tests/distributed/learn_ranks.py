"""One of several processes that learn the ranks of a tiny model: learn_ranks.py WAY FOLDER; started by torchrun.

WAY is alone, compile, ddp, fsdp, fsdp-bf16 (mixed precision), zero2 or zero3. The first process
writes adapter, ranks and losses to FOLDER.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from peft import LoraConfig, get_peft_model
from torch.nn.parallel import DistributedDataParallel

from lrlora import FittedRanks
from lrlora.learned.directions import directions
from lrlora.learned.moments import Moments
from lrlora.lora.live import lora_factors
from tests.conftest import TinyModel
from tests.distributed.train_sharded import BATCH, adamw, gather, shard, zero

STEPS, RATE = 40, 2.5e-3


def learn(way: str, rank: int = 0, world: int = 1) -> tuple[Any, dict[str, Any]]:
    """The PEFT model after training on batches that all processes share; rises, ranks and losses."""
    torch.manual_seed(1)
    model: Any = get_peft_model(TinyModel("llama").build(), LoraConfig(r=8, lora_alpha=16, target_modules="all-linear"))
    model.train()
    network: Any = model
    if way == "compile":
        network = torch.compile(model, backend="aot_eager")
    elif world > 1 and way == "ddp":
        network = DistributedDataParallel(model)
    elif world > 1 and way.startswith("zero"):
        import deepspeed

        network, *_ = deepspeed.initialize(model=model, optimizer=adamw(model, RATE), config=zero(int(way[-1])))
    elif world > 1:
        shard(model, model.base_model.model.model.layers, way, world)
    is_zero = world > 1 and way.startswith("zero")
    optimizer = network.optimizer if is_zero else adamw(network, RATE)
    learned = FittedRanks(network, optimizer, size="r2", steps=STEPS)
    generator, losses, rises = torch.Generator().manual_seed(1), [], {}
    for step in range(STEPS):
        if step == learned.cut_step - 1 and learned.ranks is None:
            moments = learned.state_dict()["moments"]
            parts = lora_factors(model, "default")
            rises = {p.module: directions(p, Moments(*moments[p.module]), 1).rises.tolist() for p in parts}
        tokens = torch.randint(3, 99, (BATCH, 7), generator=generator).sort(1).values
        mine = tokens[rank * BATCH // world : (rank + 1) * BATCH // world]
        loss = network(input_ids=mine, labels=mine).loss
        network.backward(loss) if is_zero else loss.backward()
        network.step() if is_zero else optimizer.step()
        optimizer.zero_grad()
        mean = loss.detach().clone()
        if world > 1:
            dist.all_reduce(mean)
        losses.append(mean.item() / world)
    return model, {"rises": rises, "ranks": learned.ranks, "losses": losses, "summary": learned.summary}


def main() -> None:
    """Learn, then gather and write."""
    way, folder = sys.argv[1], Path(sys.argv[2])
    dist.init_process_group("gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    model, found = learn(way, rank, world)
    everyone: list[Any] = [None] * world
    dist.all_gather_object(everyone, found["ranks"])
    assert all(theirs == everyone[0] for theirs in everyone), "ranks differ between processes"
    state = gather(model, way)
    if rank == 0:
        model.save_pretrained(folder, state_dict=state)
        (folder / "found.json").write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()
    # A thread of gloo that still holds a tensor would abort an interpreter that is being shut down (pytorch#179291).
    os._exit(0)


if __name__ == "__main__":
    main()
