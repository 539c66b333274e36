"""The fused GPU kernels, in Triton: the same two loops over the entries of ΔW as `kernels.cpp`.

A tile of Z = g·BA is formed in float32, φ is read from the table, and what leaves the chip is one m×n tensor: the
effective weight, or H = s·φ′(Z) ∘ G in place of G. The gradient of φ is summed per cell of the table in 64-bit fixed
point: integers add up to the same bits in any order, so that a run can be repeated exactly, atomics or not.

`TRITON_INTERPRET=1` runs the kernels on a CPU, for tests.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor, nn

from ..transfer import TransferTable

_FORMS = ("residual", "saturating")
_MOMENTS = 3
_BLOCK_M, _BLOCK_N = 64, 64
# A sum of 2²⁶ terms (a layer of 8192²), each at most 1 after scaling, stays below 2⁶³.
_ONE = tl.constexpr(2.0**36)


def takes(table: TransferTable, *tensors: Tensor | None) -> bool:
    """Whether the kernels take this φ and these tensors."""
    return table.spec.form in _FORMS and all(t is None or _is_plain(t) for t in tensors)


def _is_plain(tensor: Tensor) -> bool:
    """Not of a subclass, which may have its elements elsewhere or none at all."""
    return type(tensor) in (Tensor, nn.Parameter) and tensor.dtype in (torch.float32, torch.bfloat16, torch.float16)


@triton.jit
def _tile(A, B, m, n, gain, r: tl.constexpr, PADDED_R: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Of this program's tile: the places of its entries in an m×n tensor, which exist, and Z = g·BA, float32."""
    rows = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = tl.program_id(1).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, PADDED_R)
    b = tl.load(B + rows[:, None] * r + k[None, :], mask=(rows[:, None] < m) & (k[None, :] < r), other=0.0)
    a = tl.load(A + k[:, None] * n + columns[None, :], mask=(k[:, None] < r) & (columns[None, :] < n), other=0.0)
    inside = (rows[:, None] < m) & (columns[None, :] < n)
    return rows[:, None] * n + columns[None, :], inside, gain * tl.dot(b, a, input_precision="ieee")


@triton.jit
def _locate(z, side, cells_per_unit):
    """The cell of each z, 0 … 2·side − 1, and its place t in [0, 1]."""
    u = tl.minimum(tl.maximum(z * cells_per_unit, -side), side)
    start = tl.minimum(tl.floor(u), side - 1.0)
    return (start + side).to(tl.int32), u - start


@triton.jit
def _cubic(table, cell, t):
    p = tl.load(table + cell * 4 + 3)
    p = p * t + tl.load(table + cell * 4 + 2)
    p = p * t + tl.load(table + cell * 4 + 1)
    return p * t + tl.load(table + cell * 4)


@triton.jit
def _tanh(z):
    # exp(−2|z|) never overflows; near 0, where 1 − e would cancel, the Taylor series to z¹³.
    q = z * z
    e = tl.exp(-2.0 * tl.abs(z))
    far = tl.where(z < 0, -1.0, 1.0) * (1.0 - e) / (1.0 + e)
    p = 21844.0 / 6081075
    p = p * q - 1382.0 / 155925
    p = p * q + 62.0 / 2835
    p = p * q - 17.0 / 315
    p = p * q + 2.0 / 15
    p = p * q - 1.0 / 3
    return tl.where(tl.abs(z) < 0.35, p * q * z + z, far)


