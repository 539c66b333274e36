"""Fused CPU kernels, compiled on first use and called through ctypes.

`cpu.cpp` includes no torch or Python header, so it compiles in a few seconds, works with any version of either, and
needs only a C++ compiler with OpenMP. Without a compiler, `linear.py` falls back to blocked PyTorch.
"""

from __future__ import annotations

import ctypes
import functools
import os
import shlex
import shutil
import warnings
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

from .library import load_library
from .table import CELLS_PER_BIN, PhiGradient, TransferTable

_SOURCE = Path(__file__).with_name("cpu.cpp")
_FUNCTIONS = ("lrlora_effective_weight", "lrlora_gradient")
_FORMS = {"residual": 0, "sinc": 1}
_MOMENTS = 4
_BANKS = 2  # same as in cpu.cpp
# Each thread clears and reduces its own gradient bins, which does not pay off for fewer entries.
_ENTRIES_PER_THREAD = 2**15
_DIRECT = (torch.float32, torch.bfloat16)  # dtypes that the kernels read and write directly
# Number of float16 entries converted per block: few blocks that still fit in the cache.
_CONVERTED_ENTRIES = 2**20
_FLAGS = ("-O3", "-std=c++17", "-fPIC", "-shared", "-fopenmp", "-fno-math-errno", "-fno-trapping-math")
# Same capability level as PyTorch selects at run time. In a shared cache, a library built for more could reach an older
# CPU.
_CPU_FLAGS = {
    "AVX2": ("-mavx2", "-mfma"),
    "AVX512": ("-mavx2", "-mfma", "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl"),
}


class _Phi(ctypes.Structure):
    _fields_ = (
        ("table", ctypes.c_void_p),
        ("side", ctypes.c_int32),
        ("cells_per_unit", ctypes.c_float),
        ("form", ctypes.c_int32),
        ("gain", ctypes.c_float),
        ("scaling", ctypes.c_float),
    )


def supports(table: TransferTable, *tensors: Tensor | None) -> bool:
    """Whether the kernels support this φ and these tensors."""
    is_known = table.spec.form in _FORMS and table.is_complete
    return is_known and all(t is None or _is_plain(t) for t in tensors) and _library() is not None


def _is_plain(tensor: Tensor) -> bool:
    """Whether a strided CPU tensor of a float dtype; subclasses may store their elements elsewhere."""
    return (
        type(tensor) in (Tensor, nn.Parameter)
        and tensor.device.type == "cpu"
        and tensor.dtype in (torch.float32, torch.bfloat16, torch.float16)
        and tensor.layout == torch.strided
    )


def write_weight(
    out: Tensor, weight: Tensor | None, A: Tensor, B: Tensor, table: TransferTable, scaling: float, gain: float
) -> None:
    """Write weight + (s/g)·φ(g·BA) to contiguous `out` (m, n); A, B float32, all on the CPU."""
    A, B = A.contiguous(), B.contiguous()
    phi, _keep = _phi(table, table.cubics(derivative=False), scaling, gain)
    for rows in _blocks(out):
        part = out[rows] if out.dtype in _DIRECT else torch.empty_like(out[rows], dtype=torch.float32)
        base = None if weight is None else weight[rows].to(part.dtype).contiguous()
        pointer = ctypes.c_void_p(None if base is None else base.data_ptr())
        _require_library().lrlora_effective_weight(
            *_pointers(part),
            pointer,
            *_pointers(A, B[rows]),
            *_sizes(part, A),
            phi,
            torch.get_num_threads(),
            int(part.dtype == torch.bfloat16),
        )
        if part.dtype != out.dtype:
            out[rows] = part


def factor_gradients(
    G: Tensor, A: Tensor, B: Tensor, gradient: PhiGradient, scaling: float, gain: float
) -> tuple[Tensor, Tensor]:
    """(∂L/∂A, ∂L/∂B) from contiguous G = ∂L/∂(W + ΔW) (m, n). Adds G to the gradient of φ."""
    table = gradient.table
    A, B = A.contiguous(), B.contiguous()
    phi, _keep = _phi(table, table.cubics(derivative=True), scaling, gain)
    threads = max(1, min(torch.get_num_threads(), G.numel() // _ENTRIES_PER_THREAD))
    bins = 2 * table.cells_per_side // CELLS_PER_BIN
    moments = torch.zeros(threads, bins, _MOMENTS, dtype=torch.float64, device="cpu")
    sums = torch.zeros(threads, _BANKS, bins, _MOMENTS, dtype=torch.float32, device="cpu")
    grad_A, grad_B = torch.zeros((threads, *A.shape), dtype=torch.float32, device="cpu"), torch.empty_like(B)
    for rows in _blocks(G):
        part = G[rows] if G.dtype in _DIRECT else G[rows].float()
        _require_library().lrlora_gradient(
            *_pointers(part, A, B[rows], grad_A, grad_B[rows], moments, sums),
            *_sizes(part, A),
            phi,
            threads,
            int(part.dtype == torch.bfloat16),
        )
    gradient.add_central_moments(moments)
    return grad_A.sum(0), grad_B


# On a CPU, the matmul library is fastest, and G fits in the buffer of W + ΔW.
product_gradients = None


def _blocks(matrix: Tensor) -> Iterator[slice]:
    """Row blocks for one kernel call: all rows, or as many as are converted to float32 at a time."""
    rows, columns = matrix.shape
    step = max(1, rows if matrix.dtype in _DIRECT else _CONVERTED_ENTRIES // max(1, columns))
    return (slice(start, start + step) for start in range(0, rows, step))


def _sizes(matrix: Tensor, A: Tensor) -> tuple[ctypes.c_int64, ...]:
    """(m, n, r)."""
    return tuple(ctypes.c_int64(size) for size in (*matrix.shape, A.shape[0]))


def _phi(table: TransferTable, cubics: Tensor, scaling: float, gain: float) -> tuple[_Phi, Tensor]:
    """Kernel arguments for φ, and the tensor (cells, 4) they point into."""
    form = _FORMS[table.spec.form]
    return _Phi(cubics.data_ptr(), table.cells_per_side, 1 / table.spacing, form, gain, scaling), cubics


def _pointers(*tensors: Tensor) -> tuple[ctypes.c_void_p, ...]:
    return tuple(ctypes.c_void_p(tensor.data_ptr()) for tensor in tensors)


def _require_library() -> ctypes.CDLL:
    library = _library()
    assert library is not None
    return library


@functools.cache
def _library() -> ctypes.CDLL | None:
    """The compiled kernels, or None (after one warning) if they are unavailable."""
    compiler = os.environ.get("CXX") or next(filter(shutil.which, ("c++", "g++", "clang++")), "c++")
    command = [*shlex.split(compiler), *_FLAGS, *_CPU_FLAGS.get(torch.backends.cpu.get_cpu_capability(), ())]
    try:
        return load_library(_SOURCE, command, _FUNCTIONS)
    except (OSError, RuntimeError) as error:
        warnings.warn(
            "The CPU kernels of lrlora could not be compiled or loaded, so training falls back to plain PyTorch, "
            "which is slower. Install a C++ compiler with OpenMP (or set CXX), and make sure that the cache folder "
            "is writable (or set LRLORA_CACHE). Set LRLORA_KERNELS=0 to silence this warning. Reason: "
            f"{str(error).strip()[-500:]}",
            stacklevel=2,
        )
        return None
