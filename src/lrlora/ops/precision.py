"""Precision of the operators."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor


def without_autocast(device: str) -> AbstractContextManager[object]:
    """Disable autocast, which would form BA in half precision."""
    return torch.autocast(device, enabled=False) if torch.amp.is_autocast_available(device) else nullcontext()


def at_least_float32(matrix: Tensor) -> Tensor:
    """Convert to float32 unless float32 or float64; 8-bit dtypes have no automatic promotion."""
    return matrix.float() if matrix.dtype.itemsize < 4 else matrix


def is_half(dtype: torch.dtype) -> bool:
    """Whether a dtype is bfloat16 or float16."""
    return dtype in (torch.bfloat16, torch.float16)
