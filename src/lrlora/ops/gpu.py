"""Fused GPU kernels in Triton: the same two loops over the entries of ΔW as in `cpu.cpp`.

Each program forms a tile of Z = g·BA in float32 and reads φ from its table. The forward pass writes W + ΔW. The
backward pass multiplies its own tile of G = (∂L/∂y)ᵀ x and stores only reductions: its share of ∂L/∂A and ∂L/∂B, and
the moments Σ G·T_p(z) with the Chebyshev polynomials, which determine the gradient of φ. The CPU's scatter over table
cells would be slow on a GPU: nearly all entries fall into a few cells, and their atomic sums would serialize. All
reductions run in a fixed order, so results are bitwise reproducible.

Before their first use on a device they pass a self-test. Where they do not, or where one fails later, plain PyTorch
runs, after one warning.

Set `TRITON_INTERPRET=1` before importing Triton to run the kernels on a CPU, for tests.
"""

from __future__ import annotations

import functools
import sys
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeVar, cast

import torch
import triton
import triton.language as tl
from torch import Tensor

from .self_test import first_failure
from .table import KernelError, PhiGradient, TransferTable, is_plain

# Tile size, tokens per step and warps per tile. The backward kernel keeps five values per entry in registers.
_BLOCK_M, _BLOCK_N, _BLOCK_T, _WARPS = 64, 64, 32, 4
# Bytes for the per-tile shares of ∂L/∂A and ∂L/∂B. Larger layers are processed in strips of columns.
_SHARES = 2**26


_FAILED: set[torch.device] = set()  # devices whose kernels failed


def supports(table: TransferTable, *tensors: Tensor | None) -> bool:
    """Whether the kernels can read this φ and tensors, and are right on their device."""
    if not table.spec.phi_form.is_clipped or not all(t is None or is_plain(t) for t in tensors):
        return False
    device = next(t.device for t in tensors if t is not None)
    return device not in _FAILED and is_sound(device)


@functools.cache
def is_sound(device: torch.device) -> bool:
    """Whether the kernels pass their self-test on a device; warns once if not."""
    try:
        failure = first_failure(sys.modules[__name__], device)
    except KernelError:
        return False
    if failure is not None:
        _give_up(device, failure)
    return failure is None


def _give_up(device: torch.device, reason: str) -> None:
    _FAILED.add(device)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)
    warnings.warn(
        f"The Triton kernels are not used on {name}: {reason}. φ(BA) runs in plain PyTorch, slower. Please report it.",
        stacklevel=2,
    )


Kernel = TypeVar("Kernel", bound=Callable[..., Any])


def _or_kernel_error(kernel: Kernel) -> Kernel:
    """Raise KernelError, after a warning, where a kernel cannot be compiled or launched."""

    @functools.wraps(kernel)
    def attempt(first: Tensor, *arguments: Any) -> Any:
        try:
            return kernel(first, *arguments)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            lines = str(error).strip().splitlines() or [""]
            _give_up(first.device, f"{kernel.__name__} failed with {type(error).__name__}: {lines[0]}")
            raise KernelError(kernel.__name__) from error

    return cast(Kernel, attempt)


