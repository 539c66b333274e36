"""Whole values of trained parameters, wherever a trainer keeps them: plain, sharded by FSDP2, partitioned by ZeRO.

All functions must be called on every process.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..tuner.sharding import is_sharded


def processes() -> int:
    """Number of processes that train together."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def process_index() -> int:
    """Index of this process among these."""
    return dist.get_rank() if processes() > 1 else 0


def of_first(value: Any) -> Any:
    """The first process's value, on all of them."""
    if processes() == 1:
        return value
    shared = [value]
    dist.broadcast_object_list(shared, src=0)
    return shared[0]


def is_deepspeed(optimizer: Any) -> bool:
    """Whether DeepSpeed's ZeRO steps: its optimizer holds flat partitions of float32 copies."""
    return type(optimizer).__module__.startswith("deepspeed.")


def unwrapped(optimizer: Any) -> list[Any]:
    """The optimizer and those inside of it, such as that inside of accelerate's wrapper."""
    found = [optimizer]
    while (wrapped := getattr(found[-1], "optimizer", None) or getattr(found[-1], "base_optimizer", None)) is not None:
        found.append(wrapped)
    return found


def _in_deepspeed(parameter: Tensor) -> bool:
    return hasattr(parameter, "ds_id") or hasattr(parameter, "_hp_mapping")


def is_whole(model: nn.Module) -> bool:
    """Whether this process alone has the parameters, all of them whole."""
    return processes() == 1 and not is_sharded(model) and not any(map(_in_deepspeed, model.parameters()))


@torch.no_grad()
def full_value(parameter: nn.Parameter) -> Tensor:
    """Value of a parameter, not sharded, float32; of ZeRO's float32 copy."""
    value: Any = parameter.detach()
    if _in_deepspeed(parameter):
        from deepspeed.utils import safe_get_full_fp32_param

        return safe_get_full_fp32_param(parameter)
    return (value.full_tensor() if hasattr(value, "full_tensor") else value).float()


@torch.no_grad()
def write(parameter: nn.Parameter, value: Tensor) -> None:
    """Overwrite a parameter in place."""
    if _in_deepspeed(parameter):
        import deepspeed
        from deepspeed.utils import safe_set_full_fp32_param

        # The next forward uses the parameter, and the next step its float32 copy.
        with deepspeed.zero.GatheredParameters(parameter, modifier_rank=0, enabled=hasattr(parameter, "ds_id")):
            parameter.copy_(value)
        safe_set_full_fp32_param(parameter, value.to(parameter.device))
        return
    sharded: Any = parameter
    value = value.to(parameter)
    if hasattr(sharded, "full_tensor"):
        from torch.distributed.tensor import distribute_tensor

        value = distribute_tensor(value, sharded.device_mesh, sharded.placements)
    parameter.copy_(value)


@torch.no_grad()
def restart(optimizer: Any, parameters: Sequence[nn.Parameter], *, are_all: bool) -> None:
    """Let the optimizer begin anew with parameters; `are_all` if it has no others.

    Where others share ZeRO's partitions, the step of Adam's bias correction goes on, so the second moment becomes its
    mean instead of 0, which would make the first steps several times too large.
    """
    if not any(map(_in_deepspeed, parameters)):
        for parameter in parameters:
            optimizer.state.pop(parameter, None)
        return
    if are_all:
        for state in optimizer.state.values():
            for name, value in state.items():
                state[name] = value.zero_() if isinstance(value, Tensor) else type(value)(0)
        return
    from deepspeed.utils import safe_get_full_optimizer_state, safe_set_full_optimizer_state

    for parameter in parameters:
        for name in ("exp_avg", "exp_avg_sq"):
            state = safe_get_full_optimizer_state(parameter, name)
            value = torch.full_like(state, state.mean().item() if name == "exp_avg_sq" else 0.0)
            safe_set_full_optimizer_state(parameter, value, name)
