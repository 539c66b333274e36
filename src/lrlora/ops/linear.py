"""The lean path: one matmul with W + s·φ(BA), and a backward that saves no m×n tensor.

Forward builds W + ΔW block by block in one m×n buffer and drops it after the matmul. Backward builds it again from
the factors for ∂L/∂x, then reuses the buffer for G = ∂L/∂(W + ΔW) = (∂L/∂y)ᵀ x, and walks over its blocks:

    H = s · φ′(g·BA) ∘ G,    ∂L/∂B = H Aᵀ,    ∂L/∂A = Bᵀ H,    ∂L/∂φ(g·BA) = (s/g) · G

Saved for backward are x, W (which is there anyway), A, B and the parameters of φ.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..transfer import Transfer, TransferSpec, TransferTable
from . import native

# Entries of ΔW handled at a time. On a CPU temporaries of this size stay in the cache; an accelerator wants few, large
# kernels, and 64 MB each.
CPU_BLOCK_ENTRIES = 2**16
ACCELERATOR_BLOCK_ENTRIES = 2**24


class _Update(NamedTuple):
    """What, besides tensors, defines ΔW = (scaling / input_gain) · φ(input_gain · BA)."""

    spec: TransferSpec
    scaling: float
    input_gain: float


def _row_blocks(matrix: Tensor) -> Iterator[slice]:
    rows, columns = matrix.shape
    entries = CPU_BLOCK_ENTRIES if matrix.device.type == "cpu" else ACCELERATOR_BLOCK_ENTRIES
    step = max(1, entries // columns)
    for start in range(0, rows, step):
        yield slice(start, min(start + step, rows))


def _without_autocast(tensor: Tensor) -> AbstractContextManager[object]:
    """The op chooses its own precision: autocast would form BA in half of it."""
    device = tensor.device.type
    return torch.autocast(device, enabled=False) if torch.amp.is_autocast_available(device) else nullcontext()


def _is_transposed(matrix: Tensor) -> bool:
    """Whether `matrix` (m, n) is laid out column by column, as the weight of transformers' Conv1D is."""
    return matrix.stride(0) < matrix.stride(1)


def _write_weight(
    out: Tensor, weight: Tensor | None, A: Tensor, B: Tensor, table: TransferTable, update: _Update
) -> None:
    """Write to `out` (m, n): weight + ΔW, or ΔW alone without a weight, rounded to the dtype of `out` once."""
    left, right = B, A
    if _is_transposed(out):
        out, weight, left, right = out.T, None if weight is None else weight.T, A.T, B.T
    if native.is_native(table, out, weight, A, B):
        native.write_weight(out, weight, right, left, table, update.scaling, update.input_gain)
        return
    for rows in _row_blocks(out):
        z = torch.mm(left[rows], right).mul_(update.input_gain)
        delta = table.value(z).mul_(update.scaling / update.input_gain)
        out[rows] = delta if weight is None else delta.add_(weight[rows])


def _factor_gradients(
    G: Tensor, A: Tensor, B: Tensor, table: TransferTable, update: _Update, *, is_free: bool
) -> tuple[Tensor, Tensor]:
    """(∂L/∂A, ∂L/∂B) from G = ∂L/∂(W + ΔW) (m, n); adds G to the gradient of the parameters of φ in `table`.

    G may be overwritten if it `is_free`.
    """
    if _is_transposed(G):
        grad_Bt, grad_At = _factor_gradients(G.T, B.T, A.T, table, update, is_free=is_free)
        return grad_At.T, grad_Bt.T
    if native.is_native(table, G, A, B):
        H = G if is_free else torch.empty_like(G)
        native.write_gradient(H, G, A, B, table, update.scaling, update.input_gain)
        return B.T @ H, H @ A.T
    grad_A, grad_B = torch.zeros_like(A), torch.empty_like(B)
    for rows in _row_blocks(G):
        z = torch.mm(B[rows], A).mul_(update.input_gain)
        g = G[rows].to(A.dtype)
        table.accumulate(z, g * (update.scaling / update.input_gain))
        h = table.slope(z).mul_(update.scaling).mul_(g)
        grad_B[rows] = h @ A.T
        grad_A.addmm_(B[rows].T, h)
    return grad_A, grad_B