@triton.jit
def _weight_kernel(
    out,
    weight,
    A,
    B,
    table,
    m,
    n,
    side,
    cells_per_unit,
    gain,
    scale,
    r: tl.constexpr,
    PADDED_R: tl.constexpr,
    IS_SATURATING: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    place, inside, z = _tile(A, B, m, n, gain, r, PADDED_R, BLOCK_M, BLOCK_N)
    cell, t = _locate(z, side, cells_per_unit)
    psi = _cubic(table, cell, t)
    value = scale * ((_tanh(z) if IS_SATURATING else z) + psi)
    if HAS_WEIGHT:
        value += tl.load(weight + place, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + place, value.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _gradient_kernel(
    H,
    G,
    A,
    B,
    table,
    moments,
    m,
    n,
    side,
    cells_per_unit,
    gain,
    scaling,
    fixed_point,
    r: tl.constexpr,
    PADDED_R: tl.constexpr,
    IS_SATURATING: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    place, inside, z = _tile(A, B, m, n, gain, r, PADDED_R, BLOCK_M, BLOCK_N)
    cell, t = _locate(z, side, cells_per_unit)
    g = tl.load(G + place, mask=inside, other=0.0).to(tl.float32)
    slope = tl.where(tl.abs(z) * cells_per_unit <= side, _cubic(table, cell, t), 0.0)
    if IS_SATURATING:
        tangent = _tanh(z)
        slope += 1.0 - tangent * tangent
    else:
        slope += 1.0
    tl.store(H + place, (scaling * slope * g).to(H.dtype.element_ty), mask=inside)
    # Only φ's parameters learn from these, and g is scaled to at most 1 in size: fixed point loses 2⁻³⁶ of the largest.
    unit = g * tl.load(fixed_point)
    u = t - 0.5
    for power in tl.static_range(3):
        tl.atomic_add(moments + cell * 3 + power, (unit.to(tl.float64) * _ONE).to(tl.int64), mask=inside)
        unit *= u


def write_weight(
    out: Tensor, weight: Tensor | None, A: Tensor, B: Tensor, table: TransferTable, scaling: float, gain: float
) -> None:
    """Write weight + (s/g)·φ(g·BA) to `out` (m, n), rounded to its dtype once; A and B float32, all contiguous."""
    m, n = out.shape
    grid = (triton.cdiv(m, _BLOCK_M), triton.cdiv(n, _BLOCK_N))
    _weight_kernel[grid](
        out,
        out if weight is None else weight.contiguous(),
        A.contiguous(),
        B.contiguous(),
        table.cubics(derivative=False),
        m,
        n,
        float(table.cells_per_side),
        1 / table.spacing,
        gain,
        scaling / gain,
        r=A.shape[0],
        PADDED_R=max(16, triton.next_power_of_2(A.shape[0])),
        IS_SATURATING=table.spec.form == "saturating",
        HAS_WEIGHT=weight is not None,
        BLOCK_M=_BLOCK_M,
        BLOCK_N=_BLOCK_N,
    )


def factor_gradients(
    G: Tensor, A: Tensor, B: Tensor, table: TransferTable, scaling: float, gain: float, *, is_free: bool
) -> tuple[Tensor, Tensor]:
    """(∂L/∂A, ∂L/∂B) from G = ∂L/∂(W + ΔW) (m, n), overwritten if it `is_free`; adds G to φ's gradient in `table`."""
    m, n = G.shape
    H = G if is_free else torch.empty_like(G)
    largest = G.abs().amax().float().clamp_min(torch.finfo(torch.float32).tiny)
    moments = torch.zeros(2 * table.cells_per_side, _MOMENTS, dtype=torch.int64, device=G.device)
    grid = (triton.cdiv(m, _BLOCK_M), triton.cdiv(n, _BLOCK_N))
    _gradient_kernel[grid](
        H,
        G,
        A.contiguous(),
        B.contiguous(),
        table.cubics(derivative=True),
        moments,
        m,
        n,
        float(table.cells_per_side),
        1 / table.spacing,
        gain,
        scaling,
        largest.reciprocal(),
        r=A.shape[0],
        PADDED_R=max(16, triton.next_power_of_2(A.shape[0])),
        IS_SATURATING=table.spec.form == "saturating",
        BLOCK_M=_BLOCK_M,
        BLOCK_N=_BLOCK_N,
    )
    unit = largest.double() * (scaling / gain / _ONE.value)
    table.add_central_moments(moments * unit)
    return B.T @ H.to(A.dtype), H.to(A.dtype) @ A.T
