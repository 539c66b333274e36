"""Which fused kernels do the work on the entries of ΔW, if any: those of the CPU, those of the GPU, or plain PyTorch.

`LRLORA_KERNELS` in the environment overrides the choice: `native` (C++), `triton`, or `0` for plain PyTorch.
"""

from __future__ import annotations

import functools
import importlib
import os
from collections.abc import Callable
from typing import Protocol

from torch import Tensor

from . import cpu
from .table import PhiGradient, TransferTable


class Kernels(Protocol):
    """What a set of kernels offers; see `cpu` for the meaning, and `gpu` for `product_gradients`."""

    def supports(self, table: TransferTable, *tensors: Tensor | None) -> bool: ...

    def write_weight(
        self,
        out: Tensor,
        weight: Tensor | None,
        A: Tensor,
        B: Tensor,
        table: TransferTable,
        scaling: float,
        gain: float,
    ) -> None: ...

    def factor_gradients(
        self, G: Tensor, A: Tensor, B: Tensor, gradient: PhiGradient, scaling: float, gain: float
    ) -> tuple[Tensor, Tensor]: ...

    @property
    def product_gradients(self) -> Callable[..., tuple[Tensor, Tensor]] | None: ...


def kernels_for(table: TransferTable, *tensors: Tensor | None) -> Kernels | None:
    """The kernels for this φ and these tensors; None for plain PyTorch.

    Raises:
        ValueError: `LRLORA_KERNELS` is none of the known values.

    """
    is_on_gpu = any(t is not None and t.is_cuda for t in tensors)
    choice = os.environ.get("LRLORA_KERNELS") or ("triton" if is_on_gpu else "native")
    if choice not in _CHOICES:
        raise ValueError(f"LRLORA_KERNELS must be one of {', '.join(_CHOICES)} in the environment, and is {choice!r}.")
    kernels = _CHOICES[choice]()
    return kernels if kernels is not None and kernels.supports(table, *tensors) else None


@functools.cache
def _triton() -> Kernels | None:
    try:
        return importlib.import_module(".gpu", __package__)
    except ImportError:
        return None  # PyTorch for CUDA brings Triton along; elsewhere it may be missing


_CHOICES: dict[str, Callable[[], Kernels | None]] = {"native": lambda: cpu, "triton": _triton, "0": lambda: None}
