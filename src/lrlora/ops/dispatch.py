"""Selects the kernels that process the entries of ΔW: fused CPU, fused GPU, or plain PyTorch.

Set the environment variable `LRLORA_KERNELS` to override the choice: `native` (C++), `triton`, or `0` (PyTorch).
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
    """Interface of a kernel set; see `cpu`, and `gpu` for `product_gradients`."""

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
    """Kernels for this φ and these tensors; None for plain PyTorch.

    Raises:
        ValueError: `LRLORA_KERNELS` has an unknown value.

    """
    is_on_gpu = any(t is not None and t.is_cuda for t in tensors)
    choice = os.environ.get("LRLORA_KERNELS") or ("triton" if is_on_gpu else "native")
    if choice not in _CHOICES:
        raise ValueError(
            f"The environment variable LRLORA_KERNELS must be one of {', '.join(_CHOICES)}, got {choice!r}."
        )
    kernels = _CHOICES[choice]()
    return kernels if kernels is not None and kernels.supports(table, *tensors) else None


@functools.cache
def _triton() -> Kernels | None:
    try:
        return importlib.import_module(".gpu", __package__)
    except ImportError:
        return None  # Triton ships with PyTorch for CUDA and may be missing elsewhere


_CHOICES: dict[str, Callable[[], Kernels | None]] = {"native": lambda: cpu, "triton": _triton, "0": lambda: None}
