"""Runs with a model sharded by FSDP2 or DeepSpeed's ZeRO, as configured with `accelerate launch`."""

from __future__ import annotations

import os
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..files import read_json
from ..tuner.config import EXPANSION


def check_sharding(method: str, adapter: Mapping[str, Any], training: Mapping[str, Any]) -> None:
    """Raise ValueError if a run does not support the requested sharding.

    Args:
        method: method of the run.
        adapter: fields of its PEFT configuration.
        training: its Trainer arguments.

    """
    fsdp, deepspeed = (_is_asked_for(training, name) for name in ("fsdp", "deepspeed"))
    # Defaults of transformers (in `training`) and of accelerate (on its command line).
    version, state = ("2", "FULL_STATE_DICT") if training.get("fsdp") else ("1", "SHARDED_STATE_DICT")
    if fsdp and _fsdp_option(training, "version", version) != "2":
        raise ValueError("lrlora train supports FSDP2, not FSDP1. Pass --fsdp_version 2.")
    if fsdp and _fsdp_option(training, "state_dict_type", state) != "SHARDED_STATE_DICT":
        raise ValueError(
            "FSDP2 checkpoints must be sharded, because adapters cannot be saved as FULL_STATE_DICT. Pass "
            "--fsdp_state_dict_type SHARDED_STATE_DICT, or set state_dict_type in fsdp_config."
        )
    if deepspeed and find_spec("deepspeed") is None:
        raise ValueError("The run uses DeepSpeed, which is not installed: pip install deepspeed")
    precision = next((name for name in ("bf16", "fp16") if training.get(name)), None)
    precision = precision or os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if deepspeed and precision != "no" and _learns_phi(method, adapter):
        raise ValueError(
            f"DeepSpeed's {precision} would also cast φ to {precision}. Remove the mixed precision, and add "
            '"torch_autocast": {"enabled": true, "dtype": "bfloat16"} to the DeepSpeed configuration.'
        )
    if fsdp and adapter.get("sharing", "module") != "module" and _learns_phi(method, adapter):
        raise ValueError(
            f"adapter: sharing={adapter['sharing']!r} is not supported with FSDP2, which cannot share "
            "parameters between groups. Remove it, or call lrlora.fully_shard_phi in your own script."
        )


def _learns_phi(method: str, adapter: Mapping[str, Any]) -> bool:
    """Whether φ has parameters, which must stay float32 and unsharded."""
    return method == "lr-lora" and adapter.get("form") != EXPANSION


def _is_asked_for(training: Mapping[str, Any], name: str) -> bool:
    return bool(training.get(name)) or os.environ.get(f"ACCELERATE_USE_{name.upper()}", "").lower() == "true"


def _fsdp_option(training: Mapping[str, Any], name: str, default: str) -> str:
    """FSDP option, from the run's settings or the environment set by `accelerate launch`."""
    if not training.get("fsdp"):
        return os.environ.get(f"FSDP_{name.upper()}", default)
    options = training.get("fsdp_config") or {}
    if isinstance(options, str):
        options = read_json(Path(options), dict[str, Any], "Pass the options directly, or another file.")
    return str(options.get(name, options.get(f"fsdp_{name}", default)))


def load_in_every_process() -> None:
    """Load the weights in every process instead of only the first, with the others on "meta".

    accelerate identifies the optimizer's parameters by address, and new heads on "meta" would share one.
    """
    if "FSDP_CPU_RAM_EFFICIENT_LOADING" in os.environ:
        os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] = "false"


def prepare_sharding(trainer: Trainer) -> None:
    """Fix FSDP2 defaults; no-op without FSDP2."""
    if not trainer.is_fsdp_enabled:
        return
    trainer.add_callback(_BestCheckpoint())
    # FSDP2's mixed precision would cast φ to bfloat16, too; use autocast, as in a single process.
    plugin = trainer.accelerator.state.fsdp_plugin
    if plugin.mixed_precision_policy is not None:
        plugin.mixed_precision_policy = None
        untyped: Any = trainer
        untyped.autocast_smart_context_manager = trainer.accelerator.autocast


class _BestCheckpoint(TrainerCallback):
    """Sets the best checkpoint by step: for a sharded one, the Trainer checks before its folder exists."""

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        best = Path(str(args.output_dir)) / f"checkpoint-{state.best_global_step}"
        if best.exists():
            state.best_model_checkpoint = str(best)

    on_train_begin = on_save


def require_same_sharding(checkpoint: Path, trainer: Trainer) -> None:
    """Raise ValueError if a checkpoint's sharding or, with DeepSpeed, number of processes differs."""
    names = [path.name for path in checkpoint.iterdir()]
    ways = {
        "under FSDP2": ("pytorch_model_fsdp", trainer.is_fsdp_enabled),
        "under DeepSpeed": ("global_step", trainer.is_deepspeed_enabled),
    }
    marks = ((way, any(name.startswith(mark) for name in names)) for way, (mark, _) in ways.items())
    was = next((way for way, is_present in marks if is_present), "without sharding")
    now = next((way for way, (_, is_on) in ways.items() if is_on), "without sharding")
    if was != now:
        raise ValueError(f"The checkpoint {checkpoint} was written {was}, but this run is {now}. Resume it {was}.")
    processes = sum(name.startswith("rng_state") for name in names)
    if trainer.is_deepspeed_enabled and processes != trainer.args.world_size:
        raise ValueError(
            f"The checkpoint {checkpoint} was written by {processes} processes. DeepSpeed can resume it only with the "
            "same number."
        )
