"""The C++ kernels: compiled at first use, and what happens where they cannot be."""

from __future__ import annotations

import shutil
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from lrlora.ops import cpu
from lrlora.ops.table import TransferTable
from lrlora.transfer import Transfer, TransferSpec

from .test_linear import formula, fused, make_case, relative


@pytest.fixture
def fresh_library(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """An empty cache folder, and nothing loaded yet."""
    monkeypatch.delenv("LRLORA_KERNELS", raising=False)
    monkeypatch.setenv("LRLORA_CACHE", str(tmp_path))
    cpu._library.cache_clear()
    yield tmp_path
    cpu._library.cache_clear()


def test_without_a_compiler_it_says_so_once_and_works(monkeypatch: pytest.MonkeyPatch, fresh_library: Path) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    case = make_case(dtype=torch.float32)
    with pytest.warns(UserWarning, match=r"C\+\+ compiler .*CXX.*no-such-compiler"):
        y = fused(case)
    assert relative(y, formula(case)) <= 1e-6
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fused(case)


def test_without_a_home_it_works(monkeypatch: pytest.MonkeyPatch, fresh_library: Path) -> None:
    def no_home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("LRLORA_CACHE")
    monkeypatch.setattr(Path, "home", no_home)
    case = make_case(dtype=torch.float32)
    with pytest.warns(UserWarning, match="LRLORA_CACHE"):
        assert relative(fused(case), formula(case)) <= 1e-6


@pytest.mark.skipif(shutil.which("c++") is None, reason="no C++ compiler")
def test_a_damaged_library_is_compiled_anew(fresh_library: Path) -> None:
    # Compiled by another process: what this one has loaded, it would not read again.
    subprocess.run([sys.executable, "-c", "from lrlora.ops import cpu; cpu._library()"], check=True)
    (library,) = fresh_library.glob("kernels-*.so")
    library.write_bytes(b"")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert cpu._library() is not None
    assert library.stat().st_size > 0


@pytest.mark.skipif(shutil.which("c++") is None, reason="no C++ compiler")
def test_the_natural_tails_are_taken_as_far_as_a_table_reaches() -> None:
    spec = TransferSpec("sinc", 50)
    transfer, plain = Transfer(spec), torch.zeros(1)
    for largest, expected in ((0.0, True), (40.0, True), (1e6, False), (float("inf"), False)):
        table = TransferTable(spec, transfer.amplitude, transfer.bandwidth, torch.float32, largest)
        assert cpu.supports(table, plain) is expected
