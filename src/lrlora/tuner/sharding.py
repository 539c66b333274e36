"""FSDP2 and ZeRO-3 support: φ as a separate shard group, and gathering of sharded parameters."""

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
    if not torch.distributed.is_available() or not torch.distributed.is_initialized():
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
    part: Any = tensor
    if hasattr(part, "to_local"):  # FSDP2's DTensor
        return part.to_local()
    if not _is_partitioned(tensor):
        return part
    # The last ranks' shards end in padding with arbitrary values.
    size = part.ds_tensor.numel()
    left = part.ds_numel - torch.distributed.get_rank() * size
    return part.ds_tensor.flatten()[: max(0, min(size, left))]


def trained_parameters(model: nn.Module) -> dict[str, Tensor]:
    """Gather a sharded model's trained parameters, and its buffers, for `save_pretrained(state_dict=…)`.

    Must be called on all processes.

    Returns:
        name → parameter, on the CPU; complete only on rank 0.

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
