"""In what precision the operators compute."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor


def without_autocast(device: str) -> AbstractContextManager[object]:
    """The op chooses its own precision: autocast would form BA in half of it."""
    return torch.autocast(device, enabled=False) if torch.amp.is_autocast_available(device) else nullcontext()


def at_least_float32(matrix: Tensor) -> Tensor:
    """The matrix in float32, or float64 if it is that; numbers of 8 bits promote to nothing by themselves."""
    return matrix.float() if matrix.dtype.itemsize < 4 else matrix


def is_half(dtype: torch.dtype) -> bool:
    """Whether a dtype is of half precision."""
    return dtype in (torch.bfloat16, torch.float16)
