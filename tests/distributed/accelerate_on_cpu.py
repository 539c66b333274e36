"""accelerate that takes the processes of a CPU for those of GPUs: else it shards no model."""

from __future__ import annotations

from typing import Any

from accelerate import PartialState
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType

_init = AcceleratorState.__init__


def _init_as_on_gpus(self: AcceleratorState, *args: Any, **options: Any) -> None:
    PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
    _init(self, *args, **options)


def shard_on_cpu() -> None:
    """Let FSDP2 shard the models of a CPU's processes."""
    AcceleratorState.__init__ = _init_as_on_gpus
