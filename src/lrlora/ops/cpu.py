"""Fused CPU kernels, compiled on first use and called through ctypes.

`cpu.cpp` includes no torch or Python header, so it compiles in a few seconds, works with any version of either, and
needs only a C++ compiler with OpenMP. Without a compiler, `fused_linear.py` falls back to blocked PyTorch.

The compiled library is cached for this user only. Loading a library executes it. It is therefore loaded only from a
folder and file that are owned by this user and not writable by others, like ssh keys.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import math
import os
import platform
import shlex
import shutil
import stat
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..files import cache_folder, flush
from .table import CELLS_PER_BIN, PhiGradient, TransferTable, is_plain

_SOURCE = Path(__file__).with_name("cpu.cpp")
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
_COMPILER_SECONDS = 120


class _Phi(ctypes.Structure):
    _fields_ = (
        ("table", ctypes.c_void_p),
        ("side", ctypes.c_int32),
        ("cells_per_unit", ctypes.c_float),
        ("backbone", ctypes.c_float),
        ("clip", ctypes.c_float),
        ("gain", ctypes.c_float),
        ("scaling", ctypes.c_float),
    )


# Tensors, m, n, r, φ, number of threads, whether entries are bfloat16.
_ARGUMENTS = {
    name: (*[ctypes.c_void_p] * tensors, *[ctypes.c_int64] * 3, _Phi, ctypes.c_int32, ctypes.c_int32)
    for name, tensors in (("lrlora_effective_weight", 4), ("lrlora_gradient", 7))
}


def supports(table: TransferTable, *tensors: Tensor | None) -> bool:
    """Whether the kernels support this φ and these tensors."""
    is_plain_on_cpu = all(t is None or (is_plain(t) and t.device.type == "cpu") for t in tensors)
    return table.is_complete and is_plain_on_cpu and _library() is not None


def write_weight(
    out: Tensor, weight: Tensor | None, A: Tensor, B: Tensor, table: TransferTable, scaling: float, gain: Tensor
) -> None:
    """Write weight + (s/g)·φ(g·BA) to contiguous `out` (m, n); A, B float32, all on the CPU."""
    A, B = A.contiguous(), B.contiguous()
    phi, _cubics = _phi_arguments(table, table.cubics(derivative=False), scaling, gain)
    for rows in _blocks(out):
        block = out[rows] if out.dtype in _DIRECT else torch.empty_like(out[rows], dtype=torch.float32)
        base = None if weight is None else weight[rows].to(block.dtype).contiguous()
        _library().lrlora_effective_weight(
            block.data_ptr(),
            None if base is None else base.data_ptr(),
            A.data_ptr(),
            B[rows].data_ptr(),
            *block.shape,
            len(A),
            phi,
            torch.get_num_threads(),
            int(block.dtype == torch.bfloat16),
        )
        if block.dtype != out.dtype:
            out[rows] = block


def factor_gradients(
    G: Tensor, A: Tensor, B: Tensor, gradient: PhiGradient, scaling: float, gain: Tensor
) -> tuple[Tensor, Tensor]:
    """(∂L/∂A, ∂L/∂B) from contiguous G = ∂L/∂(W + ΔW) (m, n). Adds G to the gradient of φ."""
    table = gradient.table
    A, B = A.contiguous(), B.contiguous()
    phi, _cubics = _phi_arguments(table, table.cubics(derivative=True), scaling, gain)
    threads = max(1, min(torch.get_num_threads(), G.numel() // _ENTRIES_PER_THREAD))
    bins = 2 * table.cells_per_side // CELLS_PER_BIN
    moments = torch.zeros(threads, bins, _MOMENTS, dtype=torch.float64, device="cpu")
    sums = torch.zeros(threads, _BANKS, bins, _MOMENTS, dtype=torch.float32, device="cpu")
    grad_A, grad_B = torch.zeros((threads, *A.shape), dtype=torch.float32, device="cpu"), torch.empty_like(B)
    for rows in _blocks(G):
        block = G[rows] if G.dtype in _DIRECT else G[rows].float()
        _library().lrlora_gradient(
            *(tensor.data_ptr() for tensor in (block, A, B[rows], grad_A, grad_B[rows], moments, sums)),
            *block.shape,
            len(A),
            phi,
            threads,
            int(block.dtype == torch.bfloat16),
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


def _phi_arguments(table: TransferTable, cubics: Tensor, scaling: float, gain: Tensor) -> tuple[_Phi, Tensor]:
    """Kernel arguments for φ, and the tensor (cells, 4) they point into."""
    form = table.spec.phi_form
    grid = cubics.data_ptr(), table.cells_per_side, 1 / table.spacing
    clip = form.interval if form.is_clipped else math.inf
    return _Phi(*grid, form.backbone, clip, gain.item(), scaling), cubics


@functools.cache
def _library() -> Any:
    """The compiled kernels as `ctypes.CDLL`, or None (after one warning) if they are unavailable."""
    compiler = os.environ.get("CXX") or next(filter(shutil.which, ("c++", "g++", "clang++")), "c++")
    command = [*shlex.split(compiler), *_FLAGS, *_CPU_FLAGS.get(torch.backends.cpu.get_cpu_capability(), ())]
    try:
        return _load(command)
    except (OSError, RuntimeError, subprocess.TimeoutExpired) as error:
        warnings.warn(
            "The CPU kernels of lrlora could not be compiled or loaded, so training falls back to plain PyTorch, "
            "which is slower. Install a C++ compiler with OpenMP (or set CXX), and make sure that the cache folder "
            "is writable (or set LRLORA_CACHE). Set LRLORA_KERNELS=0 to silence this warning. Reason: "
            f"{str(error).strip()[-500:]}",
            stacklevel=2,
        )
        return None


def _load(command: list[str]) -> ctypes.CDLL:
    """Load the library from the cache, or compile it now with `command` (without source and output).

    Raises:
        OSError: compiling, loading or storing fails, or the cache folder is not this user's alone.
        RuntimeError: the home folder cannot be determined.

    """
    recipe = hashlib.sha256(_SOURCE.read_bytes() + " ".join((sys.platform, platform.machine(), *command)).encode())
    folder = _private_folder()
    cached = folder / f"kernels-{recipe.hexdigest()[:32]}.so"
    if cached.exists():
        try:
            _require_private(cached)
            return _open(cached)
        except OSError:
            cached.unlink(missing_ok=True)
    with tempfile.TemporaryDirectory(prefix="compiling-", dir=folder) as scratch:
        compiled = Path(scratch) / "compiled.so"
        _compile([*command, str(_SOURCE), "-o", str(compiled)])
        compiled.chmod(0o700)  # the compiler applies the umask
        library = _open(compiled)  # before storing, so that only working libraries are cached
        flush(compiled)
        compiled.replace(cached)
    return library


def _open(path: Path) -> ctypes.CDLL:
    library = ctypes.CDLL(str(path))
    for name, kinds in _ARGUMENTS.items():
        if not hasattr(library, name):
            raise OSError(f"{path} has no function {name}")
        getattr(library, name).argtypes = kinds
    return library


def _private_folder() -> Path:
    """Folder of this user's libraries, created if missing.

    Created with mode 0700, whatever the umask; the cache folder around it may be shared or group-writable (umask 002)
    and is left unchanged. A folder that others can write to is refused, not repaired, so that the user notices.
    """
    # Windows uses access control lists, which Python does not read.
    folder = cache_folder() / (f"kernels-{os.geteuid()}" if os.name == "posix" else "kernels")
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    _require_private(folder)
    return folder


def _require_private(path: Path) -> None:
    """Raise PermissionError unless a path is owned by this user, is no symbolic link, and is not writable by others."""
    if os.name != "posix":
        return
    if path.is_symlink():
        raise PermissionError(f"{path} is a symbolic link. Remove it.")
    status = path.stat()
    if status.st_uid != os.geteuid():
        raise PermissionError(
            f"{path} belongs to another user (uid {status.st_uid}), whose code would run as yours. Set LRLORA_CACHE to "
            "another folder."
        )
    if status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise PermissionError(
            f"{path} is writable by other users (mode {stat.S_IMODE(status.st_mode):04o}), whose code would run as "
            f"yours. Run chmod go-w {path}, or set LRLORA_CACHE to another folder."
        )


def _compile(command: list[str]) -> None:
    done = subprocess.run(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        timeout=_COMPILER_SECONDS,
    )
    if done.returncode != 0:
        raise ChildProcessError(f"{command[0]} failed ({done.returncode}). {done.stdout}")