class _AdaptedLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        A: Tensor,
        B: Tensor,
        amplitude: Tensor | None,
        bandwidth: Tensor | None,
        update: _Update,
    ) -> Tensor:
        ctx.save_for_backward(x, weight, A, B, amplitude, bandwidth)
        ctx.update = update
        effective = _empty_weight(x, weight, A, B)
        _write_weight(effective, weight, A, B, TransferTable(update.spec, amplitude, bandwidth, A.dtype), update)
        return F.linear(x, effective, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
        with _without_autocast(grad_y):
            return _AdaptedLinear._backward(ctx, grad_y)

    @staticmethod
    def _backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, A, B, amplitude, bandwidth = ctx.saved_tensors
        update: _Update = ctx.update
        needs_x, needs_weight, needs_bias, *needs_update = ctx.needs_input_grad[:7]
        table = TransferTable(update.spec, amplitude, bandwidth, A.dtype)
        buffer = _empty_weight(x, weight, A, B)
        flat_y, flat_x = grad_y.reshape(-1, B.shape[0]), x.reshape(-1, A.shape[1])

        grad_x = grad_weight = grad_A = grad_B = grad_amplitude = grad_bandwidth = None
        if needs_x:
            _write_weight(buffer, weight, A, B, table, update)
            grad_x = (flat_y @ buffer).view_as(x)
        if needs_weight or any(needs_update):
            if _is_transposed(buffer):
                torch.mm(flat_x.T, flat_y, out=buffer.T)
            else:
                torch.mm(flat_y.T, flat_x, out=buffer)
            grad_A, grad_B = _factor_gradients(buffer, A, B, table, update, is_free=not needs_weight)
            grad_amplitude, grad_bandwidth = table.parameter_gradients()
            grad_weight = buffer if needs_weight else None
        grad_bias = flat_y.sum(0) if needs_bias else None
        return grad_x, grad_weight, grad_bias, grad_A, grad_B, grad_amplitude, grad_bandwidth, None


class _DeltaWeight(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, A: Tensor, B: Tensor, amplitude: Tensor | None, bandwidth: Tensor | None, update: _Update
    ) -> Tensor:
        ctx.save_for_backward(A, B, amplitude, bandwidth)
        ctx.update = update
        delta = A.new_empty(B.shape[0], A.shape[1])
        _write_weight(delta, None, A, B, TransferTable(update.spec, amplitude, bandwidth, A.dtype), update)
        return delta

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        A, B, amplitude, bandwidth = ctx.saved_tensors
        table = TransferTable(ctx.update.spec, amplitude, bandwidth, A.dtype)
        with _without_autocast(grad):
            factors = _factor_gradients(grad.contiguous(), A, B, table, ctx.update, is_free=False)
            return *factors, *table.parameter_gradients(), None


def _empty_weight(x: Tensor, weight: Tensor | None, A: Tensor, B: Tensor) -> Tensor:
    # Laid out like W, also when W is a transposed view: then even the bits of the base layer's matmul are kept.
    return x.new_empty(B.shape[0], A.shape[1]) if weight is None else torch.empty_like(weight)


def _parameters(transfer: Transfer, device: torch.device) -> tuple[Tensor | None, Tensor | None]:
    """Amplitude and bandwidth where the layer is: a φ shared by layers on several devices lives on one of them."""
    amplitude, bandwidth = transfer.amplitude, transfer.bandwidth
    if amplitude is None or bandwidth is None:
        return None, None
    return amplitude.to(device), bandwidth.to(device)


def _factor_dtype(*tensors: Tensor | None) -> torch.dtype:
    """ΔW is formed in float32 at least: in half precision its entries would drown in the rounding of BA."""
    return torch.float64 if any(t is not None and t.dtype == torch.float64 for t in tensors) else torch.float32


# Dynamo cannot trace the compiled kernels: under torch.compile the op runs as it is, at the cost of a graph break.
@torch.compiler.disable
def adapted_linear(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    A: Tensor,
    B: Tensor,
    transfer: Transfer,
    *,
    scaling: float,
    input_gain: float,
) -> Tensor:
    """Y = x (W + ΔW)ᵀ + b with ΔW = (s/g)·φ(g·BA), or x ΔWᵀ + b where `weight` is None.

    In half precision, adding ΔW to W and rounding loses part of the update, the more the smaller it is. There, call it
    without a weight and add the base layer's own output.

    Args:
        x: (..., n), float64, float32, bfloat16 or float16; autocast does not change it.
        weight: W (m, n) in the dtype of x, float32 or float64; a transposed view is fine.
        bias: b (m,).
        A: (r, n).
        B: (m, r).
        transfer: φ.
        scaling: s.
        input_gain: g > 0.

    Returns:
        (..., m) in the dtype of x.

    Raises:
        NotImplementedError: called by `torch.export`, whose trace would hold wrong values.

    """
    # Dynamo never gets here, so it is torch.export.
    if torch.compiler.is_compiling():
        raise NotImplementedError(
            "torch.export cannot trace an LR-LoRA layer. Merge the adapter first (`model.merge_and_unload()`) and "
            "export the plain model."
        )
    dtype = _factor_dtype(x, A, B)
    update = _Update(transfer.spec, scaling, input_gain)
    phi = _parameters(transfer, A.device)
    with _without_autocast(x):
        return _AdaptedLinear.apply(x, weight, bias, A.to(dtype), B.to(dtype), *phi, update)


@torch.compiler.disable
def delta_weight(A: Tensor, B: Tensor, transfer: Transfer, *, scaling: float, input_gain: float) -> Tensor:
    """ΔW = (s/g)·φ(g·BA), (m, n), float32 (float64 if A or B are), differentiable; saves no m×n tensor."""
    dtype = _factor_dtype(A, B)
    with _without_autocast(A):
        return _DeltaWeight.apply(
            A.to(dtype), B.to(dtype), *_parameters(transfer, A.device), _Update(transfer.spec, scaling, input_gain)
        )
