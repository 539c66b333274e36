"""Self-test of kernels on the device where they run: against φ in float64, on a small layer.

A kernel that was only ever compiled for other hardware may be wrong on this one without an error.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from .phi import TransferSpec
from .table import PhiGradient, TransferTable

# Of the update and of the gradients: TF32 and bfloat16 err by 2e-3, a wrong kernel by more.
_TOLERANCE = 1e-2
# More than a tile in each direction, and no multiple of one.
_M, _N, _R, _TOKENS = 70, 90, 3, 40
_SCALING, _GAIN = 2.0, 100.0


def first_failure(kernels: Any, device: torch.device) -> str | None:
    """The first kernel that fails or disagrees with the formula, in words; None if all are right.

    Args:
        kernels: module with `write_weight`, `factor_gradients` and `product_gradients`.
        device: of the tensors.

    """
    with torch.no_grad():
        for name, difference in _differences(kernels, device):
            if not difference <= _TOLERANCE:  # or NaN
                return f"{name} differs from the formula by {difference:.1%}"
    return None


def _differences(kernels: Any, device: torch.device) -> Iterator[tuple[str, float]]:
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int, size: float = 1.0) -> Tensor:
        return (torch.randn(*shape, generator=generator) * size).to(device)

    spec = TransferSpec()
    phi = torch.stack([normal(spec.num_basis, size=0.03), normal(spec.num_basis, size=0.3)])
    A, B, W = normal(_R, _N), normal(_M, _R, size=0.01), normal(_M, _N)
    Y, X, gain = normal(_TOKENS, _M), normal(_TOKENS, _N), torch.tensor(_GAIN, device=device)
    exact, table = (TransferTable(spec, phi, dtype) for dtype in (torch.float64, torch.float32))
    z = _GAIN * (B.double() @ A.double())
    delta = _SCALING / _GAIN * exact.value(z)
    for dtype in (torch.float32, torch.bfloat16):
        for weight in (None, W.to(dtype)):
            out = torch.empty(_M, _N, dtype=dtype, device=device)
            kernels.write_weight(out, weight, A, B, table, _SCALING, gain)
            wanted = delta if weight is None else weight.double() + delta
            yield "write_weight", _difference(out, wanted)
    G = Y.T @ X
    wanted_phi = PhiGradient(exact)
    wanted_phi.add(z, G.double() * (_SCALING / _GAIN))
    H = _SCALING * exact.slope(z) * G.double()
    expected = B.double().T @ H, H @ A.double().T, *wanted_phi.parameter_gradient()
    for name, inputs in (("factor_gradients", (G,)), ("product_gradients", (Y, X))):
        gradient = PhiGradient(table)
        gradients = getattr(kernels, name)(*inputs, A, B, gradient, _SCALING, gain)
        for got, wanted in zip((*gradients, *gradient.parameter_gradient()), expected, strict=True):
            yield name, _difference(got, wanted)


def _difference(got: Tensor, wanted: Tensor) -> float:
    return float((got.double() - wanted.double()).norm() / wanted.double().norm())
