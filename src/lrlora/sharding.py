"""Parameters wherever a trainer keeps them: whole, sharded by FSDP2, or partitioned by DeepSpeed's ZeRO.

Functions that read or write whole values must be called on every process.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .ops.form import Form

if TYPE_CHECKING:
    from torch.distributed.fsdp import FSDPModule


def fully_shard_phi(model: nn.Module, **options: Any) -> None:
    """Shard every φ with FSDP2 as a separate group, which stays float32 under mixed precision.

    Does nothing for the form "expansion", which has no parameters.

    Call it before `fully_shard` on the layers and the model, which then skip φ:

        fully_shard_phi(model, mesh=mesh)
        for layer in layers:
            fully_shard(layer, mesh=mesh, mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16))
        fully_shard(model, mesh=mesh)

    Required for a shared φ, because FSDP2 does not support parameters shared between groups. As with any group that
    FSDP2 does not reshard after the forward, create the optimizer before the first forward, or call `module.reshard()`
    on the groups after it: the optimizer needs the sharded parameters.

    Args:
        model: model with LR-LoRA adapters.
        options: options of `fully_shard`, such as `mesh`; not `mp_policy`, from which φ must be exempt.

    Raises:
        ValueError: the model has no LR-LoRA adapter.

    """
    from torch.distributed.fsdp import fully_shard

    transfers = [module for module in model.modules() if isinstance(module, Form)]
    if not transfers:
        raise ValueError("The model has no φ to shard. Add an LR-LoRA adapter before calling fully_shard_phi.")
    for transfer in transfers:
        if any(True for _ in transfer.parameters()):
            # φ is tiny and needed again in the backward, so it stays gathered until then.
            fully_shard(transfer, reshard_after_forward=False, **options)


def shard_owners(model: nn.Module) -> dict[nn.Module, FSDPModule]:
    """Map each module to the innermost FSDP2 module around it, if any."""
    owners: dict[nn.Module, FSDPModule] = {}
    if not dist.is_available() or not dist.is_initialized():
        return owners
    from torch.distributed.fsdp import FSDPModule

    for outer in model.modules():  # outermost first
        if isinstance(outer, FSDPModule):
            # A shared φ occurs in every layer that uses it, but belongs only to its own group.
            owners |= {m: outer for m in outer.modules() if m is outer or not isinstance(m, FSDPModule)}
    return owners


def is_sharded(model: nn.Module) -> bool:
    """Whether parameters are sharded over processes."""
    return bool(shard_owners(model)) or any(map(_is_partitioned, model.parameters()))


def _is_partitioned(parameter: Tensor) -> bool:
    return hasattr(parameter, "ds_id")  # set by DeepSpeed's ZeRO-3


def local_part(tensor: Tensor) -> Tensor:
    """Local shard of a parameter or its gradient; the whole tensor if it is not sharded."""
    parameter: Any = tensor
    if hasattr(parameter, "to_local"):  # FSDP2's DTensor
        return parameter.to_local()
    if not _is_partitioned(tensor):
        return parameter
    # The last ranks' shards end in padding with arbitrary values.
    size = parameter.ds_tensor.numel()
    remaining = parameter.ds_numel - dist.get_rank() * size
    return parameter.ds_tensor.flatten()[: max(0, min(size, remaining))]


@contextmanager
def gathered(layer: nn.Module, owners: dict[nn.Module, FSDPModule]) -> Iterator[None]:
    """Context with a layer's full parameters; FSDP2 gathers their whole group."""
    needed = dict.fromkeys(owners[module] for module in layer.modules() if module in owners)
    partitioned = [parameter for parameter in layer.parameters() if _is_partitioned(parameter)]
    whole = nullcontext()
    if partitioned:
        import deepspeed

        whole = deepspeed.zero.GatheredParameters(partitioned)
    for owner in needed:
        owner.unshard()
    try:
        with whole:
            yield
    finally:
        for owner in needed:
            owner.reshard()


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


def in_deepspeed(parameter: Tensor) -> bool:
    """Whether DeepSpeed keeps a float32 copy of a parameter, or partitions it."""
    return hasattr(parameter, "ds_id") or hasattr(parameter, "_hp_mapping")


def is_whole(model: nn.Module) -> bool:
    """Whether this process alone has the parameters, all of them whole."""
    return processes() == 1 and not is_sharded(model) and not any(map(in_deepspeed, model.parameters()))


@torch.no_grad()
def full_value(parameter: Tensor) -> Tensor:
    """Value of a parameter, not sharded, float32; of ZeRO's float32 copy."""
    value: Any = parameter.detach()
    if in_deepspeed(parameter):
        from deepspeed.utils import safe_get_full_fp32_param

        return safe_get_full_fp32_param(parameter)
    return (value.full_tensor() if hasattr(value, "full_tensor") else value).float()


@torch.no_grad()
def write(parameter: Tensor, value: Tensor) -> None:
    """Overwrite a parameter in place."""
    if in_deepspeed(parameter):
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


def full_state(optimizer: Any, parameter: nn.Parameter, name: str) -> Tensor:
    """Value of an optimizer's state of a parameter, not sharded, float32."""
    if in_deepspeed(parameter):
        from deepspeed.utils import safe_get_full_optimizer_state

        return safe_get_full_optimizer_state(parameter, name)
    return full_value(optimizer.state[parameter][name])


def write_state(optimizer: Any, parameter: nn.Parameter, name: str, value: Tensor) -> None:
    """Overwrite an optimizer's state of a parameter in place."""
    if in_deepspeed(parameter):
        from deepspeed.utils import safe_set_full_optimizer_state

        safe_set_full_optimizer_state(parameter, value.float().to(parameter.device), name)
        return
    write(optimizer.state[parameter][name], value)
