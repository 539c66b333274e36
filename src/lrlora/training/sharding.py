"""Runs whose model is sharded over processes by FSDP2 or DeepSpeed's ZeRO, as `accelerate launch` asks for it."""

from __future__ import annotations

import os
from importlib.util import find_spec
from pathlib import Path

from transformers import Trainer

from .config import TrainConfig


def check_sharding(config: TrainConfig) -> None:
    """Raise a ValueError if what the run asks for cannot be sharded in the way that is asked for."""
    fsdp, deepspeed = (_is_asked_for(config, name) for name in ("fsdp", "deepspeed"))
    if fsdp and _fsdp_version(config) != 2:
        raise ValueError("lrlora train shards with FSDP2, and was asked for FSDP1. Add --fsdp_version 2.")
    if deepspeed and find_spec("deepspeed") is None:
        raise ValueError("The run is to be sharded by DeepSpeed, which is not installed: pip install deepspeed")
    precision = next((name for name in ("bf16", "fp16") if config.training.get(name)), None)
    precision = precision or os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if deepspeed and precision != "no":
        raise ValueError(
            f"DeepSpeed's {precision} would make φ {precision} too. Leave the mixed precision out, and put "
            '"torch_autocast": {"enabled": true, "dtype": "bfloat16"} into DeepSpeed\'s configuration.'
        )
    if (fsdp or deepspeed) and config.adapter.get("rank_penalty"):
        raise ValueError(
            f"adapter: rank_penalty={config.adapter['rank_penalty']!r} needs the factors whole, and "
            f"{'FSDP2' if fsdp else 'ZeRO'} shards them. Leave it out, or train without sharding."
        )
    if fsdp and config.adapter.get("sharing", "module") != "module":
        raise ValueError(
            f"adapter: sharing={config.adapter['sharing']!r} cannot be sharded here: FSDP2 does not know parameters "
            "that several of its groups have. Leave it out, or use lrlora.fully_shard_phi in a script of your own."
        )


def _is_asked_for(config: TrainConfig, name: str) -> bool:
    return bool(config.training.get(name)) or os.environ.get(f"ACCELERATE_USE_{name.upper()}") == "true"


def _fsdp_version(config: TrainConfig) -> int:
    if not config.training.get("fsdp"):
        return int(os.environ.get("FSDP_VERSION", "1"))
    options = config.training.get("fsdp_config")
    if not isinstance(options, dict):
        return 2
    return int(str(options.get("version", options.get("fsdp_version", 2))))


def load_in_every_process() -> None:
    """Have every process read the weights, and not the first alone, which the others wait for with weights on "meta".

    accelerate tells the optimizer's parameters by their addresses, and new heads there would all have the same.
    """
    if "FSDP_CPU_RAM_EFFICIENT_LOADING" in os.environ:
        os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] = "false"


def keep_phi_float32(trainer: Trainer) -> None:
    """Have autocast do FSDP2's mixed precision, as in a single process: FSDP2 itself would make φ bfloat16 too."""
    plugin = trainer.accelerator.state.fsdp_plugin if trainer.is_fsdp_enabled else None
    if plugin is not None and plugin.mixed_precision_policy is not None:
        plugin.mixed_precision_policy = None
        setattr(trainer, "autocast_smart_context_manager", trainer.accelerator.autocast)  # noqa: B010


def require_same_sharding(checkpoint: Path, trainer: Trainer) -> None:
    """Raise a ValueError if a checkpoint is of a run sharded in another way or, by DeepSpeed, in another number."""
    names = [path.name for path in checkpoint.iterdir()]
    was = "without sharding"
    if any(name.startswith("pytorch_model_fsdp") for name in names):
        was = "under FSDP2"
    elif any(name.startswith("global_step") for name in names):
        was = "under DeepSpeed"
    now = "without sharding"
    if trainer.is_fsdp_enabled:
        now = "under FSDP2"
    elif trainer.is_deepspeed_enabled:
        now = "under DeepSpeed"
    if was != now:
        raise ValueError(f"The checkpoint {checkpoint} was written {was}, and this run is {now}. Resume it {was}.")
    processes = sum(name.startswith("rng_state") for name in names)
    if trainer.is_deepspeed_enabled and processes != trainer.args.world_size:
        raise ValueError(
            f"The checkpoint {checkpoint} was written by {processes} processes, and under DeepSpeed only as many can "
            "go on with it."
        )
