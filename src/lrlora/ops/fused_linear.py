"""Fused path: one matmul with W + (s/g)·φ(g·BA), two in half precision, and a backward that saves no m×n tensor.

The forward pass builds W + ΔW block by block in one m×n buffer and frees it after the matmul. The backward pass
rebuilds it from the factors for ∂L/∂x, then reuses the buffer for G = ∂L/∂(W + ΔW) = (∂L/∂y)ᵀ x and loops over its
blocks:

    H = s · φ′(g·BA) ∘ G,    ∂L/∂B = H Aᵀ,    ∂L/∂A = Bᵀ H,    ∂L/∂φ(g·BA) = (s/g) · G

Saved for backward: x, W (allocated anyway), A, B and the parameters of φ.
"""

from __future__ import annotations

import functools
import importlib
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import cpu
from .form import without_autocast
from .phi import TransferSpec
from .table import KernelError, PhiGradient, TransferTable

# Entries of ΔW per block. On a CPU, temporaries of this size stay in the cache; an accelerator needs few, large kernels
# (64 MB each).
CPU_BLOCK_ENTRIES = 2**16
ACCELERATOR_BLOCK_ENTRIES = 2**24


_SETTINGS = "float scaling, str form, int num_basis, float interval, float lr_multiplier"  # s, and those of φ


def _kernels_for(table: TransferTable, *tensors: Tensor | None) -> Any:
    """Module with the kernels for this φ and these tensors, `cpu` (C++) or `gpu` (Triton); None for plain PyTorch.

    Set the environment variable `LRLORA_KERNELS` to override the choice: `native` (C++), `triton`, or `0` (PyTorch).

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
def _triton() -> Any:
    try:
        return importlib.import_module(".gpu", __package__)
    except ImportError:
        return None  # Triton ships with PyTorch for CUDA and may be missing elsewhere


_CHOICES: dict[str, Callable[[], Any]] = {"native": lambda: cpu, "triton": _triton, "0": lambda: None}


def _row_blocks(matrix: Tensor) -> Iterator[slice]:
    rows, columns = matrix.shape
    entries = CPU_BLOCK_ENTRIES if matrix.device.type == "cpu" else ACCELERATOR_BLOCK_ENTRIES
    step = max(1, entries // columns)
    for start in range(0, rows, step):
        yield slice(start, min(start + step, rows))


def _tabulate(spec: TransferSpec, A: Tensor, B: Tensor, gain: Tensor, phi: Tensor) -> TransferTable:
    """Table of φ for all entries of g·BA, up to the largest size."""
    largest = 0.0 if spec.phi_form.is_clipped else _largest_input(A, B, gain, spec.interval)
    return TransferTable(spec, phi, A.dtype, largest)


def _largest_input(A: Tensor, B: Tensor, gain: Tensor, interval: float) -> float:
    """The largest |g·BA|, or an upper bound of it that is within the interval; NaN if any entry is."""
    if not A.numel() or not B.numel():
        return 0.0
    # Cauchy–Schwarz bound: almost free, and usually sufficient.
    bound = (gain * B.norm(dim=-1).amax(-1) * A.norm(dim=-2).amax(-1)).max().item()
    if bound <= interval:
        return bound
    # One matmul, in memory that the weight reuses next; with blocks, threads would synchronize too often.
    least, greatest = torch.aminmax(gain[..., None, None] * (B @ A))
    return max(greatest.item(), -least.item())


def _is_transposed(matrix: Tensor) -> bool:
    """Whether `matrix` (m, n) is column-major, like the weight of transformers' Conv1D."""
    return matrix.stride(0) < matrix.stride(1)


def _write_weight(
    out: Tensor, weight: Tensor | None, A: Tensor, B: Tensor, gain: Tensor, table: TransferTable, scaling: float
) -> None:
    """Write weight + ΔW (ΔW alone without a weight) to `out` (m, n), rounded once to its dtype."""
    left, right = B, A
    if _is_transposed(out):
        out, weight, left, right = out.T, None if weight is None else weight.T, A.T, B.T
    kernels = _kernels_for(table, out, weight, A, B)
    if kernels is not None:
        with suppress(KernelError):
            kernels.write_weight(out, weight, right, left, table, scaling, gain)
            return
    for rows in _row_blocks(out):
        z = torch.mm(left[rows], right).mul_(gain)
        delta = table.value(z).mul_(scaling / gain)
        out[rows] = delta if weight is None else delta.add_(weight[rows])