@triton.jit
def _tile(A, B, m, n, strip, r, gain, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Rows and columns of this program's tile, relative to its strip, and Z = g·BA there, float32."""
    rows = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = (strip + tl.program_id(1)).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    z = tl.full((BLOCK_M, BLOCK_N), 0.0, tl.float32)
    # Loop over the rank: tensor cores would round to fewer bits, and the full r does not fit in registers.
    for k in range(r):
        b = tl.load(B + rows * r + k, mask=rows < m, other=0.0)
        a = tl.load(A + k * n + columns, mask=columns < n, other=0.0)
        z += b[:, None] * a[None, :]
    return rows, columns, tl.load(gain) * z


@triton.jit
def _locate(z, side, cells_per_unit):
    """Cell index of each z, 0 … 2·side − 1, and position t in [0, 1]."""
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
    backbone,
    r,
    gain,
    scaling,
    HAS_WEIGHT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    rows, columns, z = _tile(A, B, m, n, 0, r, gain, BLOCK_M, BLOCK_N)
    place, inside = rows[:, None] * n + columns[None, :], (rows[:, None] < m) & (columns[None, :] < n)
    cell, t = _locate(z, side, cells_per_unit)
    psi = _cubic(table, cell, t)
    value = scaling / tl.load(gain) * (backbone * z + psi)
    if HAS_WEIGHT:
        value += tl.load(weight + place, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + place, value.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _slope(table, z, side, cells_per_unit, clip, backbone):
    """φ′(z): tabulated part plus backbone."""
    cell, t = _locate(z, side, cells_per_unit)
    return backbone + tl.where(tl.abs(z) <= clip, _cubic(table, cell, t), 0.0)


@triton.jit
def _store_moments(moments, g, x, num_moments):
    """Σ g·Tₙ(x) over a tile, for Chebyshev polynomials Tₙ of degree below `num_moments`."""
    previous, current = x, tl.full(x.shape, 1.0, tl.float32)
    for degree in range(num_moments):
        tl.store(moments + degree, tl.sum(g * current))
        following = 2.0 * x * current - previous
        previous, current = current, following


@triton.jit
def _gradient_kernel(
    grad_A,
    grad_B,
    moments,
    Y,
    X,
    A,
    B,
    table,
    m,
    n,
    tokens,
    strip,
    side,
    cells_per_unit,
    clip,
    points_per_unit,
    num_moments,
    backbone,
    r,
    gain,
    scaling,
    HAS_PRODUCT: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    rows, columns, z = _tile(A, B, m, n, strip, r, gain, BLOCK_M, BLOCK_N)
    has_row, has_column = rows < m, columns < n
    if HAS_PRODUCT:
        g = tl.full((BLOCK_M, BLOCK_N), 0.0, tl.float32)
        for start in range(0, tokens, BLOCK_T):
            token = (start + tl.arange(0, BLOCK_T)).to(tl.int64)
            is_token = token < tokens
            y = tl.load(Y + token[None, :] * m + rows[:, None], mask=is_token[None, :] & has_row[:, None], other=0.0)
            x = tl.load(X + token[:, None] * n + columns[None, :], mask=is_token[:, None] & has_column, other=0.0)
            g = tl.dot(y, x, g, input_precision=PRECISION)
    else:
        inside = has_row[:, None] & has_column[None, :]
        g = tl.load(Y + rows[:, None] * n + columns[None, :], mask=inside, other=0.0).to(tl.float32)

    h = scaling * _slope(table, z, side, cells_per_unit, clip, backbone) * g
    # Shares of ∂L/∂B, (column blocks, r, m), and of ∂L/∂A, (row blocks, r, columns of the strip).
    grad_B += tl.program_id(1).to(tl.int64) * r * m
    width = tl.num_programs(1) * BLOCK_N
    grad_A += tl.program_id(0).to(tl.int64) * r * width + tl.program_id(1) * BLOCK_N
    for k in range(r):
        a = tl.load(A + k * n + columns, mask=has_column, other=0.0)
        tl.store(grad_B + k * m + rows, tl.sum(h * a[None, :], axis=1), mask=has_row)
        b = tl.load(B + rows * r + k, mask=has_row, other=0.0)
        tl.store(grad_A + k * width + tl.arange(0, BLOCK_N), tl.sum(h * b[:, None], axis=0))

    x = tl.minimum(tl.maximum(z, -clip), clip) * points_per_unit
    moments += (tl.program_id(0) * tl.num_programs(1) + tl.program_id(1)) * num_moments
    _store_moments(moments, g, x, num_moments)


@_or_kernel_error
def write_weight(
    out: Tensor, weight: Tensor | None, A: Tensor, B: Tensor, table: TransferTable, scaling: float, gain: Tensor
) -> None:
    """Write weight + (s/g)·φ(g·BA) to `out` (m, n), rounded once to its dtype; A, B float32, all contiguous."""
    m, n = out.shape
    grid = (triton.cdiv(m, _BLOCK_M), triton.cdiv(n, _BLOCK_N))
    with _on_device_of(out):
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
            table.spec.phi_form.backbone,
            A.shape[0],
            gain,
            scaling,
            HAS_WEIGHT=weight is not None,
            BLOCK_M=_BLOCK_M,
            BLOCK_N=_BLOCK_N,
            num_warps=_WARPS,
        )


@_or_kernel_error
def factor_gradients(
    G: Tensor, A: Tensor, B: Tensor, gradient: PhiGradient, scaling: float, gain: Tensor
) -> tuple[Tensor, Tensor]:
    """(∂L/∂A, ∂L/∂B) from contiguous G = ∂L/∂(W + ΔW) (m, n). Adds G to the gradient of φ."""
    return _gradients(G, None, A, B, gradient, scaling, gain)


@_or_kernel_error
def product_gradients(
    Y: Tensor, X: Tensor, A: Tensor, B: Tensor, gradient: PhiGradient, scaling: float, gain: Tensor
) -> tuple[Tensor, Tensor]:
    """`factor_gradients` for G = YᵀX, never materialized; Y = ∂L/∂y (tokens, m), X (tokens, n)."""
    return _gradients(Y.contiguous(), X.contiguous(), A, B, gradient, scaling, gain)


def _precision() -> str:
    """PyTorch's setting for float32 matmuls on a GPU."""
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"


def _on_device_of(tensor: Tensor) -> AbstractContextManager[object]:
    """Switch to the tensor's device: Triton launches on the current one."""
    return torch.cuda.device_of(tensor) if tensor.is_cuda else nullcontext()


def _gradients(
    Y: Tensor, X: Tensor | None, A: Tensor, B: Tensor, gradient: PhiGradient, scaling: float, gain: Tensor
) -> tuple[Tensor, Tensor]:
    table = gradient.table
    A, B = A.contiguous(), B.contiguous()
    (r, n), m = A.shape, B.shape[0]
    blocks_m, blocks_n = triton.cdiv(m, _BLOCK_M), triton.cdiv(n, _BLOCK_N)
    strip_blocks = max(1, min(blocks_n, _SHARES // (8 * m * r)))
    cubics = table.cubics(derivative=True)
    grad_A, grad_B = torch.empty_like(A), torch.zeros_like(B)
    moments = torch.zeros(table.num_points, dtype=torch.float64, device=A.device)
    for strip in range(0, blocks_n, strip_blocks):
        blocks = min(strip_blocks, blocks_n - strip)
        shares_A = A.new_empty(blocks_m, r, blocks * _BLOCK_N)
        shares_B = B.new_empty(blocks, r, m)
        shares_of_moments = A.new_empty(blocks_m * blocks, table.num_points)
        with _on_device_of(A):
            _gradient_kernel[(blocks_m, blocks)](
                shares_A,
                shares_B,
                shares_of_moments,
                Y,
                Y if X is None else X,
                A,
                B,
                cubics,
                m,
                n,
                Y.shape[0],
                strip,
                float(table.cells_per_side),
                1 / table.spacing,
                table.reach,
                1 / table.points_reach,
                table.num_points,
                table.spec.phi_form.backbone,
                r,
                gain,
                scaling,
                HAS_PRODUCT=X is not None,
                PRECISION=_precision(),
                BLOCK_M=_BLOCK_M,
                BLOCK_N=_BLOCK_N,
                BLOCK_T=_BLOCK_T,
                num_warps=_WARPS,
            )
        columns = slice(strip * _BLOCK_N, min((strip + blocks) * _BLOCK_N, n))
        grad_A[:, columns] = shares_A.sum(0)[:, : columns.stop - columns.start]
        grad_B += shares_B.sum(0).T
        moments += shares_of_moments.sum(0, dtype=torch.float64)
    gradient.add_chebyshev_moments(moments * (scaling / gain))
    return grad_A, grad_B
