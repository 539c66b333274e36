"""Models that FSDP2 or ZeRO-3 shard over processes: φ as a group of its own, and gathering what is sharded."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..ops.form import Form

if TYPE_CHECKING:
    from torch.distributed.fsdp import FSDPModule


def fully_shard_phi(model: nn.Module, **options: Any) -> None:
    """Shard every φ with FSDP2 as a group of its own, which stays float32 under mixed precision around it.

    Nothing is done where φ has no parameters: the forms "sine" and "expansion".

    Called before `fully_shard` on the layers and the model, which then leave φ alone:

        fully_shard_phi(model, mesh=mesh)
        for layer in layers:
            fully_shard(layer, mesh=mesh, mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16))
        fully_shard(model, mesh=mesh)

    Also what lets layers share a φ, for FSDP2 does not know parameters that several of its groups have. As with every
    group that FSDP2 does not reshard after the forward, make the optimizer before the first forward, or call
    `module.reshard()` on the groups after it: it must get the sharded parameters.

    Args:
        model: with LR-LoRA adapters.
        options: of `fully_shard`, such as `mesh`; not `mp_policy`, which is what φ has to be spared.

    Raises:
        ValueError: the model has no LR-LoRA adapter.

    """
    from torch.distributed.fsdp import fully_shard

    transfers = [module for module in model.modules() if isinstance(module, Form)]
    if not transfers:
        raise ValueError("The model has no φ to shard: add an LR-LoRA adapter before.")
    for transfer in transfers:
        if any(True for _ in transfer.parameters()):
            # Its few numbers stay gathered from their first use to the end of the backward, which needs them again.
            fully_shard(transfer, reshard_after_forward=False, **options)


def shard_owners(model: nn.Module) -> dict[nn.Module, FSDPModule]:
    """Module → the innermost module that FSDP2 has wrapped around it, where there is one."""
    owners: dict[nn.Module, FSDPModule] = {}
    if not torch.distributed.is_available() or not torch.distributed.is_initialized():
        return owners
    from torch.distributed.fsdp import FSDPModule

    for outer in model.modules():  # from outside to inside
        if isinstance(outer, FSDPModule):
            # A φ that layers share is met in all of them, and is nobody's but its own.
            owners |= {m: outer for m in outer.modules() if m is outer or not isinstance(m, FSDPModule)}
    return owners


def is_sharded(model: nn.Module) -> bool:
    """Whether this process holds no more than parts of the parameters."""
    return bool(shard_owners(model)) or any(map(_is_partitioned, model.parameters()))


def _is_partitioned(parameter: Tensor) -> bool:
    return hasattr(parameter, "ds_id")  # by DeepSpeed's ZeRO-3


def local_part(tensor: Tensor) -> Tensor:
    """What this process holds of a parameter or its gradient: all of it, if it is not sharded."""
    part: Any = tensor
    if hasattr(part, "to_local"):  # FSDP2's DTensor
        return part.to_local()
    if not _is_partitioned(tensor):
        return part
    # The last processes' parts end in padding, which holds anything.
    size = part.ds_tensor.numel()
    left = part.ds_numel - torch.distributed.get_rank() * size
    return part.ds_tensor.flatten()[: max(0, min(size, left))]


def trained_parameters(model: nn.Module) -> dict[str, Tensor]:
    """A sharded model's trained parameters, whole, and its buffers, for `save_pretrained(state_dict=…)`.

    All processes call it.

    Returns:
        name → parameter, on the CPU, in the first process; there alone all of them at once.

    """
    if not any(map(_is_partitioned, model.parameters())):
        from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

        options = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=True)
        whole: dict[str, Any] = get_model_state_dict(model, options=options)
        return whole
    import deepspeed

    parameters = dict(model.named_parameters())
    state = {name: buffer for name, buffer in model.state_dict().items() if name not in parameters}
    for name, parameter in parameters.items():
        if parameter.requires_grad:
            with deepspeed.zero.GatheredParameters([parameter]):
                if torch.distributed.get_rank() == 0:
                    state[name] = parameter.detach().cpu().clone()
    return state


@contextmanager
def gathered(layer: nn.Module, owners: dict[nn.Module, FSDPModule]) -> Iterator[None]:
    """For a while, the whole of a layer's parameters; of FSDP2, with what it gathers together with them."""
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