def _factor_gradients(
    G: Tensor, A: Tensor, B: Tensor, gain: Tensor, gradient: PhiGradient, scaling: float
) -> tuple[Tensor, Tensor]:
    """(∂L/∂A, ∂L/∂B) from G = ∂L/∂(W + ΔW) (m, n). Adds G to the gradient of φ."""
    table = gradient.table
    if _is_transposed(G):
        grad_Bt, grad_At = _factor_gradients(G.T, B.T, A.T, gain, gradient, scaling)
        return grad_At.T.contiguous(), grad_Bt.T.contiguous()
    kernels = _kernels_for(table, G, A, B)
    if kernels is not None:
        with suppress(KernelError):
            return kernels.factor_gradients(G, A, B, gradient, scaling, gain)
    grad_A, grad_B = torch.zeros_like(A), torch.empty_like(B)
    for rows in _row_blocks(G):
        z = torch.mm(B[rows], A).mul_(gain)
        g = G[rows].to(A.dtype)
        gradient.add(z, g * (scaling / gain))
        h = table.slope(z).mul_(scaling).mul_(g)
        grad_B[rows] = h @ A.T
        grad_A.addmm_(B[rows].T, h)
    return grad_A, grad_B


# Custom operators: torch.compile cannot trace the compiled kernels or the table, and keeps operators as graph nodes.


@torch.library.custom_op(
    "lrlora::adapted_linear",
    mutates_args=(),
    schema="(Tensor x, Tensor? weight, Tensor? bias, Tensor A, Tensor B, Tensor gain, Tensor phi, "
    f"{_SETTINGS}) -> Tensor",
)
def adapted_linear(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    A: Tensor,
    B: Tensor,
    gain: Tensor,
    phi: Tensor,
    scaling: float,
    *spec: Any,
) -> Tensor:
    """`Transfer.fused_linear` of A and B in float32 or float64."""
    with without_autocast(x.device.type):
        table = _tabulate(TransferSpec(*spec), A, B, gain, phi)
        effective = _empty_weight(x.dtype, weight, A, B)
        if weight is None or x.dtype not in (torch.bfloat16, torch.float16):
            _write_weight(effective, weight, A, B, gain, table, scaling)
            return F.linear(x, effective, bias).contiguous()
        _write_weight(effective, None, A, B, gain, table, scaling)
        y = F.linear(x, weight, bias).view(-1, len(B))
        return torch.addmm(y, x.reshape(-1, x.shape[-1]), effective.T).view(*x.shape[:-1], len(B))


@adapted_linear.register_fake
def _(x: Tensor, weight: Tensor | None, bias: Tensor | None, A: Tensor, B: Tensor, *arguments: Any) -> Tensor:
    return x.new_empty(*x.shape[:-1], B.shape[0])


@torch.library.custom_op(
    "lrlora::adapted_linear_backward",
    mutates_args=(),
    schema="(Tensor grad_y, bool[] needs, Tensor x, Tensor? weight, Tensor A, Tensor B, Tensor gain, "
    f"Tensor phi, {_SETTINGS}) -> Tensor[]",
)
def _adapted_linear_backward(
    grad_y: Tensor,
    needs: Sequence[bool],
    x: Tensor,
    weight: Tensor | None,
    A: Tensor,
    B: Tensor,
    gain: Tensor,
    phi: Tensor,
    scaling: float,
    *spec: Any,
) -> list[Tensor]:
    """Gradients of the first seven inputs of `adapted_linear`, restricted to `needs`; there is none of g."""
    needs_x, needs_weight, needs_bias, *needs_update = needs
    gradients: list[Tensor | None] = [None] * len(needs)
    with without_autocast(grad_y.device.type):
        table = _tabulate(TransferSpec(*spec), A, B, gain, phi)
        gradient = PhiGradient(table)
        buffer = _empty_weight(x.dtype, weight, A, B)
        flat_y, flat_x = grad_y.reshape(-1, B.shape[0]), x.reshape(-1, A.shape[1])
        if needs_x:
            _write_weight(buffer, weight, A, B, gain, table, scaling)
            gradients[0] = (flat_y @ buffer).view(x.shape)
        if needs_weight or any(needs_update):
            kernels = None if needs_weight else _kernels_for(table, flat_y, flat_x, A, B)
            if kernels is not None and kernels.product_gradients is not None:
                with suppress(KernelError):
                    gradients[3:5] = kernels.product_gradients(flat_y, flat_x, A, B, gradient, scaling, gain)
            if gradients[3] is None:
                if _is_transposed(buffer):
                    torch.mm(flat_x.T, flat_y, out=buffer.T)
                else:
                    torch.mm(flat_y.T, flat_x, out=buffer)
                gradients[1] = buffer
                gradients[3:5] = _factor_gradients(buffer, A, B, gain, gradient, scaling)
            gradients[6] = gradient.parameter_gradient()
        if needs_bias:
            gradients[2] = flat_y.sum(0)
    return _needed(needs, gradients)


@_adapted_linear_backward.register_fake
def _(
    grad_y: Tensor, needs: Sequence[bool], x: Tensor, weight: Tensor | None, A: Tensor, B: Tensor, *arguments: Any
) -> list[Tensor]:
    bias = grad_y.new_empty(B.shape[0])
    gradients = [None if t is None else t.new_empty(t.shape) for t in (x, weight, bias, A, B, *arguments[:2])]
    gradients[1] = None if weight is None else torch.empty_like(weight)  # keeps the layout of a transposed W
    return _needed(needs, gradients)


def _refuse_second_derivative(ctx: Any, *gradients: Any) -> None:
    raise RuntimeError('φ(BA) has no second derivative here. Use form="expansion", or plain LoRA.')


def _register_gradients(operator: Any, backward: Any, count: int, saved: Sequence[int]) -> None:
    """Let `backward` differentiate an operator by its first `count` inputs, from those that are saved."""

    def save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.settings = inputs[count:]
        ctx.save_for_backward(*(inputs[index] for index in saved))

    def differentiate(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        needs = list(ctx.needs_input_grad[:count])
        gradients = iter(backward(grad, needs, *ctx.saved_tensors, *ctx.settings))
        return *(next(gradients) if needed else None for needed in needs), *(None for _ in ctx.settings)

    backward.register_autograd(_refuse_second_derivative)
    operator.register_autograd(differentiate, setup_context=save)


_register_gradients(adapted_linear, _adapted_linear_backward, 7, (0, 1, 3, 4, 5, 6))


@torch.library.custom_op(
    "lrlora::delta_weight",
    mutates_args=(),
    schema=f"(Tensor A, Tensor B, Tensor gain, Tensor phi, {_SETTINGS}) -> Tensor",
)
def delta_weight(
    A: Tensor,
    B: Tensor,
    gain: Tensor,
    phi: Tensor,
    scaling: float,
    *spec: Any,
) -> Tensor:
    """`Transfer.delta` of A and B in float32 or float64."""
    with without_autocast(A.device.type):
        table = _tabulate(TransferSpec(*spec), A, B, gain, phi)
        delta = A.new_empty(*B.shape[:-1], A.shape[-1])
        for (out, left, right), g in zip(_matrices(delta, A, B), gain.flatten(), strict=True):
            _write_weight(out, None, left, right, g, table, scaling)
        return delta


@delta_weight.register_fake
def _(A: Tensor, B: Tensor, *arguments: Any) -> Tensor:
    return A.new_empty(*B.shape[:-1], A.shape[-1])


@torch.library.custom_op(
    "lrlora::delta_weight_backward",
    mutates_args=(),
    schema=f"(Tensor grad, bool[] needs, Tensor A, Tensor B, Tensor gain, Tensor phi, {_SETTINGS}) -> Tensor[]",
)
def _delta_weight_backward(
    grad: Tensor,
    needs: Sequence[bool],
    A: Tensor,
    B: Tensor,
    gain: Tensor,
    phi: Tensor,
    scaling: float,
    *spec: Any,
) -> list[Tensor]:
    """Gradients of the first four inputs of `delta_weight`, restricted to `needs`; there is none of g."""
    with without_autocast(grad.device.type):
        table = _tabulate(TransferSpec(*spec), A, B, gain, phi)
        gradient = PhiGradient(table)
        pairs = [
            _factor_gradients(G, left, right, g, gradient, scaling)
            for (G, left, right), g in zip(_matrices(grad.contiguous(), A, B), gain.flatten(), strict=True)
        ]
        grad_A, grad_B = (
            torch.stack(gradients).view(factor.shape)
            for gradients, factor in zip(zip(*pairs, strict=True), (A, B), strict=True)
        )
        return _needed(needs, [grad_A, grad_B, None, gradient.parameter_gradient()])


@_delta_weight_backward.register_fake
def _(grad: Tensor, needs: Sequence[bool], *tensors: Any) -> list[Tensor]:
    return [t.new_empty(t.shape) for t in _needed(needs, tensors[:4])]


_register_gradients(delta_weight, _delta_weight_backward, 4, range(4))


def _matrices(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Zip over the matrices in the last two dimensions."""
    return zip(*(tensor.unsqueeze(0).flatten(0, -3) for tensor in tensors), strict=True)


def _needed(needs: Sequence[bool], tensors: Sequence[Tensor | None]) -> list[Tensor]:
    """Select the needed tensors."""
    return [tensor for is_needed, tensor in zip(needs, tensors, strict=True) if is_needed and tensor is not None]


def _empty_weight(dtype: torch.dtype, weight: Tensor | None, A: Tensor, B: Tensor) -> Tensor:
    # Same layout as W, even if W is a transposed view: the base layer's matmul is then bitwise unchanged.
    return A.new_empty(B.shape[0], A.shape[1], dtype=dtype) if weight is None else torch.empty_like(weight)
